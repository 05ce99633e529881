"""Weight decay that is cautious, or decoupled from the learning rate."""

import copy

import numpy as np
import pytest
import torch
from helpers import UNIT, Guarded, exact
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from adamw_triton import AdamW, adamw_
from adamw_triton.storage.policies import POLICIES


def step_exactly(param, grad, exp_avg, exp_avg_sq, *, step, lr, betas, eps, weight_decay, maximize=False):
    """AdamW with the cautious decay of https://arxiv.org/abs/2510.12402, in extended precision."""
    p, g, m, v = map(exact, (param, grad, exp_avg, exp_avg_sq))
    g = -g if maximize else g
    m = betas[0] * m + (1 - betas[0]) * g
    v = betas[1] * v + (1 - betas[1]) * g * g
    update = m / (1 - betas[0] ** step) / (np.sqrt(v / (1 - betas[1] ** step)) + eps)
    return p - lr * (update + weight_decay * (update * p >= 0) * p)


@pytest.mark.fast
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 1000, 1025, 3000])
def test_cautious_step(n, dtype, maximize, device, path):
    options = {"step": 3, "lr": 0.5, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.5, "maximize": maximize}
    guard = Guarded()
    param, grad, exp_avg = (guard.place(torch.randn(n, dtype=dtype, device=device), offset=1) for _ in range(3))
    exp_avg_sq = guard.place(torch.rand(n, dtype=dtype, device=device))
    param[: n // 10] = 0
    expected = step_exactly(param, grad, exp_avg, exp_avg_sq, **options)
    everywhere = param.clone(), grad, exp_avg.clone(), exp_avg_sq.clone()
    adamw_(*everywhere, **options)
    adamw_(param, grad, exp_avg, exp_avg_sq, cautious=True, **options)
    guard.assert_untouched()
    error = abs(exact(param) - expected)
    assert error.max() <= 16 * UNIT[dtype] * (abs(expected).max() + 1)
    if n >= 1000:  # both kinds of element are there
        same = (param == everywhere[0]).float().mean()
        assert 0.3 < same < 0.7
    # On the CPU the step without it is torch's fused one, which rounds otherwise.
    n_roundings = 0 if path == "kernel" else 4
    for moment, other in zip((exp_avg, exp_avg_sq), everywhere[2:], strict=True):
        torch.testing.assert_close(moment, other, rtol=n_roundings * UNIT[dtype], atol=0)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("foreach", [True, False])
def test_cautious_in_every_storage(policy, foreach, device):
    """Without weight decay there is nothing to be cautious of; with it, parameters move between the other two."""
    torch.manual_seed(1)
    start = [torch.randn(1300, device=device).to(policy.param) for _ in range(2)]
    grads = [torch.randn(1300, device=device).to(policy.grad) for _ in range(2)]

    def run(weight_decay, cautious):
        params = [nn.Parameter(p.clone()) for p in start]
        for p, g in zip(params, grads, strict=True):
            if policy.grad != policy.param:
                if not hasattr(p, "grad_dtype"):
                    pytest.skip("this torch refuses gradients of another dtype than their parameter's")
                p.grad_dtype = None
            p.grad = g.clone()
        optimizer = AdamW(
            params, lr=0.1, weight_decay=weight_decay, cautious=cautious, foreach=foreach, **policy.options
        )
        optimizer.step()
        return torch.cat(optimizer.master_params())

    none, all_, some = run(0.0, False), run(1.0, False), run(1.0, True)
    assert torch.equal(none, run(0.0, True))
    update = torch.cat(grads).sign()  # of the first step
    agrees = update * torch.cat(start).sign() >= 0
    assert 0.3 < agrees.float().mean() < 0.7
    assert torch.equal(some[agrees], all_[agrees]) and torch.equal(some[~agrees], none[~agrees])


def test_cautious_is_of_a_group(device, path):
    params = [nn.Parameter(torch.linspace(-1, 1, 50, device=device)) for _ in range(3)]
    optimizer = AdamW(
        [
            {"params": params[:1], "cautious": True},
            {"params": params[1:2]},
            {"params": params[2:], "weight_decay": 0.0},
        ],
        lr=0.1,
        weight_decay=1.0,
    )
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    positive = torch.linspace(-1, 1, 50) >= 0
    a, b, c = (p.detach().cpu() for p in params)
    assert torch.equal(a[positive], b[positive]) and torch.equal(a[~positive], c[~positive])
    assert not torch.equal(a[~positive], b[~positive])


SCHEDULES = {
    "none": lambda optimizer: None,
    "warm-up": lambda optimizer: LambdaLR(optimizer, lambda step: (step + 1) / 10),
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, 6),
}


