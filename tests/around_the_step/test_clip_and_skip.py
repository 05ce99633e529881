"""Clipping and skipping inside the step, against torch's own calls one after the other.

Tolerances:
    CLOSE: fp32 against torch in fp32; the norm's error of 1e-6 is in the gradients' factor, which the update divides
        away again but for eps.
    NORM: of two fp32 sums of squares.
"""

import copy
import math
import pickle

import pytest
import torch
from helpers import Guarded, bits
from pairs import CLOSE, Pair, assert_same, by_hand, contents, differences, norm_options, set_grads
from torch import nn

from adamw_triton import AdamW

NORM = {"rtol": 2e-6, "atol": 0.0}
GROUPS = (
    {"lr": 1e-2, "weight_decay": 0.1},
    {"lr": 3e-3, "weight_decay": 0.0, "maximize": True},
    {"lr": 2e-2, "betas": (0.5, 0.9), "eps": 1e-5},
)
# Of each group: several blocks with a tail, one element, none, two dimensions.
SIZES = (((37, 29), (1,)), ((1025,), (0,), (130,)), ((3, 5, 7),))
INF, NAN = math.inf, math.nan


class Race(Pair):
    """Several groups, odd sizes, views that are not aligned; against `by_hand`."""

    def __init__(self, device, *, seed=3, groups=GROUPS, sizes=SIZES, **options):
        self.generator = torch.Generator().manual_seed(seed)
        self.guard = Guarded()
        self.device = device
        nested = [
            [nn.Parameter(self.guard.place(self.random(size).mul_(0.5), offset=i % 2)) for i, size in enumerate(shapes)]
            for shapes in sizes
        ]
        super().__init__([{**g, "params": p} for g, p in zip(groups, nested, strict=True)], **options)
        self.skipped = 0

    def random(self, size):
        return torch.randn(size, generator=self.generator).to(self.device)

    def choose(self, choices):
        return choices[int(torch.randint(len(choices), (), generator=self.generator))]

    def set_gradients(self, scale=1.0, poison=None, missing=()):
        present = [i for i, p in enumerate(self.ours) if i not in missing and p.numel()]
        victim = self.choose(present)
        gradients = [None if i in missing else self.random(p.shape).mul_(scale) for i, p in enumerate(self.ours)]
        if poison is not None:
            position = int(torch.randint(gradients[victim].numel(), (), generator=self.generator))
            gradients[victim].view(-1)[position] = poison
        set_grads(self.ours, [None if g is None else self.guard.place(g, i % 3) for i, g in enumerate(gradients)])
        set_grads(self.theirs, gradients)

    def step(self):
        """Step both; compare everything that may have changed, and everything that may not."""
        before = contents(self.mine, with_grads=True)
        norm, skipped = by_hand(self.reference, norm_options(self.mine))
        self.mine.step()
        self.skipped += skipped
        self.guard.assert_untouched()
        changed = differences(before, contents(self.mine, with_grads=True))
        assert not any(name.startswith("gradient") for name in changed), "a gradient was written"
        assert not skipped or not changed & before.keys(), "a skipped step has written"
        if self.mine.grad_norm is not None:
            torch.testing.assert_close(self.mine.grad_norm, norm.double(), equal_nan=True, **NORM)
        self.compare()
        return skipped

    def compare(self):
        assert int(self.mine.skipped_steps) == self.skipped
        self.assert_close()
        for p, q in zip(self.ours, self.theirs, strict=True):
            a, b = self.mine.state[p], self.reference.state[q]
            assert float(a.get("step", 0)) == float(b.get("step", 0))
            for name in b.keys() - {"step"}:
                # v is a square: twice the relative error, and no floor that would hide small ones.
                close = {"rtol": 6e-6, "atol": 1e-12} if "sq" in name else CLOSE
                torch.testing.assert_close(a[name], b[name], **close)


# Scale of the gradients, whose norm it multiplies by about 50, and what one element is set to.
KINDS = [(1e-3, None), (1.0, None), (1.0, None), (1e3, None), (1.0, INF), (1e-3, -INF), (1.0, NAN), (1e3, NAN)]


@pytest.mark.fast
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


def test_values_read_are_not_overwritten(device, path):
    """By the next step: whoever collects them in a list, and looks at that later, finds what was read."""
    params = [nn.Parameter(torch.randn(n, device=device)) for n in (5, 300)]
    optimizer = AdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
    read = []
    for value in (1.0, 2.0, math.inf):
        for param in params:
            param.grad = torch.full_like(param, value)
        optimizer.step()
        read.append((optimizer.grad_norm, optimizer.skipped_steps))
    norms, counts = zip(*read, strict=True)
    assert [norm.item() for norm in norms] == pytest.approx([math.sqrt(305), 2 * math.sqrt(305), math.inf])
    assert [count.item() for count in counts] == [0, 0, 1]


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
        limits = norm_options(race.mine)
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
        assert all(map(torch.equal, start, map(bits, race.ours)))
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
    by_hand(race.reference, norm_options(race.mine))
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
    assert_same(plain.mine, infinite.mine)
    assert plain.mine.grad_norm is None and infinite.mine.grad_norm > 0


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
        before = contents(race.mine)
        race.mine.step()
        skipped = bool(found) or ("skip_grad_norm_above" in limits and scale > 1)
        expected += skipped
        assert int(race.mine.skipped_steps) == expected
        if skipped:
            assert_same(before, contents(race.mine))
        else:
            for q, gradient in zip(race.theirs, gradients, strict=True):
                q.grad = gradient
            by_hand(race.reference, norm_options(race.mine))
        torch.testing.assert_close(race.ours, race.theirs, **CLOSE)
    assert expected == (4 if "skip_grad_norm_above" in limits else 3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"])
@pytest.mark.parametrize("stepped", [False, True])
def test_limits_survive_copying(duplicate, stepped, device, path):
    race = Race(device, max_grad_norm=5.0, skip_nonfinite=True, skip_grad_norm_above=1e3)
    if stepped:
        race.set_gradients()
        race.step()
    race.mine.max_grad_norm = 4.0
    other = duplicate(race.mine)
    assert norm_options(other) == norm_options(race.mine) == (4.0, True, 1e3)
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
        assert_same(race.mine, other)
        norm = other.grad_norm.item()
        assert norm == race.mine.grad_norm.item() or poison is not None
    race.set_gradients(5.0, None)
    race.step()
    assert race.mine.grad_norm.item() != norm == other.grad_norm.item(), "each has its own"


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
    assert norm_options(race.mine) == (3.0, True, None)
    for poison in (None, NAN, None):
        race.set_gradients(1.0, poison)
        race.step()
