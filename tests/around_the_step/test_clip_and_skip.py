"""Clipping and skipping inside the step, against torch's own calls one after the other.

Tolerances:
    CLOSE: fp32 against torch in fp32, as in test_amp.py: both round each of some ten operations per step; the norm's
        error of 1e-6 is in the gradients' factor, which the update divides away again but for eps.
    NORM: of two fp32 sums of squares.
    Other dtypes: one rounding of the float64 result to their storage, on top of CLOSE.
"""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers import UNIT, Guarded, bits, storage_units, truncates_bf16
from torch import nn

from adamw_triton import AdamW, launch, storage
from bench.policies import POLICIES

CLOSE = {"rtol": 3e-6, "atol": 3e-7}
NORM = {"rtol": 2e-6, "atol": 0.0}
OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
GROUPS = (
    {"lr": 1e-2, "weight_decay": 0.1},
    {"lr": 3e-3, "weight_decay": 0.0, "maximize": True},
    {"lr": 2e-2, "betas": (0.5, 0.9), "eps": 1e-5},
)
# Of each group: several blocks with a tail, one element, none, two dimensions.
SIZES = (((37, 29), (1,)), ((1025,), (0,), (130,)), ((3, 5, 7),))
INF, NAN = math.inf, math.nan


def limits_of(optimizer):
    return optimizer.max_grad_norm, optimizer.skip_nonfinite, optimizer.skip_grad_norm_above


