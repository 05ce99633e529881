"""Clipping and skipping: values that are hard, several dtypes, closures, GradScaler, and what is refused.

Tolerances:
    CLOSE: fp32 against torch in fp32; the norm's error of 1e-6 is in the gradients' factor, which the update divides
        away again but for eps.
    NORM: of two fp32 sums of squares.
    Other dtypes: one rounding of the float64 result to their storage, on top of CLOSE.
"""

import copy
import math

import pytest
import torch
from helpers import UNIT, bits, storage_units
from pairs import CLOSE, OPTIONS, Pair, assert_same, by_hand, contents, differences, norm_options
from torch import nn

from adamw_triton import AdamW

NORM = {"rtol": 2e-6, "atol": 0.0}
INF, NAN = math.inf, math.nan


def test_limits_are_inclusive(device, path):
    """A norm that is a power of two, exactly: not above itself, but above the number before."""
    param = nn.Parameter(torch.zeros(4, device=device))
    optimizer = AdamW([param], lr=0.1, skip_grad_norm_above=8.0)
    param.grad = torch.full_like(param, 4.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == 8.0 and int(optimizer.skipped_steps) == 0 and param.all()
    optimizer.skip_grad_norm_above = 8.0 - 2.0**-20
    before = contents(optimizer)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1
    assert_same(before, optimizer)


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_beyond_fp32_are_neither_infinite_nor_zero(scale, device, path):
    """Where torch's fp32 norm can be infinite: the oracle is the norm in float64."""
    params = [nn.Parameter(torch.randn(n, device=device)) for n in (3, 1025)]
    optimizer = AdamW(params, skip_nonfinite=True, max_grad_norm=0.5)
    for p in params:
        p.grad = torch.randn_like(p).mul_(scale)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    norm = torch.cat([p.grad.double() for p in params]).norm()
    torch.testing.assert_close(optimizer.grad_norm, norm, **NORM)
    assert int(optimizer.skipped_steps) == 0 and not any(map(torch.equal, before, params))
    for p in params:
        clipped = p.grad.double() * min(1.0, 0.5 / (float(norm) + 1e-6))
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), 0.1 * clipped, rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.3])
def test_float64_is_clipped_in_float64(max_grad_norm, device, path):
    """0.3 is no fp32 number."""
    params = [nn.Parameter(torch.randn(n, dtype=torch.float64, device=device)) for n in (3, 1025)]
    pair = Pair(params, max_grad_norm=max_grad_norm, **OPTIONS)
    for _ in range(3):
        pair.set_grads()
        pair.mine.step()
        by_hand(pair.reference, norm_options(pair.mine))
        # A sum of a thousand squares in float64, and some ten operations.
        pair.assert_close(rtol=1e-12, atol=1e-14)
        for p, q in zip(pair.ours, pair.theirs, strict=True):
            for name in ("exp_avg", "exp_avg_sq"):
                state = pair.mine.state[p][name], pair.reference.state[q][name]
                torch.testing.assert_close(*state, rtol=1e-12, atol=1e-14)


