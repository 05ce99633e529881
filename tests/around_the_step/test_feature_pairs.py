"""Everything around the step with everything, in every storage: kernels against the reference."""

import itertools
import math

import pytest
import torch
from helpers import UNIT, bits, truncates_bf16
from pairs import CLOSE, OPTIONS, assert_same, contents
from torch import nn

from adamw_triton import AdamW, launch, storage
from adamw_triton.storage.policies import POLICIES

NORM = {"rtol": 2e-6, "atol": 0.0}  # of two fp32 sums of squares


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
            gradients[0][321] = math.nan
        before = contents(kernel)
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
            assert_same(before, contents(kernel))
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