def by_hand(reference, limits):
    """What a training loop does with torch alone. Returns the norm, and whether the step was skipped."""
    max_grad_norm, skip_nonfinite, skip_above = limits
    params = [p for group in reference.param_groups for p in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
    if (skip_nonfinite or skip_above is not None) and not norm.isfinite():
        return norm, True
    if skip_above is not None and norm > skip_above:
        return norm, True
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(params, max_grad_norm)
    reference.step()
    return norm, False


def everything(optimizer):
    """Bytes of all parameters and of all their state."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [bits(t) for p in params for t in (p, *(v for _, v in sorted(optimizer.state[p].items())))]


def same(before, after):
    return len(before) == len(after) and all(map(torch.equal, before, after))


class Race:
    """Our optimizer, and torch's on copies; several groups, odd sizes, views that are not aligned."""

    def __init__(self, device, *, seed=3, groups=GROUPS, sizes=SIZES, **options):
        self.generator = torch.Generator().manual_seed(seed)
        self.guard = Guarded()
        self.device = device
        self.params = [
            [nn.Parameter(self.guard.place(self.random(size).mul_(0.5), offset=i % 2)) for i, size in enumerate(shapes)]
            for shapes in sizes
        ]
        copies = [[nn.Parameter(p.detach().clone()) for p in params] for params in self.params]
        self.ours, self.theirs = (list(itertools.chain(*nested)) for nested in (self.params, copies))
        self.mine = AdamW([{**g, "params": p} for g, p in zip(groups, self.params, strict=True)], **options)
        plain = {name: options[name] for name in ("amsgrad",) if name in options}
        self.reference = torch.optim.AdamW(
            [{**g, "params": p} for g, p in zip(groups, copies, strict=True)], foreach=False, **plain
        )
        self.skipped = 0

    def random(self, size):
        return torch.randn(size, generator=self.generator).to(self.device)

    def choose(self, choices):
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def set_gradients(self, scale=1.0, poison=None, missing=()):
        present = [i for i, p in enumerate(self.ours) if i not in missing and p.numel()]
        victim = self.choose(present)
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            p.grad = q.grad = None
            if i in missing:
                continue
            gradient = self.random(p.shape).mul_(scale)
            if poison is not None and i == victim:
                position = int(torch.randint(p.numel(), (), generator=self.generator))
                gradient.view(-1)[position] = poison
            p.grad = self.guard.place(gradient, offset=i % 3)
            q.grad = gradient.clone()

    def step(self):
        """Step both; compare everything that may have changed, and everything that may not."""
        gradients = [None if p.grad is None else bits(p.grad) for p in self.ours]
        before = everything(self.mine)
        norm, skipped = by_hand(self.reference, limits_of(self.mine))
        self.mine.step()
        self.skipped += skipped
        for p, saved in zip(self.ours, gradients, strict=True):
            assert (p.grad is None) if saved is None else torch.equal(bits(p.grad), saved), "a gradient was written"
        self.guard.assert_untouched()
        if skipped and before and len(before) == len(everything(self.mine)):
            assert same(before, everything(self.mine)), "a skipped step has written"
        if self.mine.grad_norm is not None:
            torch.testing.assert_close(self.mine.grad_norm, norm.double(), equal_nan=True, **NORM)
        self.compare()
        return skipped

    def compare(self):
        assert int(self.mine.skipped_steps) == self.skipped
        torch.testing.assert_close(self.ours, self.theirs, **CLOSE)
        for p, q in zip(self.ours, self.theirs, strict=True):
            a, b = self.mine.state[p], self.reference.state[q]
            assert float(a.get("step", 0)) == float(b.get("step", 0))
            for name in b.keys() - {"step"}:
                # v is a square: twice the relative error, and no floor that would hide small ones.
                close = {"rtol": 6e-6, "atol": 1e-12} if "sq" in name else CLOSE
                torch.testing.assert_close(a[name], b[name], **close)


# Scale of the gradients, whose norm it multiplies by about 50, and what one element is set to.
KINDS = [(1e-3, None), (1.0, None), (1.0, None), (1e3, None), (1.0, INF), (1e-3, -INF), (1.0, NAN), (1e3, NAN)]


@pytest.mark.parametrize("foreach", [True, False, None])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_clipping_and_skipping_as_by_hand(foreach, amsgrad, device, path):
    """All kinds of steps in a random order, each twice; the first is skipped or not by chance."""
    race = Race(
        device,
        seed=10 * amsgrad + (foreach is None),
        foreach=foreach,
        amsgrad=amsgrad,
        max_grad_norm=5.0,
        skip_nonfinite=True,
        skip_grad_norm_above=1e3,
    )
    skipped = []
    for index in torch.randperm(len(KINDS), generator=race.generator).tolist():
        scale, poison = KINDS[index]
        race.set_gradients(scale, poison)
        skipped.append(race.step())
    assert sum(skipped) == 5


@pytest.mark.parametrize("options", [{"skip_nonfinite": True}, {"skip_grad_norm_above": 1e3}, {"max_grad_norm": 5.0}])
def test_each_limit_alone(options, device, path):
    race = Race(device, **options)
    for scale, poison in KINDS:
        if poison is None or "max_grad_norm" not in options:
            race.set_gradients(scale, poison)
            race.step()
    assert race.skipped == {"skip_nonfinite": 4, "skip_grad_norm_above": 5, "max_grad_norm": 0}[next(iter(options))]


def test_limits_change_between_steps(device, path):
    """Through the attributes, between None and numbers; what is asked for at a step is what it does."""
    race = Race(device)
    choices = {
        "max_grad_norm": (None, 1, 5.0, INF),
        "skip_nonfinite": (False, True),
        "skip_grad_norm_above": (None, 30.0, 1e3, INF),
    }
    seen = set()
    for _ in range(14):
        for name, values in choices.items():
            setattr(race.mine, name, race.choose(values))
        limits = limits_of(race.mine)
        seen.add(limits)
        skips = limits[1] or limits[2] is not None
        race.set_gradients(race.choose((1e-3, 1.0, 1e3)), race.choose((None, INF, NAN)) if skips else None)
        race.step()
        assert (race.mine.grad_norm is None) == (limits == (None, False, None))
    assert len(seen) > 8 and 0 < race.skipped < 14, "the seed makes a test of this"


def test_parameters_without_gradients_take_no_part(device, path):
    race = Race(device, max_grad_norm=5.0, skip_nonfinite=True)
    for _ in range(7):
        missing = [i for i in range(len(race.ours)) if race.choose((True, False))]
        race.set_gradients(1.0, race.choose((None, None, NAN)), missing[:5])
        race.step()
    assert 0 < race.skipped < 7
    for p in (*race.ours, *race.theirs):
        p.grad = None
    race.mine.step()
    race.reference.step()
    race.compare()


def test_the_first_steps_skipped(device, path):
    """Counted as none: the first that is taken is number 1."""
    race = Race(device, max_grad_norm=5.0, skip_nonfinite=True)
    start = [bits(p) for p in race.ours]
    for poison in (NAN, INF):
        race.set_gradients(1.0, poison)
        race.step()
        assert same(start, [bits(p) for p in race.ours])
        for p in race.ours:
            assert not any(value.any() for value in race.mine.state[p].values())
    race.set_gradients()
    race.step()
    assert {float(race.mine.state[p]["step"]) for p in race.ours} == {1.0}


def test_gradients_with_gaps(device, path):
    """Slices, transposed and expanded ones: what lies between their elements is in no norm."""
    race = Race(device, max_grad_norm=5.0, skip_nonfinite=True)
    for poison in (None, NAN, None):
        race.set_gradients(1.0, poison)
        for p, q in zip(race.ours, race.theirs, strict=True):
            wide = torch.full((*p.shape, 2), NAN, device=device)
            wide[..., 0] = p.grad
            p.grad = wide[..., 0]
            if p.shape == (130,):
                p.grad = torch.full((1,), 0.5, device=device).expand(130)
                q.grad = torch.full_like(q, 0.5)
            elif p.shape == (37, 29):
                p.grad = q.grad.t().contiguous().t()
        race.step()


@pytest.mark.parametrize("poison", [INF, -INF, NAN])
@pytest.mark.parametrize("max_grad_norm", [5.0, INF])
def test_without_skipping_poison_spreads_as_torch_spreads_it(poison, max_grad_norm, device, path):
    race = Race(device, max_grad_norm=max_grad_norm)
    race.set_gradients()
    race.step()
    race.set_gradients(1.0, poison)
    by_hand(race.reference, limits_of(race.mine))
    race.mine.step()
    spoilt = [q.isnan().sum() for q in race.theirs]
    assert sum(spoilt) == (1 if max_grad_norm == 5.0 and poison == poison else sum(p.numel() for p in race.ours))
    torch.testing.assert_close(race.ours, race.theirs, equal_nan=True, **CLOSE)
    assert int(race.mine.skipped_steps) == 0


@pytest.mark.parametrize("foreach", [True, False])
def test_max_grad_norm_of_infinity_changes_no_bit(foreach, device, path):
    plain, infinite = (Race(device, foreach=foreach, max_grad_norm=limit) for limit in (None, INF))
    for race in (plain, infinite):
        for scale in (1.0, 1e3, 1e-3):
            race.set_gradients(scale)
            race.step()
    assert same(everything(plain.mine), everything(infinite.mine))
    assert plain.mine.grad_norm is None and infinite.mine.grad_norm > 0


def test_limits_are_inclusive(device, path):
    """A norm that is a power of two, exactly: not above itself, but above the number before."""
    param = nn.Parameter(torch.zeros(4, device=device))
    optimizer = AdamW([param], lr=0.1, skip_grad_norm_above=8.0)
    param.grad = torch.full_like(param, 4.0)
    optimizer.step()
    assert float(optimizer.grad_norm) == 8.0 and int(optimizer.skipped_steps) == 0 and param.all()
    optimizer.skip_grad_norm_above = 8.0 - 2.0**-20
    before = everything(optimizer)
    optimizer.step()
    assert int(optimizer.skipped_steps) == 1 and same(before, everything(optimizer))


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_squares_beyond_fp32_are_neither_infinite_nor_zero(scale, device, path):
    """Where torch's fp32 norm can be infinite: the oracle is the norm in float64."""
    params = [nn.Parameter(torch.randn(n, device=device)) for n in (3, 1025)]
    optimizer = AdamW(params, skip_nonfinite=True, max_grad_norm=0.5)
    for p in params:
        p.grad = torch.randn_like(p).mul_(scale)
    before = everything(optimizer)
    optimizer.step()
    norm = torch.cat([p.grad.double() for p in params]).norm()
    torch.testing.assert_close(optimizer.grad_norm, norm, **NORM)
    assert int(optimizer.skipped_steps) == 0 and not same(before, everything(optimizer)[:2])
    for p in params:
        clipped = p.grad.double() * min(1.0, 0.5 / (float(norm) + 1e-6))
        torch.testing.assert_close(optimizer.state[p]["exp_avg"].double(), 0.1 * clipped, rtol=3e-6, atol=0.0)


@pytest.mark.parametrize("max_grad_norm", [0.5, 0.3])
def test_float64_is_clipped_in_float64(max_grad_norm, device, path):
    """0.3 is no fp32 number."""
    ours = [nn.Parameter(torch.randn(n, dtype=torch.float64, device=device)) for n in (3, 1025)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = AdamW(ours, max_grad_norm=max_grad_norm, **OPTIONS)
    reference = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        by_hand(reference, limits_of(mine))
        for p, q in zip(ours, theirs, strict=True):
            # A sum of a thousand squares in float64, and some ten operations.
            for a, b in ((p, q), *((mine.state[p][k], reference.state[q][k]) for k in ("exp_avg", "exp_avg_sq"))):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


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
        saved = [bits(p.grad) for p in ours]
        before = everything(mine)
        norm, is_skipped = by_hand(reference, limits_of(mine))
        mine.step()
        assert same(saved, [bits(p.grad) for p in ours])
        assert is_skipped == (step in (1, 3, 4))
        skipped += is_skipped
        assert int(mine.skipped_steps) == skipped
        torch.testing.assert_close(mine.grad_norm, norm, equal_nan=True, **NORM)
        if is_skipped:
            assert same(before, everything(mine))
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

        before = everything(mine)
        mine_loss = mine.step(lambda: closure(ours))
        their_loss = closure(theirs)
        _, skipped = by_hand(reference, limits_of(mine))
        assert skipped == (step in (0, 3))
        torch.testing.assert_close(mine_loss, their_loss, equal_nan=True, **CLOSE)
        if step == 3:
            assert same(before, everything(mine))
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
        before = everything(mine)
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
            assert same(saved, [bits(p.grad) for p in ours.parameters()])
        if fused or norm.isfinite():
            torch.testing.assert_close(mine.grad_norm, norm.double(), equal_nan=True, **NORM)
        for scaler in scalers:
            scaler.update()
        scales.add(scalers[1].get_scale())
        assert scalers[0].get_scale() == scalers[1].get_scale()
        if step in (3, 4):
            assert same(before, everything(mine))
        torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), **CLOSE)
        if fused:  # otherwise the scaler has not called the step
            assert int(mine.skipped_steps) == sum(s <= step for s in (0, 3, 4))
    assert len(scales) > 2, "the scale has both grown and shrunk"
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert float(mine.state[p]["step"]) == float(reference.state[q]["step"]) == 5


