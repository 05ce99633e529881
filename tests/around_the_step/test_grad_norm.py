"""The global norm of all gradients of a step against float64, and the clipping that follows from it."""

import itertools
import math

import numpy as np
import pytest
import torch
from norms import DOCUMENTED, DTYPES, HARD, INF, NAN, bound_of, hard_values, sum_of_squares
from pairs import assert_same, contents, differences
from torch import nn

from adamw_triton import AdamW

# The ways to get nothing but the norm, and what is usual.
LIMITS = [{"max_grad_norm": 0.5}, {"max_grad_norm": math.inf, "skip_nonfinite": True}, {"skip_grad_norm_above": 1e300}]


def changed(before, optimizer):
    return differences(before, contents(optimizer, with_grads=True))


def assert_norm(optimizer, params, path):
    """The optimizer's norm is that of its parameters' gradients."""
    grads = [p.grad for p in params if p.grad is not None]
    norm = optimizer.grad_norm
    assert norm.dtype == torch.float64 and norm.shape == () and norm.device == params[0].device
    expected = np.sqrt(sum_of_squares(grads))
    assert abs(norm.item() - expected) <= bound_of(path, grads) * expected, (norm.item(), expected)


def params_like(grads):
    params = [nn.Parameter(torch.randn_like(g, memory_format=torch.contiguous_format)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return params


# The norm, from a step


@pytest.mark.parametrize("limits", LIMITS, ids=lambda limits: next(iter(limits)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_one_dtype(dtype, limits, device, path):
    shapes = [(), (1,), (3,), (7, 11), (33, 70), (0,), (5, 0)]
    params = params_like([torch.randn(s, device=device, dtype=dtype) for s in shapes])
    optimizer = AdamW(params, **limits)
    for scale in (1.0, 3.0, 1e-3):
        for p in params:
            p.grad = torch.randn_like(p) * scale
        before = contents(optimizer, with_grads=True)
        optimizer.step()
        assert_norm(optimizer, params, path)
        assert not any(name.startswith("gradient") for name in changed(before, optimizer))
    assert optimizer.skipped_steps.item() == 0


@pytest.mark.parametrize("foreach", [True, False, None])
def test_of_several_dtypes_and_groups(foreach, device, path):
    params = params_like([torch.randn(n, device=device, dtype=dtype) for dtype in DTYPES for n in (1, 37, 2100)])
    groups = [{"params": params[i::3], "lr": 10.0**-i, "maximize": i == 1, "amsgrad": i == 2} for i in range(3)]
    optimizer = AdamW(groups, foreach=foreach, max_grad_norm=1.0)
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = None if i == 3 * step else torch.randn_like(p).mul(10.0 ** (i % 5 - 2))
        optimizer.step()
        assert_norm(optimizer, params, path)


def with_gaps(values):
    """The same values, with NaN between any two of a row and between rows."""
    memory = torch.full((*values.shape[:-1], 2 * values.shape[-1] + 1), NAN, dtype=values.dtype, device=values.device)
    view = memory[..., 1::2]
    return view.copy_(values)


def layouts(device):
    """Pairs of a parameter and its gradient, whose layouts differ from each other's or from the usual."""
    randn = torch.randn
    image = randn(6, 5, 7, 3, device=device)
    yield randn(30, 41, device=device).t(), randn(41, 30, device=device)
    yield randn(30, 41, device=device), randn(41, 30, device=device).t()
    yield image.to(memory_format=torch.channels_last), randn_like_channels_last(image)
    yield image.clone(), randn_like_channels_last(image)
    yield randn_like_channels_last(image), image.clone()
    yield with_gaps(image), image.clone()
    yield with_gaps(image), with_gaps(image)
    yield image.clone(), with_gaps(image)
    yield image.clone(), randn(7, 1, device=device).expand(6, 5, 7, 3)
    yield randn(40, 33, device=device).half(), with_gaps(randn(40, 33, device=device).half())
    yield randn(2001, device=device)[1:], randn(2000, device=device)
    yield randn(2000, device=device), randn(2003, device=device)[3:]
    yield randn(1100, device=device).bfloat16(), randn(1101, device=device).bfloat16()[1:]
    complex_values = randn(20, 31, device=device, dtype=torch.complex64)
    yield complex_values.clone(), complex_values.mul(2).conj()
    yield complex_values.clone(), with_gaps(complex_values)
    yield randn(20, 31, device=device), complex_values.clone().conj().imag  # lazily negated, with gaps
    yield randn(3, 1, device=device), with_gaps(randn(3, 1, device=device))


def randn_like_channels_last(image):
    return torch.randn_like(image).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("foreach", [True, False])
def test_of_any_layout(foreach, device, path):
    pairs = list(layouts(device))
    params = [nn.Parameter(param) for param, _ in pairs]
    optimizer = AdamW(params, foreach=foreach, max_grad_norm=0.5)
    for _ in range(2):
        for p, (_, grad) in zip(params, pairs, strict=True):
            p.grad = grad
        before = contents(optimizer, with_grads=True)
        for _ in range(2):
            optimizer.step()
            assert_norm(optimizer, params, path)
        assert not any(name.startswith("gradient") for name in changed(before, optimizer))
        assert not any(p.isnan().any() for p in params), "a gap took part"
        # Usual ones in between: the plan must notice both ways.
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert_norm(optimizer, params, path)


def test_gradients_with_gaps_change_in_place(device, path):
    """Their copies are made anew at every step."""
    params = [nn.Parameter(torch.randn(9, 30, device=device)) for _ in range(2)]
    for p in params:
        p.grad = with_gaps(torch.randn(9, 30, device=device))
    optimizer = AdamW(params, max_grad_norm=0.5)
    for factor in (1.0, 7.0, 0.01):
        for p in params:
            p.grad.mul_(factor)
        optimizer.step()
        assert_norm(optimizer, params, path)


@pytest.mark.parametrize("name", HARD)
def test_of_values_whose_squares_leave_the_range(name, device, path):
    params = params_like(hard_values(device)[name])
    optimizer = AdamW(params, max_grad_norm=INF, skip_nonfinite=True)
    optimizer.step()
    assert_norm(optimizer, params, path)
    assert optimizer.skipped_steps.item() == 0
    if name.endswith("zeros"):
        assert optimizer.grad_norm.item() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [(INF,), (-INF,), (NAN,), (-INF, NAN)], ids=str)
def test_not_finite_at_random_positions(dtype, bad, device, path):
    """The norm says which, and with skip_nonfinite every byte stays."""
    params = params_like([torch.randn(s, device=device, dtype=dtype) for s in ((5,), (30, 41))])
    optimizer = AdamW(params, lr=0.5, max_grad_norm=1.0, skip_nonfinite=True)
    generator = np.random.default_rng(len(bad) + DTYPES.index(dtype))
    for skips, taken in enumerate((False, True), start=1):  # the first step of all is skipped too
        for p in params:
            p.grad = torch.randn_like(p)
        for value in bad:
            grad = params[generator.integers(2)].grad
            numbers = (torch.view_as_real(grad) if dtype.is_complex else grad).view(-1)
            free = numbers.isfinite().nonzero().flatten()
            numbers[free[generator.integers(len(free))]] = value
        before = contents(optimizer, with_grads=True)
        optimizer.step()
        norm = optimizer.grad_norm.item()
        assert math.isnan(norm) if any(map(math.isnan, bad)) else norm == INF
        after = contents(optimizer, with_grads=True)
        if not taken:  # only state, of zeros, has come
            assert not any(t.any() for p in params for t in optimizer.state[p].values())
            after = {name: after[name] for name in before}
        assert_same(before, after)
        assert {optimizer.state[p]["step"].item() for p in params} == {skips - 1}
        assert optimizer.skipped_steps.item() == skips
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert_norm(optimizer, params, path)
        assert {"parameter 0", "parameter 1"} <= changed(before, optimizer)


def test_none_without_limits(device, path):
    params = params_like([torch.ones(3, device=device)])
    optimizer = AdamW(params)
    optimizer.step()
    assert optimizer.grad_norm is None
    optimizer.skip_nonfinite = True
    optimizer.step()
    assert_norm(optimizer, params, path)


def test_without_any_element(device, path):
    params = params_like([torch.ones(0, device=device), torch.ones(4, 0, device=device, dtype=torch.bfloat16)])
    optimizer = AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == 0
    assert all(optimizer.state[p]["step"].item() == 1 for p in params)


# The same gradients, the same bits


def test_the_same_bits_every_run_wherever_they_lie(device, path):
    """At any address of the same alignment. Where accesses are narrower a compiler may add in another order."""
    grads = [torch.randn(n, device=device, dtype=dtype) for dtype in DTYPES[:4] for n in (5, 9001)]
    params = params_like(grads)
    optimizers = [AdamW(params, lr=0.0, max_grad_norm=1.0, foreach=foreach) for foreach in (True, False)]
    seen = {True: set(), False: set()}
    for run in range(5):
        aligned = run % 2 == 0
        for p, grad in zip(params, grads, strict=True):
            # Elsewhere each time; in every other run where no access is aligned to 16 bytes.
            p.grad = grad.clone() if aligned else torch.cat((grad[:run], grad))[run:]
            assert (p.grad.data_ptr() % 16 == 0) is aligned
        for optimizer in optimizers:
            optimizer.step()
            seen[aligned].add(optimizer.grad_norm.item())
            assert_norm(optimizer, params, path)
    assert [len(norms) for norms in seen.values()] == [1, 1]
    assert seen[True].pop() == pytest.approx(seen[False].pop(), rel=1e-6)


# The clip factor


@pytest.mark.fast
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("scale", [None, 1024.0, 3.0], ids=str)
@pytest.mark.parametrize("max_norm", [1e-3, 0.1, 1, 7.5, 1000, INF])
def test_clips_as_torch_does(max_norm, scale, foreach, device, path):
    """Against clip_grad_norm_ in float64. With beta1 = 0 the new exp_avg is the gradient that was stepped with."""
    shapes = [(17,), (30, 41), (1,)]
    dtypes = [torch.float32, torch.float64, torch.complex64]
    params = params_like([torch.randn(s, device=device, dtype=d) for s, d in itertools.product(shapes, dtypes)])
    optimizer = AdamW(params, betas=(0.0, 0.9), max_grad_norm=max_norm, foreach=foreach)
    if scale is not None:
        optimizer.grad_scale = torch.full((1,), scale, device=device)
    theirs = [torch.zeros_like(p, dtype=torch.complex128 if p.is_complex() else torch.float64) for p in params]
    for p, q in zip(params, theirs, strict=True):
        q.grad = p.grad.to(q.dtype) / (scale or 1.0)
    before = contents(optimizer, with_grads=True)
    optimizer.step()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=bound_of(path, [p.grad for p in params]), atol=0)
    assert not any(name.startswith("gradient") for name in changed(before, optimizer))
    for p, q in zip(params, theirs, strict=True):
        # The norm's error, and one unit of 2^-24 each for the limit and the factor (arguments in fp32) and the product.
        torch.testing.assert_close(
            optimizer.state[p]["exp_avg"].to(q.dtype), q.grad, rtol=DOCUMENTED + 3 * 2**-24, atol=0
        )


def test_limits_change_between_steps(device, path):
    params = params_like([torch.full((4,), 0.5, device=device)])  # norm 1
    optimizer = AdamW(params, betas=(0.0, 0.9), max_grad_norm=0.25)
    for max_norm, expected in ((0.25, 0.125), (0.5, 0.25), (2.0, 0.5), (None, 0.5), (0.25, 0.125)):
        optimizer.max_grad_norm = max_norm
        optimizer.step()
        torch.testing.assert_close(
            optimizer.state[params[0]]["exp_avg"], torch.full((4,), expected, device=device), rtol=3e-6, atol=0
        )
    for above, skipped in ((1.0, 0), (0.75, 1), (None, 1), (1.5, 1), (0.5, 2)):
        optimizer.skip_grad_norm_above = above
        optimizer.step()
        assert optimizer.skipped_steps.item() == skipped
