"""grad_norm, skipped_steps and the statistics live on the first parameter's device, whoever has gradients.

Without a second device there are two stand-ins: the meta device, and the fake GPUs of FakeTensorMode.
"""

import numpy as np
import pytest
import torch
from helpers import exact, oracle
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adamw_triton import AdamW

SHAPES = [(3, 5), (1100,), (2, 700)]
META = torch.device("meta")


def counters(optimizer):
    named = {name: getattr(optimizer, name) for name in ("grad_norm", "skipped_steps", "update_norm", "param_norm")}
    return {name: value for name, value in named.items() if value is not None}


def assert_on(optimizer, device, names):
    found = counters(optimizer)
    assert found.keys() >= set(names)
    assert {name: value.device for name, value in found.items()} == dict.fromkeys(found, torch.device(device))
    assert all(value.shape == () for value in found.values())
    assert found["skipped_steps"].dtype == torch.int64
    assert all(value.dtype == torch.float64 for name, value in found.items() if name != "skipped_steps")


@pytest.mark.parametrize("foreach", [None, True, False])
def test_the_first_parameter_without_a_gradient_on_another_device(foreach, device, path):
    """The others are clipped as if it were not there."""
    first = nn.Parameter(torch.empty(1030, device=META))
    ours = [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = AdamW([first, *ours], foreach=foreach, max_grad_norm=0.5, skip_nonfinite=True, statistics=True)
    reference = torch.optim.AdamW(theirs, foreach=False)
    assert_on(optimizer, META, ["skipped_steps"])
    for step in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        if step == 2:
            ours[1].grad[7] = torch.inf
        else:
            torch.nn.utils.clip_grad_norm_(theirs, 0.5, foreach=False)
            reference.step()
        optimizer.step()
        assert_on(optimizer, META, ["skipped_steps", "grad_norm", "update_norm", "param_norm"])
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
    assert not optimizer.state.get(first)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_only_a_later_parameter_on_another_device_has_a_gradient(foreach, device, path):
    first, second = (nn.Parameter(torch.empty(1030, device=d)) for d in (device, META))
    optimizer = AdamW([first, second], foreach=foreach)
    for present in ([second], [first, second], [second], [first], []):
        optimizer.zero_grad()
        for p in present:
            p.grad = torch.ones_like(p)
        optimizer.step()
        assert_on(optimizer, device, ["skipped_steps"])
        assert optimizer.skipped_steps.item() == 0
    assert optimizer.state[first]["step"] == 2 and optimizer.state[second]["step"] == 3


def test_the_counter_goes_on_while_only_another_device_steps(device, path):
    """A skipped step is counted once, and stays counted."""
    first, second = (nn.Parameter(torch.zeros(1030, device=d)) for d in (device, META))
    optimizer = AdamW([first, second], skip_nonfinite=True)
    first.grad = torch.full_like(first, torch.inf)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1 and optimizer.skipped_steps.device == first.device
    assert optimizer.grad_norm.item() == torch.inf
    first.grad = None
    optimizer.skip_nonfinite = False
    second.grad = torch.ones_like(second)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1 and optimizer.skipped_steps.device == first.device
    optimizer.skip_nonfinite = True
    second.grad = None
    first.grad = torch.full_like(first, torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 2 and optimizer.skipped_steps.device == first.device
    assert not first.any()


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch cannot copy to a fake GPU, nor index there")
@pytest.mark.parametrize("options", [{"max_grad_norm": 0.5}, {"skip_nonfinite": True}, {"statistics": True}], ids=str)
@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1"), ("cpu", "cuda:0"), ("cuda:1", "cpu")], ids=str)
def test_fake_devices(options, devices, path):
    # Autograd has no part in it: it knows no fake GPU where torch is built without CUDA.
    with FakeTensorMode(), torch._C._AutoDispatchBelowAutograd():
        params = [torch.randn(1030, device=d) for d in devices for _ in range(2)]
        optimizer = AdamW(params, **options)
        names = {"statistics": ["update_norm", "param_norm"]}.get(next(iter(options)), ["grad_norm"])
        for present in (params, params[2:], params[:2], params[3:], params):
            for p in params:
                p.grad = torch.randn_like(p) if any(p is q for q in present) else None
            optimizer.step()
            assert_on(optimizer, devices[0], ["skipped_steps", *names])
        for p in params:
            assert optimizer.state[p]["exp_avg"].device == p.device


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("n_steps", [1, 3])
def test_cautious_decay_of_float64(n_steps, foreach, device, path):
    """The decay is a number that float32 does not hold: 1e-15 would be 6e-8."""
    options = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    values = torch.randn(1100, dtype=torch.float64, device=device)
    # Far from 0: what is compared is relative to the parameter.
    param = nn.Parameter(values.sign() * (values.abs() + 0.5))
    optimizer = AdamW([param], cautious=True, foreach=foreach, **options)
    expected = exact(param)
    moments = [torch.zeros_like(param).detach() for _ in range(2)]
    moments = [exact(m) for m in moments]
    for step in range(1, n_steps + 1):
        param.grad = torch.randn_like(param)
        optimizer.step()
        old = torch.from_numpy(expected.astype(np.float64))
        tensors = [torch.from_numpy(m.astype(np.float64)) for m in moments]
        _, moments, slope = oracle(old, param.grad, tensors, step=step, **options)
        update = slope * moments[0]
        decay = np.where(update * expected >= 0, 1 - np.longdouble(1e-3) * np.longdouble(0.1), np.longdouble(1))
        expected = expected * decay - update
        assert ((decay != 1).sum() > 300) and ((decay == 1).sum() > 300)
        error = np.max(abs(exact(param) - expected) / abs(expected))
        assert error < 1e-15 * step, error