@pytest.mark.parametrize("limits", [{}, {"max_grad_norm": 5.0}, {"skip_grad_norm_above": 1e3}], ids=str)
def test_skipped_steps_counts_every_reason_once(limits, device, path):
    """found_inf, the norm, and both of them in one step."""
    race = Race(device, **limits)
    race.mine.grad_scale = torch.full((1,), 4.0, device=device)
    race.mine.found_inf = torch.zeros((), device=device)
    expected = 0
    for found, scale in ((0, 1.0), (1, 1.0), (0, 1e3), (1, 1e3), (1, 1.0), (0, 1.0)):
        race.mine.found_inf.fill_(found)
        race.set_gradients(scale)
        gradients = [p.grad.clone() for p in race.ours]
        for p in race.ours:
            p.grad.mul_(4)
        before = everything(race.mine)
        race.mine.step()
        skipped = bool(found) or ("skip_grad_norm_above" in limits and scale > 1)
        expected += skipped
        assert int(race.mine.skipped_steps) == expected
        if skipped:
            assert same(before, everything(race.mine))
        else:
            for q, gradient in zip(race.theirs, gradients, strict=True):
                q.grad = gradient
            by_hand(race.reference, limits_of(race.mine))
        torch.testing.assert_close(race.ours, race.theirs, **CLOSE)
    assert expected == (4 if "skip_grad_norm_above" in limits else 3)