MIXED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtypes", [MIXED[:2], MIXED], ids=["fp32 and bf16", "four dtypes"])
@pytest.mark.parametrize("order", [1, -1])
def test_several_dtypes_in_one_model(dtypes, order, device, path):
    """Against torch in float64, which starts every step from our values: one rounding to storage apart.

    torch's own norm of bf16 gradients is a bf16 number, and its bf16 step rounds after every operation.
    """
    generator = torch.Generator().manual_seed(5)
    ours = [
        nn.Parameter(torch.randn(n, generator=generator).to(device, dtype)) for dtype in dtypes for n in (129, 1, 1031)
    ]
    exact = [nn.Parameter(p.detach().double()) for p in ours]
    half = len(ours) // 2
    # A group of each half has parameters of several dtypes, and a dtype parameters of several groups.
    options = ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-2, "maximize": True, "betas": (0.5, 0.9)})
    splits = [
        [{**o, "params": p} for o, p in zip(options, (ps[::2], ps[1::2]), strict=True)]
        for ps in (ours[::order], exact[::order])
    ]
    mine = AdamW(splits[0], max_grad_norm=5.0, skip_nonfinite=True)
    reference = torch.optim.AdamW(splits[1], foreach=False)
    skipped = 0
    for step in range(7):
        victim = half * (step // 2 % 2) + step % half  # of every dtype, early and late
        for i, (p, q) in enumerate(zip(ours, exact, strict=True)):
            # Some steps are below the limit.
            p.grad = torch.randn(p.shape, generator=generator).to(device, p.dtype).mul_(0.01 if step == 2 else 1.0)
            if step in (1, 3, 4) and i == victim:
                p.grad[-1] = (INF, NAN)[step % 2]
            q.grad = p.grad.double().clone()  # `double` copies no float64
            with torch.no_grad():
                q.copy_(p)
                for name in ("exp_avg", "exp_avg_sq") if q in reference.state else ():
                    reference.state[q][name].copy_(mine.state[p][name])
        before = contents(mine, with_grads=True)
        norm, is_skipped = by_hand(reference, norm_options(mine))
        mine.step()
        changed = differences(before, contents(mine, with_grads=True))
        assert not any(name.startswith("gradient") for name in changed)
        assert is_skipped == (step in (1, 3, 4))
        skipped += is_skipped
        assert int(mine.skipped_steps) == skipped
        torch.testing.assert_close(mine.grad_norm, norm, equal_nan=True, **NORM)
        if is_skipped:
            assert not changed & before.keys()
            continue
        for p, q in zip(ours, exact, strict=True):
            assert float(mine.state[p]["step"]) == float(reference.state[q]["step"])
            rtol = storage_units(p.dtype) * UNIT[p.dtype] + CLOSE["rtol"]
            torch.testing.assert_close(p.double(), q, rtol=rtol, atol=CLOSE["atol"])
            for name in ("exp_avg", "exp_avg_sq"):
                value = mine.state[p][name].double()
                torch.testing.assert_close(value, reference.state[q][name], rtol=rtol, atol=CLOSE["atol"])


def test_gradients_that_a_closure_makes(device, path):
    """The norm is of what the closure has left; its loss comes back from a skipped step too."""
    torch.manual_seed(5)
    ours = nn.Sequential(nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 3)).to(device)
    theirs = copy.deepcopy(ours)
    mine = AdamW(ours.parameters(), max_grad_norm=0.1, skip_nonfinite=True, **OPTIONS)
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False, **OPTIONS)
    for step in range(5):
        inputs = torch.randn(6, 9, device=device)
        inputs[2, 3] = NAN if step in (0, 3) else 1.0

        def closure(model, inputs=inputs):
            model.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        before = contents(mine)
        mine_loss = mine.step(lambda: closure(ours))
        their_loss = closure(theirs)
        _, skipped = by_hand(reference, norm_options(mine))
        assert skipped == (step in (0, 3))
        torch.testing.assert_close(mine_loss, their_loss, equal_nan=True, **CLOSE)
        if step == 3:
            assert_same(before, contents(mine))
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), **CLOSE)
    assert int(mine.skipped_steps) == 2


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_grad_scaler_and_clipping_in_one_step(fused, unscale, skip_nonfinite, device, path):
    """`scaler.step` against `scaler.unscale_`, `clip_grad_norm_`, `scaler.step`; overflows now and then."""
    torch.manual_seed(5)
    ours = nn.Sequential(nn.Linear(9, 40), nn.ReLU(), nn.Linear(40, 3)).to(device)
    theirs = copy.deepcopy(ours)
    mine = AdamW(ours.parameters(), fused=fused, max_grad_norm=0.1, skip_nonfinite=skip_nonfinite, **OPTIONS)
    reference = torch.optim.AdamW(theirs.parameters(), foreach=False, **OPTIONS)
    scalers = [torch.amp.GradScaler(device.type, init_scale=2.0**10, growth_interval=2) for _ in range(2)]
    scales = set()
    for step in range(8):
        inputs = torch.randn(6, 9, device=device)
        before = contents(mine)
        for model, scaler in ((ours, scalers[0]), (theirs, scalers[1])):
            model.zero_grad()
            scaler.scale(model(inputs).square().mean()).backward()
            if step in (0, 3, 4):
                model[step % 2 * 2].weight.grad[1, 2] = NAN if step == 4 else INF
        scalers[1].unscale_(reference)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)
        scalers[1].step(reference)
        if unscale:
            scalers[0].unscale_(mine)
        saved = [bits(p.grad) for p in ours.parameters()]
        scalers[0].step(mine)
        if fused or unscale:
            assert all(map(torch.equal, saved, [bits(p.grad) for p in ours.parameters()]))
        if fused or norm.isfinite():
            torch.testing.assert_close(mine.grad_norm, norm.double(), equal_nan=True, **NORM)
        for scaler in scalers:
            scaler.update()
        scales.add(scalers[1].get_scale())
        assert scalers[0].get_scale() == scalers[1].get_scale()
        if step in (3, 4):
            assert_same(before, contents(mine))
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), **CLOSE)
        if fused:  # otherwise the scaler has not called the step
            assert int(mine.skipped_steps) == sum(s <= step for s in (0, 3, 4))
    assert len(scales) > 2, "the scale has both grown and shrunk"
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float(mine.state[p]["step"]) == float(reference.state[q]["step"]) == 5