@pytest.mark.fast
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_decouple_lr(schedule, capturable, tensor_lr, device, path):
    """As torch's with weight_decay divided by the initial learning rate."""
    lr, weight_decay = 0.02, 0.05
    ours = nn.Parameter(torch.randn(500, device=device))
    theirs = copy.deepcopy(ours)
    given = torch.tensor(lr, device=device) if tensor_lr else lr
    mine = AdamW([ours], lr=given, weight_decay=weight_decay, decouple_lr=True, capturable=capturable)
    reference = torch.optim.AdamW([theirs], lr=lr, weight_decay=weight_decay / lr, foreach=False)
    schedulers = [SCHEDULES[schedule](optimizer) for optimizer in (mine, reference)]
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
        for scheduler in filter(None, schedulers):
            scheduler.step()
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
    assert mine.group_options[0]["decay_lr"] == pytest.approx(lr)


def test_decouple_lr_goes_on_from_a_checkpoint(device, path):
    """With the initial learning rate that the run began with, though the optimizer is built with the current one."""
    ours = nn.Parameter(torch.randn(500, device=device))
    mine = AdamW([ours], lr=0.1, weight_decay=0.5, decouple_lr=True)
    mine.param_groups[0]["lr"] = 0.01
    other = copy.deepcopy(ours)
    ours.grad = torch.randn_like(ours)
    mine.step()
    fresh = AdamW([other], lr=0.01, weight_decay=0.5, decouple_lr=True)
    other.data.copy_(ours)
    fresh.load_state_dict(copy.deepcopy(mine.state_dict()))
    for p, optimizer in ((ours, mine), (other, fresh)):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(ours, other)


@pytest.mark.parametrize("of", ["torch", "ours"])
def test_checkpoints_without_these_options_leave_them_on(of, device, path):
    params = [nn.Parameter(torch.ones(5, device=device))]
    params[0].grad = torch.ones_like(params[0])
    other = torch.optim.AdamW(params, lr=0.5) if of == "torch" else AdamW(params, lr=0.5)
    other.step()
    saved = copy.deepcopy(other.state_dict())
    optimizer = AdamW(params, lr=0.1, cautious=True, decouple_lr=True)
    optimizer.load_state_dict(saved)
    (options,) = optimizer.group_options
    assert options["cautious"] and options["decouple_lr"] and options["decay_lr"] == 0.1
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_decouple_lr_with_a_scheduler_that_changes_the_initial_one(device, path):
    ours = nn.Parameter(torch.ones(10, device=device))
    optimizer = AdamW([ours], lr=1e-3, weight_decay=0.1, decouple_lr=True)
    OneCycleLR(optimizer, max_lr=1e-3, total_steps=10)
    assert optimizer.param_groups[0]["initial_lr"] < 1e-3
    optimizer.param_groups[0]["lr"] = 1e-3
    ours.grad = torch.zeros_like(ours)
    optimizer.step()
    torch.testing.assert_close(ours, torch.full_like(ours, 0.9))
    optimizer.param_groups[0]["decay_lr"] = 2e-3  # noticed like any option
    optimizer.step()
    torch.testing.assert_close(ours, torch.full_like(ours, 0.9 * 0.95))


def test_decouple_lr_needs_a_learning_rate(device):
    param = nn.Parameter(torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"decouple_lr=True.*above 0, got 0"):
        AdamW([param], lr=0.0, decouple_lr=True)
    optimizer = AdamW([param])
    with pytest.raises(ValueError, match="decouple_lr=True"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0, "decouple_lr": True})
    assert len(optimizer.param_groups) == 1


def test_decouple_lr_switched_on_later(device, path):
    """From the learning rate of that moment."""
    ours = nn.Parameter(torch.ones(10, device=device))
    optimizer = AdamW([ours], lr=0.1, weight_decay=0.5)
    optimizer.param_groups[0]["decouple_lr"] = True
    ours.grad = torch.zeros_like(ours)
    optimizer.step()
    torch.testing.assert_close(ours, torch.full_like(ours, 0.5))