# The attributes


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
    race = Race(device, max_grad_norm=5.0, skip_nonfinite=True)
    race.set_gradients()
    race.step()
    for name, value in BAD:
        with pytest.raises(ValueError, match=name):
            setattr(race.mine, name, value)
    for poison in (None, NAN, None):
        race.set_gradients(1.0, poison)
        race.step()
    assert race.skipped == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_grad_norm", 1.0), ("skip_nonfinite", True), ("skip_grad_norm_above", 9.0), ("max_grad_norm", None)],
)
def test_a_param_group_has_no_limits_of_its_own(name, value, device, path):
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


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@pytest.mark.parametrize("stepped", [False, True])
def test_limits_survive_copying(duplicate, stepped, device, path):
    race = Race(device, max_grad_norm=5.0, skip_nonfinite=True, skip_grad_norm_above=1e3)
    if stepped:
        race.set_gradients()
        race.step()
    race.mine.max_grad_norm = 4.0
    other = duplicate(race.mine)
    assert limits_of(other) == limits_of(race.mine) == (4.0, True, 1e3)
    copies = [p for group in other.param_groups for p in group["params"]]
    other.max_grad_norm = 3.0
    assert race.mine.max_grad_norm == 4.0, "they are two"
    other.max_grad_norm = 4.0
    for scale, poison in ((1.0, None), (1.0, NAN), (1e3, None), (1e-3, None)):
        race.set_gradients(scale, poison)
        for p, q in zip(race.ours, copies, strict=True):
            q.grad = p.grad.clone()
        race.step()
        other.step()
        assert same(everything(race.mine), everything(other))
        assert other.grad_norm.data_ptr() != race.mine.grad_norm.data_ptr()


