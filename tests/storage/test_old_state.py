"""State saved when codes were kept under the names of moments, scales flat, remainders in int16, options in groups.

The file was written by the package as it was then, after three steps of `PARAMS`; then a fourth was taken.
"""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, storage

FILE = Path(__file__).parent / "data" / "state_with_codes_as_moments.pt"
NAMES = list(torch.load(FILE, weights_only=True))
WITH_8_BITS = [0, 4, 5]  # rows of 128: a matrix, filters with channels last, a slice of a matrix


def flat(tensors):
    return torch.cat([t.detach().cpu().reshape(-1) for t in tensors])


def read(name):
    return torch.load(FILE, weights_only=True)[name]  # anew: a step writes to what was loaded


def loaded(case, device, **options):
    params = [nn.Parameter(torch.empty_like(p, device=device).copy_(p)) for p in case["params"]]
    optimizer = AdamW([{"params": params[:3]}, {"params": params[3:]}], **options)
    optimizer.load_state_dict(case["state_dict"])
    return params, optimizer


@pytest.mark.fast
@pytest.mark.parametrize("name", NAMES)
def test_it_loads_with_every_bit(name, device, path):
    """Into the same storage. Moments that are floats now have the values that were decoded before."""
    case = read(name)
    params, optimizer = loaded(case, device, **{**case["options"], "cautious": False, "decouple_lr": False})
    old = case["state_dict"]["state"]
    for moment, coded in storage.CODED.items():
        values = [storage.moment(moment, optimizer.state[p]).float() for p in params]
        assert torch.equal(flat(values), case[moment])
        for i, p in enumerate(params):
            had_codes = old[i][moment].dtype == coded.dtype
            has_codes = coded.codes in optimizer.state[p]
            assert has_codes == (had_codes and i in WITH_8_BITS) != (moment in optimizer.state[p])
            if has_codes:
                assert torch.equal(optimizer.state[p][coded.codes].cpu(), old[i][moment])
                assert torch.equal(optimizer.state[p][coded.scale].cpu().flatten(), old[i][coded.scale])
    assert torch.equal(flat(optimizer.master_params()), case["masters"])


@pytest.mark.parametrize("name", NAMES)
def test_the_next_step_is_the_one_that_was_taken(name, device, path):
    """To the rounding of another order of operations, which kernels have. Options that change results come along."""
    case = read(name)
    params, optimizer = loaded(case, device, **{**case["options"], "cautious": False, "decouple_lr": False})
    for options in optimizer.group_options:
        assert options["cautious"] == options["decouple_lr"] == ("cautious" in case["options"])
        assert options["decay_lr"] == (3e-3 if "cautious" in case["options"] else None)
        assert options["stochastic_rounding"] is None, "an option of this optimizer, not of the checkpoint"
    optimizer.param_groups[0]["lr"] = 1e-3
    grads = case["grads"].split([p.numel() for p in params])
    for p, grad in zip(params, grads, strict=True):
        p.grad = torch.empty_like(p).copy_(grad.view(p.shape))
    for group in optimizer.param_groups:
        group["stochastic_rounding"] = False
    optimizer.step()
    torch.testing.assert_close(flat(optimizer.master_params()), case["masters_after"], rtol=3e-7, atol=3e-7)
    json.dumps(optimizer.state_dict()["param_groups"])


def test_it_loads_into_any_other_storage(device, path):
    for name in NAMES:
        for options in ({}, {"exp_avg_dtype": torch.bfloat16}, {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8"}):
            params, optimizer = loaded(read(name), device, **options)
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
            assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("name", ["8 bits", "masters of 32"])
def test_an_optimizer_that_was_pickled_goes_on(name, device, path):
    """What unpickling installs: old groups and old state, as they were."""
    case = read(name)
    params = [nn.Parameter(torch.empty_like(p, device=device).copy_(p)) for p in case["params"]]
    optimizer = AdamW.__new__(AdamW)
    groups = [dict(group) for group in case["state_dict"]["param_groups"]]
    for group in groups:
        group["params"] = [params[i] for i in group["params"]]
        group["stochastic_rounding"] = False
    state = {
        params[i]: {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in entries.items()}
        for i, entries in case["state_dict"]["state"].items()
    }
    optimizer.__setstate__({"defaults": {}, "state": state, "param_groups": groups})
    assert optimizer.group_options[0]["exp_avg_dtype"] == ("int8" if name == "8 bits" else None)
    assert "exp_avg_dtype" not in optimizer.param_groups[0]
    optimizer.param_groups[0]["lr"] = 1e-3
    for p, grad in zip(params, case["grads"].split([p.numel() for p in params]), strict=True):
        p.grad = torch.empty_like(p).copy_(grad.view(p.shape))
    optimizer.step()
    torch.testing.assert_close(flat(optimizer.master_params()), case["masters_after"], rtol=3e-7, atol=3e-7)
