"""fused=True announces AMP support: GradScaler leaves unscaling and skipping to the step."""

import pytest
import torch
from helpers import bits
from pairs import CLOSE, OPTIONS, Pair, assert_same, contents, set_grads, twins
from torch import nn

from adamw_triton import AdamW, adamw_, launch


def test_only_fused_announces_support():
    params = [nn.Parameter(torch.ones(3))]
    assert AdamW(params, fused=True)._step_supports_amp_scaling
    assert not getattr(AdamW(params), "_step_supports_amp_scaling", False)
    assert not getattr(AdamW(params, fused=False), "_step_supports_amp_scaling", False)


def net(device, dtype=torch.float32):
    return nn.Sequential(nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 3)).to(device, dtype)


@pytest.mark.fast
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unscale", [True, False])
@pytest.mark.parametrize("foreach", [True, False])
def test_with_grad_scaler(fused, unscale, foreach, device, path):
    """Against torch's loop with a scaler of its own, with overflows and clipping now and then."""
    ours, theirs = twins(lambda: net(device))
    mine = AdamW(ours.parameters(), fused=fused, foreach=foreach, **OPTIONS)
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False, **OPTIONS)
    scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    inputs = torch.randn(6, 9, device=device)
    for step in range(8):
        for model, optimizer, scaler in ((ours, mine, scalers[0]), (theirs, reference, scalers[1])):
            optimizer.zero_grad()
            scaler.scale(model(inputs).square().mean()).backward()
            if step in (0, 3, 4):
                model[0].weight.grad[1, 2] = float("inf") if step != 4 else float("nan")
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            saved = [bits(p.grad) for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            if optimizer is mine and fused:
                assert all(map(torch.equal, saved, [bits(p.grad) for p in model.parameters()]))
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), **CLOSE)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float(mine.state[p]["step"]) == float(reference.state[q]["step"]) == 5
        torch.testing.assert_close(mine.state[p]["exp_avg_sq"], reference.state[q]["exp_avg_sq"], rtol=3e-6, atol=1e-10)
    assert not hasattr(mine, "found_inf")


@pytest.mark.parametrize("foreach", [True, False])
def test_a_skipped_step_leaves_every_byte(foreach, device, path):
    params = list(net(device, torch.bfloat16).parameters())
    optimizer = AdamW(params, fused=True, amsgrad=True, foreach=foreach, **OPTIONS)
    set_grads(params)
    optimizer.found_inf = torch.zeros(1, device=device)
    optimizer.grad_scale = torch.full((1,), 4.0, device=device)
    optimizer.step()
    before = contents(optimizer)
    optimizer.found_inf.fill_(1.0)
    for p in params:
        p.grad.fill_(float("nan"))
    optimizer.step()
    assert_same(before, optimizer)
    assert {float(optimizer.state[p]["step"]) for p in params} == {1.0}


def test_skipping_at_the_very_first_step_and_going_on_without_a_scaler(device, path):
    pair = Pair(net(device).parameters(), fused=True, **OPTIONS)
    pair.set_grads()
    pair.mine.found_inf = torch.ones(1, device=device)
    for _ in range(2):
        pair.mine.step()
    pair.assert_close(rtol=0, atol=0)
    del pair.mine.found_inf
    for _ in range(3):
        pair.step()
    assert {float(pair.mine.state[p]["step"]) for p in pair.ours} == {3.0}


def test_a_scaler_that_comes_and_goes(device, path):
    """One that only scales, one that only says what it found, both, none."""
    pair = Pair(net(device).parameters(), fused=True, **OPTIONS)
    for scale, found_inf in ((None, None), (8.0, None), (None, 0.0), (0.5, 0.0), (None, None), (8.0, 0.0)):
        pair.set_grads()
        for name, value in (("grad_scale", scale), ("found_inf", found_inf)):
            setattr(pair.mine, name, None if value is None else torch.full((1,), value, device=device))
        for p in pair.ours:
            p.grad.mul_(scale or 1.0)
        pair.mine.step()
        pair.reference.step()
        pair.assert_close()


@pytest.mark.skipif(not launch.INTERPRETED, reason="counts the reads of a CPU tensor")
def test_the_kernels_skip_without_asking(device, monkeypatch):
    """No value is read on the host once a plan stands: that would be a synchronisation on a GPU."""
    params = list(net(device).parameters())
    optimizer = AdamW(params, fused=True, **OPTIONS)
    optimizer.found_inf = torch.zeros(1, device=device)
    optimizer.grad_scale = torch.full((1,), 4.0, device=device)
    set_grads(params)
    optimizer.step()
    for name in ("launch_table", "launch_scalars"):
        monkeypatch.setattr(launch, name, lambda *args, **options: None)

    def fail(self, *args):
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    optimizer.step()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
def test_function_with_scale_and_flag(maximize, dtype, device, path):
    tensors = [torch.rand(1100, device=device).to(dtype) for _ in range(4)]
    scaled = [t.clone() for t in tensors]
    scaled[1] *= 8
    scale, zero, one = (torch.tensor([x], device=device) for x in (8.0, 0.0, 1.0))
    adamw_(*tensors, step=2, lr=0.1, maximize=maximize)
    saved = [t.clone() for t in scaled]
    adamw_(*scaled, step=2, lr=0.1, maximize=maximize, grad_scale=scale, found_inf=one)
    assert all(map(torch.equal, scaled, saved))
    adamw_(*scaled, step=2, lr=0.1, maximize=maximize, grad_scale=scale, found_inf=zero)
    assert torch.equal(scaled[0], tensors[0]) and torch.equal(scaled[3], tensors[3])