def test_checkpoints_are_torchs(device, path):
    """Limits are not in them: torch loads them, and those of the optimizer that loads stay."""
    limits = {"max_grad_norm": 5.0, "skip_nonfinite": True, "skip_grad_norm_above": 1e3}
    race = Race(device, **limits)
    for poison in (NAN, None, INF, None):
        race.set_gradients(1.0, poison)
        race.step()
    saved = race.mine.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert all(not (group.keys() & limits.keys()) for group in saved["param_groups"])
    race.reference.load_state_dict(copy.deepcopy(saved))
    race.set_gradients()
    race.step()
    race.mine.max_grad_norm, race.mine.skip_grad_norm_above = 3.0, None
    race.mine.load_state_dict(copy.deepcopy(race.reference.state_dict()))
    assert limits_of(race.mine) == (3.0, True, None)
    for poison in (None, NAN, None):
        race.set_gradients(1.0, poison)
        race.step()


# Everything with everything


FEATURES = {
    "max_grad_norm": {"max_grad_norm": 5.0},
    "skip_nonfinite": {"skip_nonfinite": True},
    "skip_grad_norm_above": {"skip_grad_norm_above": 1e3},
    "scaler": {"fused": True},  # and the attributes that GradScaler sets
    "capturable": {"capturable": True},
    "statistics": {"statistics": True},
    "cautious": {"cautious": True},
    "decouple_lr": {"decouple_lr": True},
    "maximize": {"maximize": True},
    "foreach": {"foreach": False},
}
SKIPPING = {"skip_nonfinite", "skip_grad_norm_above", "scaler"}
PAIRS = list(itertools.combinations(FEATURES, 2))


def cases():
    """Every pair of features, and every feature with every policy: first all pairs, then what they leave out."""
    found, uncovered = [], set(itertools.product(FEATURES, (policy.name for policy in POLICIES)))
    used = dict.fromkeys((policy.name for policy in POLICIES), 0)

    def add(pair, policy):
        found.append((pair, policy))
        uncovered.difference_update((feature, policy.name) for feature in pair)
        used[policy.name] += 1

    def gain(pair, policy):
        return sum((feature, policy.name) in uncovered for feature in pair), -used[policy.name]

    for pair in PAIRS:
        add(pair, max(POLICIES, key=lambda policy: gain(pair, policy)))
    while uncovered:
        add(*max(itertools.product(PAIRS, POLICIES), key=lambda case: gain(*case)))
    return found


CASES = cases()


def test_cases_are_pairwise():
    assert {pair for pair, _ in CASES} == set(PAIRS) and len(PAIRS) == 45
    assert {(f, policy.name) for pair, policy in CASES for f in pair} == {
        (f, p.name) for f in FEATURES for p in POLICIES
    }
    assert len(CASES) < 90


