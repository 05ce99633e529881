"""Machine code of flashoptim's AdamW kernel for what is closest to the policy bf16-master24-8bit, for comparison.

Its kernel is one loop over blocks without a path of its own for full ones: counted is the whole loop body, once.
Subroutines that the body calls are not counted. `python -m bench.flashoptim_code TARGET` prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .listing import Instruction, Listing
from .machine_code import TARGETS, disassemble, driver_for

BLOCK_SIZE = 1024  # what it launches with
GROUP_SIZE = 32


def loop_body(listing: Listing) -> list[Instruction]:
    """The instructions of the longest loop: from the target of a backward branch to that branch.

    Raises:
        ValueError: there is no loop.
    """
    spans = [
        (index - listing.labels[instruction.target], index)
        for index, instruction in enumerate(listing.instructions)
        if instruction.target is not None and listing.labels[instruction.target] <= index
    ]
    if not spans:
        raise ValueError("no loop")
    span, end = max(spans)
    return listing.instructions[end - span : end + 1]


def examine(target: str) -> dict[str, Any]:
    """Counts of one compilation, in this process; needs flashoptim."""
    from flashoptim import optimizers

    n = 4 * BLOCK_SIZE
    param, ecc = torch.zeros(n, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int8)
    use_ecc, signed_max, _, signed_dtype = optimizers._ecc_kernel_params(ecc, param)
    scales = [torch.zeros(n // GROUP_SIZE, dtype=torch.float16) for _ in range(2)]
    with driver_for(target):
        kernel = optimizers._triton_adam_kernel.warmup(
            torch.zeros(n, dtype=torch.int8), scales[0], torch.zeros(n, dtype=torch.uint8), scales[1],
            param, param, ecc, n, 1e-3, 0.9, 0.999, 1e-8, 0.01, 7,
            GROUP_SIZE=GROUP_SIZE, DECOUPLED_WEIGHT_DECAY=True,
            PARAM_DTYPE=optimizers._TORCH_DTYPE_TO_TRITON_DTYPE[param.dtype], USE_ECC=use_ecc,
            QUANTIZE_OPTIM_STATES=True, SIGNED_ERROR_T=signed_dtype,
            NUM_MANTISSA_BITS=optimizers._NUM_MANTISSA_BITS[param.dtype], SIGNED_MAX_VAL=signed_max,
            BLOCK_SIZE_N=BLOCK_SIZE, grid=(1,),
        )  # fmt: skip
    listing, resources = disassemble(kernel)
    body = loop_body(listing)
    elements = BLOCK_SIZE // (kernel.metadata.num_warps * TARGETS[target][2])
    return {
        **resources,
        "elements_per_thread": elements,
        "instructions_per_element": len(body) / elements,
        "mufu_per_element": sum(i.op.startswith("MUFU") for i in body) / elements,
        "calls": sum(i.op.startswith("CALL") for i in listing.instructions),
        "access_bytes": ", ".join(map(str, sorted({i.bytes for i in body if i.is_load or i.is_store}))),
    }


def record_fields(target: str) -> dict[str, Any]:
    """What `examine` finds in a process where nothing is interpreted, or why not."""
    if not target.startswith("sm_"):
        return {"error": "read for NVIDIA only"}
    ran = subprocess.run(
        [sys.executable, "-m", "bench.flashoptim_code", target],
        cwd=Path(__file__).parents[1],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    if ran.returncode == 0:
        return json.loads(ran.stdout.splitlines()[-1])
    if "No module named 'flashoptim'" in ran.stderr:
        return {"error": "flashoptim is not installed"}
    return {"error": ran.stderr.strip().splitlines()[-1][:200]}


if __name__ == "__main__":
    print(json.dumps(examine(sys.argv[1])))