BAD = [
    *(
        (name, value)
        for name in ("max_grad_norm", "skip_grad_norm_above")
        for value in (0, 0.0, -1.0, -INF, NAN, True, False, torch.tensor(1.0))
    ),
    *(("skip_nonfinite", value) for value in ("yes", 1, 0, None, torch.tensor(True))),
]


@pytest.mark.parametrize(("name", "value"), BAD, ids=str)
def test_bad_limits_are_refused(name, value, device):
    params = [nn.Parameter(torch.ones(3, device=device))]
    with pytest.raises(ValueError, match=name):
        AdamW(params, **{name: value})
    good = {"max_grad_norm": 2.0, "skip_nonfinite": True, "skip_grad_norm_above": 50.0}
    optimizer = AdamW(params, **good)
    with pytest.raises(ValueError, match=name):
        setattr(optimizer, name, value)
    assert {key: getattr(optimizer, key) for key in good} == good


def test_the_optimizer_is_usable_after_a_refusal(device, path):
    params = [nn.Parameter(torch.randn(n, device=device)) for n in (3, 1025)]
    pair = Pair(params, max_grad_norm=5.0, skip_nonfinite=True, **OPTIONS)
    for poison in (1.0, None, NAN, 1.0):
        if poison is None:
            for name, value in BAD:
                with pytest.raises(ValueError, match=name):
                    setattr(pair.mine, name, value)
        pair.set_grads([torch.randn_like(p) * (poison or 1.0) for p in params])
        pair.mine.step()
        by_hand(pair.reference, norm_options(pair.mine))
        pair.assert_close()
    assert int(pair.mine.skipped_steps) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_grad_norm", 1.0), ("skip_nonfinite", True), ("skip_grad_norm_above", 9.0), ("max_grad_norm", None)],
)
def test_a_param_group_has_no_norm_options_its_own(name, value, device, path):
    message = f"{name}={value!r}.*of the whole optimizer"
    params = [nn.Parameter(torch.ones(n, device=device)) for n in (3, 5)]
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": params[:1]}, {"params": params[1:], name: value}])
    optimizer = AdamW(params[:1], lr=0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], name: value})
    assert len(optimizer.param_groups) == 1 and optimizer.max_grad_norm is None
    optimizer.add_param_group({"params": params[1:]})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in params)