@pytest.mark.parametrize(("pair", "policy"), CASES, ids=[f"{'+'.join(pair)}-{policy.name}" for pair, policy in CASES])
def test_kernels_agree_with_the_reference(pair, policy, device, monkeypatch):
    """Step by step from the same values, so that what a step may differ in is one rounding."""
    options = {**OPTIONS, **policy.options}
    for feature in pair:
        options.update(FEATURES[feature])
    generator = torch.Generator().manual_seed(7)
    start = [torch.randn(n, generator=generator).to(device, policy.param) for n in (700, 129)]
    models = [[nn.Parameter(value.clone()) for value in start] for _ in range(2)]
    kernel, reference = optimizers = [AdamW(params, **options) for params in models]
    skips = bool(SKIPPING & set(pair))
    for step in range(3):
        poisoned = skips and step == 1
        gradients = [torch.randn(p.shape, generator=generator).to(device, policy.grad) for p in start]
        if "scaler" in pair:
            gradients = [g * 4 for g in gradients]
        if poisoned:
            gradients[0][321] = NAN
        before = everything(kernel)
        for optimizer, params in zip(optimizers, models, strict=True):
            optimizer.param_groups[0]["lr"] = OPTIONS["lr"] / (step + 1)
            if "scaler" in pair:
                optimizer.grad_scale = torch.full((1,), 4.0, device=device)
                optimizer.found_inf = torch.full((1,), float(poisoned), device=device)
            for p, g in zip(params, gradients, strict=True):
                if policy.grad != policy.param:
                    p.grad_dtype = None
                p.grad = g.clone()
        kernel.step()
        with monkeypatch.context() as patch:
            patch.setattr(launch, "has_kernels", lambda device: False)
            reference.step()
        for params in models:
            assert all(torch.equal(bits(p.grad), bits(g)) for p, g in zip(params, gradients, strict=True))
        if poisoned:
            assert same(before, everything(kernel))
        assert int(kernel.skipped_steps) == int(reference.skipped_steps) == int(skips and step >= 1)
        compare_and_align(kernel, reference, models, policy)
        norms = [o.grad_norm for o in optimizers]
        assert (norms[0] is None) == (not {"max_grad_norm", "skip_nonfinite", "skip_grad_norm_above"} & set(pair))
        if norms[0] is not None:
            torch.testing.assert_close(*norms, equal_nan=True, **NORM)
            exact = torch.cat([g.double() for g in gradients]).norm() / (4 if "scaler" in pair else 1)
            torch.testing.assert_close(norms[0], exact, equal_nan=True, **NORM)
        if "statistics" in pair:
            for name in ("update_norm", "param_norm"):
                # A change of 1e-2 is the difference of weights of about 1, whose last bit is 6e-8.
                torch.testing.assert_close(getattr(kernel, name), getattr(reference, name), rtol=2e-5, atol=0.0)


def compare_and_align(kernel, reference, models, policy):
    """Compare parameters and state, then give those of the kernel to the reference, in place."""
    for p, q in zip(*models, strict=True):
        ours, theirs = kernel.state[p], reference.state[q]
        assert ours.keys() == theirs.keys()
        assert float(ours["step"]) == float(theirs["step"])
        for name, a, b in (("param", p, q), *((name, ours[name], theirs[name]) for name in ours)):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            if name in ("step", "param_remainder"):
                continue
            if not a.is_floating_point():
                apart = (a.long() - b.long()).abs()  # by ties
                assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01, name
                continue
            # Storage is 1 ulp apart at most, which is 2 units of roundoff.
            rtol = 2 * UNIT[a.dtype] if a.dtype in (torch.bfloat16, torch.float16) else CLOSE["rtol"]
            torch.testing.assert_close(
                a, b, rtol=rtol, atol=CLOSE["atol"], msg=lambda text, name=name: f"{name}: {text}"
            )
            truncated = (
                a.dtype == torch.bfloat16
                and truncates_bf16()
                and not policy.stochastic_rounding
                and (policy.master_weight_bits is None or name != "param")
            )
            if a.dtype in (torch.bfloat16, torch.float16) and not truncated:
                assert (a != b).float().mean() < 0.02, f"{name}: more than ties differ"
    for a, b in zip(kernel.master_params(), reference.master_params(), strict=True):
        if policy.master_weight_bits is not None:
            # A master weight of 24 bits has 16 bits of mantissa.
            rtol = 2.0**-15 if policy.master_weight_bits == 24 else CLOSE["rtol"]
            torch.testing.assert_close(a, b, rtol=rtol, atol=CLOSE["atol"])
    with torch.no_grad():
        for p, q in zip(*models, strict=True):
            q.copy_(p)
            for name, value in kernel.state[p].items():
                if name != "step":
                    reference.state[q][name].copy_(value)


def test_storage_of_the_reference_is_compared_decoded():
    """What the comparison above relies on: codes that are one apart are neighbours in value."""
    codes = torch.arange(-127, 127, dtype=torch.int8)
    values = [storage.decode("exp_avg", c, torch.ones(2)) for c in (codes, codes + 1)]
    assert ((values[1] - values[0]) <= 2 / 127).all() and (values[1] > values[0]).all()


# What the host does


