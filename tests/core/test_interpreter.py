"""The interpreter that tests speed up computes the bits that Triton's own does."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, launch
from adamw_triton.storage.policies import BY_NAME

ROOT = Path(__file__).parents[2]
POLICIES = ("fp32", "bf16-stochastic", "fp16-master32", "bf16-master24-8bit-stochastic", "fp32-amsgrad")


def digests():
    """Hashes of all bits that three steps leave: kernels of one tensor, of tables, of the norm and of the scalars."""
    found = {}
    for name in POLICIES:
        policy = BY_NAME[name]
        for foreach in (None, False):
            torch.manual_seed(7)
            params = [nn.Parameter(torch.randn(shape).to(policy.param)) for shape in ((3, 128), (77,), (1,))]
            around = {"max_grad_norm": 1.0, "skip_nonfinite": True, "statistics": True, "cautious": not policy.amsgrad}
            optimizer = AdamW(params, lr=1e-2, weight_decay=0.1, foreach=foreach, **around, **policy.options)
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn(param.shape).to(policy.grad)
                optimizer.step()
            tensors = [*params, optimizer.grad_norm, optimizer.update_norm, optimizer.param_norm]
            tensors += [tensor for param in params for tensor in optimizer.state[param].values()]
            digest = hashlib.sha256()
            for tensor in tensors:
                digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
            found[f"{name}, foreach={foreach}"] = digest.hexdigest()
    return found


@pytest.mark.skipif(not launch.INTERPRETED, reason="kernels are compiled here")
def test_the_same_bits_as_without_speeding_up():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", __file__]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    plain = json.loads(ran.stdout)
    assert len(set(plain.values())) >= len(POLICIES)
    assert digests() == plain


if __name__ == "__main__":
    assert launch.INTERPRETED
    print(json.dumps(digests()))