def several(device, n_groups, **options):
    params = [nn.Parameter(torch.randn(40, 30, device=device)) for _ in range(max(n_groups, 3))]
    groups = [{"params": [p], "lr": 10.0 ** -(1 + i % 5)} for i, p in enumerate(params)]
    optimizer = AdamW(groups if n_groups > 1 else params, betas=(0.8, 0.95), **options)
    for p in params:
        p.grad = torch.randn_like(p)
    return params, optimizer


READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "__array__")
ALL = {"max_grad_norm": 5.0, "skip_nonfinite": True, "skip_grad_norm_above": 1e3, "statistics": True}


@pytest.mark.parametrize("n_groups", [1, 4])
@pytest.mark.parametrize("capturable", [False, True], ids=["host", "capturable"])
@pytest.mark.parametrize("scaler", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 5.0}, {"max_grad_norm": 5.0, "statistics": True}, {"skip_nonfinite": True}, ALL],
    ids=lambda options: "+".join(options) or "plain",
)
def test_no_step_reads_a_tensor_on_the_host(options, scaler, capturable, n_groups, device, monkeypatch):
    """Once a plan stands: that would be a synchronisation on a GPU. Nor does looking at the results."""
    params, optimizer = several(device, n_groups, capturable=capturable, fused=scaler, **options)
    if capturable:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(1e-3, device=device)
    if scaler:
        optimizer.found_inf = torch.zeros(1, device=device)
        optimizer.grad_scale = torch.full((1,), 4.0, device=device)
    optimizer.step()
    plan = optimizer._plan
    calls = []

    def fail(self, *args, **kwargs):
        raise AssertionError("a tensor was read on the host")

    with monkeypatch.context() as patch:
        for name in ("launch_table", "launch_scalars", "launch_norms"):
            patch.setattr(launch, name, lambda *args, name=name, **kwargs: calls.append(name))
        for name in READS:
            patch.setattr(torch.Tensor, name, fail)
        patch.setattr(torch.cuda, "synchronize", fail)
        for step in range(3):
            for p in params:  # gradients elsewhere, and another learning rate
                p.grad = p.grad.clone()
            for group in optimizer.param_groups:
                if capturable:
                    group["lr"].mul_(0.5)
                else:
                    group["lr"] = 1e-3 / (step + 1)
            optimizer.step()
            _ = optimizer.grad_norm, optimizer.skipped_steps, optimizer.update_norm, optimizer.param_norm
    assert optimizer._plan is plan
    need_norm = options.keys() & {"max_grad_norm", "skip_nonfinite"}
    on_device = capturable or scaler or "skip_nonfinite" in options
    expected = [*["launch_norms"] * bool(need_norm), *["launch_scalars"] * on_device, "launch_table"]
    assert calls == expected * 3


UPDATE, NORMS, SCALARS = "adamw_table_kernel", "grad_norm_kernel", "scalars_kernel"


@pytest.mark.parametrize("n_groups", [1, 20])
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [UPDATE]),
        ({"max_grad_norm": 5.0}, [NORMS, UPDATE]),
        ({"capturable": True}, [SCALARS, UPDATE]),
        ({"capturable": True, "max_grad_norm": 5.0}, [NORMS, SCALARS, UPDATE]),
        ({"skip_nonfinite": True}, [NORMS, SCALARS, UPDATE]),
        ({"statistics": True}, [UPDATE]),
        ({"capturable": True, **ALL}, [NORMS, SCALARS, UPDATE]),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_launches_of_a_step(options, expected, n_groups, device, launches):
    """As many for 20 groups, with learning rates of their own, as for one."""
    _, optimizer = several(device, n_groups, **options)
    for _ in range(2):  # the step that makes the plan, and one that has it
        launches.clear()
        optimizer.step()
        assert [name for name, _ in launches] == expected


def test_launches_with_grad_scaler(device, launches):
    """The scaler's verdict costs the launch that counts; the norm one more."""
    for options, expected in (({}, [SCALARS, UPDATE]), ({"max_grad_norm": 5.0}, [NORMS, SCALARS, UPDATE])):
        _, optimizer = several(device, 3, fused=True, **options)
        optimizer.found_inf = torch.zeros(1, device=device)
        optimizer.grad_scale = torch.full((1,), 4.0, device=device)
        launches.clear()
        optimizer.step()
        assert [name for name, _ in launches] == expected
