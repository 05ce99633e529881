"""The global norm of all gradients against float64, and what is decided from it: clipping, skipping, nothing else.

Bounds, relative to the norm:

    kernel, fp32 / bf16 / fp16 gradients   8e-7: what kernels/grad_norm.py documents
    kernel, fp64 gradients; the reference  1e-14: at most 40 roundings of 2^-53 from an element to the sum, and more
"""

import itertools
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import Guarded, bits, exact
from torch import nn

from adamw_triton import AdamW, launch, reference
from adamw_triton.control import Control, Scaling

DOCUMENTED = 8e-7
DOUBLE = 1e-14
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]
# The two ways to get nothing but the norm, and what is usual.
LIMITS = [{"max_grad_norm": 0.5}, {"max_grad_norm": math.inf, "skip_nonfinite": True}, {"skip_grad_norm_above": 1e300}]
INF, NAN = math.inf, math.nan


def real(tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sum_of_squares(grads):
    return sum((np.square(exact(real(g))).sum() for g in grads), np.longdouble(0))


def bound_of(path, grads):
    return DOUBLE if path == "reference" or all(g.dtype.to_real() == torch.float64 for g in grads) else DOCUMENTED


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


def saved(tensors):
    """Copies of their bytes, which `bits` alone are not."""
    return [bits(t).clone() for t in tensors]


def everything(params, optimizer):
    """Parameters, gradients and state."""
    return [*params, *(p.grad for p in params), *(t for p in params for t in optimizer.state[p].values())]


def assert_same(before, tensors):
    after = list(map(bits, tensors))
    assert len(before) == len(after) and all(map(torch.equal, before, after))


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
        before = saved(p.grad for p in params)
        optimizer.step()
        assert_norm(optimizer, params, path)
        assert_same(before, [p.grad for p in params])
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
        before = saved(p.grad for p in params)
        for _ in range(2):
            optimizer.step()
            assert_norm(optimizer, params, path)
        assert_same(before, [p.grad for p in params])
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


def hard_values(device):
    """Where squares in fp32 under- or overflow, or nearly; by name."""
    randn = torch.randn(1500, device=device)
    sign = randn.sign()
    mixed = torch.where(randn > 0.3, 1e30, 1e-30)
    needle = randn * 1e-3
    needle[777] = 1e25
    info = torch.finfo
    cases = {
        "zeros": [randn * 0, (randn * 0).bfloat16()],
        "negative zeros": [randn * 0 * -1],
        "denormals": [randn * 1e-40],
        # The interpreter reads bf16 denormals as 0.
        "smallest": [sign * 2.0**-149, sign.bfloat16() * 2.0 ** (-126 if launch.INTERPRETED else -133)],
        "smallest fp16": [sign.half() * 2.0**-24],
        "one denormal": [torch.zeros(1, device=device) + 1e-40],
        "1e-30": [randn * 1e-30],
        "1e-25": [randn * 1e-25],
        "denormal squares": [randn * 3e-22, (randn * 3e-22).bfloat16()],
        "smallest normal squares": [randn * 1e-18],
        "1e30": [randn * 1e30],
        "1e30 bf16": [randn.bfloat16() * 1e30],
        "largest": [sign * info(torch.float32).max, sign.bfloat16() * info(torch.bfloat16).max],
        "largest fp16": [sign.half() * info(torch.float16).max],
        "mixed in a tensor": [mixed * sign, mixed.bfloat16()],
        "mixed over tensors": [randn * 1e-30, randn * 1e30, randn * 1e-40, randn],
        "denormals and largest": [torch.where(randn > 0, 1e-40, 3e38)],
        "needle": [needle],
        "fp64": [randn.double() * 1e100, randn.double() * 1e99],
        "small fp64": [randn.double() * 1e-100],
        "fp64 and fp32": [randn.double() * 1e35, randn * 1e36],
        "complex": [torch.complex(randn * 1e30, randn.flip(0) * 1e-30), torch.complex(randn * 1e30, randn * 2e30)],
    }
    # Around the sums below and above which a span is summed a second time, scaled.
    for exponent in (-46, -45, -44, -40, 57, 58, 59, 63, 64):
        cases[f"around 2^{exponent}"] = [sign * 2.0**exponent, (sign * (1 - 2.0**-24) * 2.0**exponent)[:16]]
    return cases


HARD = list(hard_values(torch.device("cpu")))


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
        before = saved(everything(params, optimizer))
        optimizer.step()
        norm = optimizer.grad_norm.item()
        assert math.isnan(norm) if any(map(math.isnan, bad)) else norm == INF
        if taken:
            assert_same(before, everything(params, optimizer))
        else:  # only state, of zeros, has come
            assert_same(before, everything(params, optimizer)[: len(before)])
            assert not any(t.any() for p in params for t in optimizer.state[p].values())
        assert {optimizer.state[p]["step"].item() for p in params} == {skips - 1}
        assert optimizer.skipped_steps.item() == skips
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert_norm(optimizer, params, path)
        assert not any(map(torch.equal, before, map(bits, params)))


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
    grads = [torch.randn(n, device=device, dtype=dtype) for dtype in DTYPES[:4] for n in (5, 9001)]
    params = params_like(grads)
    optimizers = [AdamW(params, lr=0.0, max_grad_norm=1.0, foreach=foreach) for foreach in (True, False)]
    seen = set()
    for run in range(3):
        for optimizer in optimizers:
            optimizer.step()
            seen.add(optimizer.grad_norm.item())
        for p, grad in zip(params, grads, strict=True):
            # Elsewhere, and in the last run where no access is aligned to 16 bytes.
            p.grad = torch.cat((grad[:1], grad))[1:] if run == 1 else grad.clone()
    assert_norm(optimizers[0], params, path)
    assert len(seen) == 1


# The clip factor


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
    before = saved(p.grad for p in params)
    optimizer.step()
    norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=bound_of(path, [p.grad for p in params]), atol=0)
    assert_same(before, [p.grad for p in params])
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


@pytest.mark.parametrize("scale", [None, 4.0], ids=str)
@pytest.mark.parametrize("grad", [(3.0, 4.0), (0.0, 0.0), (3.0, INF), (NAN, 4.0)], ids=str)
def test_decision(grad, scale, device):
    """Kernel and reference against the definition, for all combinations of limits, at and around the norm."""
    grads = [torch.tensor(grad, device=device)]
    norm = math.hypot(*grad) / (scale or 1.0)  # exact
    if any(map(math.isnan, grad)):
        norm = NAN
    at = 5.0 / (scale or 1.0)
    limits = [None, INF, at, float(np.nextafter(np.float32(at), 0)), 1000.0]
    grad_scale = None if scale is None else torch.full((1,), scale, device=device)
    total = torch.tensor(float(np.square(np.float64(grad)).sum()), dtype=torch.float64, device=device)
    memory, control, skips = NormMemory(grads, device), Control(device), 0
    for found_inf, max_norm, above in itertools.product((None, 0.0, 1.0), limits, limits):
        factor = 1 / (scale or 1.0)
        if max_norm is not None:
            ratio = np.float64(max_norm) / np.float64(norm + 1e-6)
            factor *= ratio if math.isnan(ratio) else min(1.0, float(ratio))
        skip = found_inf == 1.0 or (above is not None and not (norm <= above and norm < INF))
        expected = torch.tensor([factor, float(skip), norm], dtype=torch.float64)
        found = None if found_inf is None else torch.full((1,), found_inf, device=device)
        control.values.fill_(-1.0)
        memory.launch(control, Scaling(grad_scale, found), max_norm, above)
        skips += skip
        assert control.skipped.item() == skips
        of_reference = reference.gradient_control(total, grad_scale, found, max_norm, above)
        for values in (control.values, of_reference):
            # Two roundings of 2^-53, in any order.
            torch.testing.assert_close(values.cpu(), expected, rtol=2**-51, atol=0, equal_nan=True)


@pytest.mark.parametrize("max_norm", [1.25, 5.0, 6.0, INF])
@pytest.mark.parametrize("grad", [(3.0, 4.0), (0.0, 0.0), (3.0, INF), (NAN, 4.0)], ids=str)
def test_decision_is_torchs(grad, max_norm, device):
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64, device=device))
    param.grad = torch.tensor(grad, dtype=torch.float64, device=device)
    norm = torch.nn.utils.clip_grad_norm_([param], max_norm)
    factor, skip, ours = reference.gradient_control(norm.square(), None, None, max_norm, None)
    torch.testing.assert_close(ours, norm, rtol=2**-51, atol=0, equal_nan=True)
    before = torch.tensor(grad, dtype=torch.float64, device=device)
    torch.testing.assert_close(before * factor, param.grad, rtol=2**-51, atol=0, equal_nan=True)
    assert skip.item() == 0


def test_decision_without_a_norm(device):
    """Of a scaler alone; what is asked of a norm that is not there does not matter."""
    scale, found = torch.full((1,), 8.0, device=device), torch.ones((), device=device)
    for given, expected in (((scale, None), (0.125, 0.0)), ((None, found), (1.0, 1.0)), ((scale, found), (0.125, 1.0))):
        values = reference.gradient_control(None, *given, None, None)
        assert values.dtype == torch.float64 and tuple(values[:2].tolist()) == expected and values[2].isnan()


# The kernel itself


class NormMemory:
    """Tables for some gradients, and outputs with guarded borders."""

    def __init__(self, grads, device, *, split=True):
        addresses = torch.tensor([g.data_ptr() for g in grads]).to(device)
        self.numels = [real(g).numel() for g in grads]
        members = defaultdict(list)
        for i, grad in enumerate(grads):
            members[grad.dtype.to_real(), split and grad.data_ptr() % 16 == 0].append(i)
        self.tables, first = [], 0
        for (dtype, aligned), indices in members.items():
            numels = torch.tensor(self.numels).to(device)
            table = launch.NormTable.of(addresses, numels, indices, first=first, dtype=dtype, aligned=aligned)
            self.tables.append(table)
            first += table.spans.shape[0]
        self.guarded = Guarded()
        self.partials = self.guarded.place(torch.full((first + 1,), NAN, dtype=torch.float64, device=device))
        self.arrived = self.guarded.place(torch.zeros(1, dtype=torch.int32, device=device))

    def launch(self, control=None, scaling=None, max_norm=None, above=None):
        """Returns what lies where the sum of squares is."""
        self.partials.fill_(NAN)
        scaling = Scaling() if scaling is None else scaling
        launch.launch_norms(self.tables, self.partials, self.arrived, control, scaling, max_norm, above)
        assert self.arrived.item() == 0
        self.guarded.assert_untouched()
        return self.partials[-1].item()

    def of_tensor(self, i):
        """The sum of its spans' sums."""
        spans = torch.cat([table.spans for table in self.tables])[:, 0].cpu()
        return self.partials[:-1].cpu()[spans == i].sum().item()


def edge_sizes(dtype):
    block = launch.norm_block_size(dtype)
    span = 16 * block
    edges = (block, 2 * block, span, span + block, 2 * span)
    return [0, 1, 2, 127, *(edge + d for edge in edges for d in (-1, 0, 1))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_blocks_and_spans(dtype, device):
    """Each tensor's sum, with values around it that would show in it; nothing but the outputs is written."""
    borders = Guarded()
    sizes = edge_sizes(dtype.to_real())
    if dtype.is_complex:
        sizes = [n // 2 for n in sizes]
    grads = [
        borders.place(torch.randn(n, dtype=dtype, device=device), offset=i % 3, border=64) for i, n in enumerate(sizes)
    ]
    before = saved(grads)
    memory = NormMemory(grads, device)
    total = memory.launch()
    bound = 2 * bound_of("kernel", grads)
    for i, grad in enumerate(grads):
        expected = sum_of_squares([grad])
        assert abs(memory.of_tensor(i) - expected) <= bound * expected, sizes[i]
    expected = sum_of_squares(grads)
    assert abs(total - expected) <= bound * expected
    borders.assert_untouched()
    assert_same(before, grads)


def test_with_a_control_the_sum_is_not_stored(device):
    grads = [torch.randn(n, device=device) for n in (5, 20_000)]
    memory, control = NormMemory(grads, device), Control(device)
    assert math.isnan(memory.launch(control)), "nobody asked for it"
    expected = np.sqrt(sum_of_squares(grads))
    factor, skip, norm = control.values.tolist()
    assert factor == 1 and skip == 0 and abs(norm - expected) <= DOCUMENTED * expected
    memory.launch()
    assert control.values.tolist() == [factor, skip, norm]


def test_more_spans_than_the_last_program_adds_at_once(device):
    n = 1025
    values = torch.randn(n, device=device)
    grads = list(values.unbind())
    memory = NormMemory(grads, device, split=False)
    assert memory.partials.shape == (n + 1,)
    # One element each: one rounding of the square in fp32, which is then added in fp64.
    assert abs(memory.launch() - sum_of_squares(grads)) <= 2**-24 * sum_of_squares(grads)
    assert [memory.of_tensor(i) for i in (0, 511, n - 1)] == [
        pytest.approx(values[i].item() ** 2, rel=2**-24) for i in (0, 511, n - 1)
    ]


def worst_constants():
    """fp32 numbers whose squares, added 16 times with fma, are furthest from 16 squares."""
    values = np.linspace(1, 2, 100_001, dtype=np.float32)
    squares = values.astype(np.float64) ** 2  # exact
    total = np.zeros_like(values)
    for _ in range(16):
        total = (total + squares).astype(np.float32)  # the sum in float64 is exact
    error = total / (16 * squares) - 1
    return {
        f"too {what}": float(values[index]) for what, index in (("small", error.argmin()), ("large", error.argmax()))
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [0.1, 1 / 3, *worst_constants().values()], ids=["0.1", "1/3", *worst_constants()])
def test_millions_of_the_same_value(value, dtype, device):
    """All squares and partial sums round the same way; the bound holds all the same."""
    grad = torch.full((1_500_007,), value, dtype=dtype, device=device)
    memory, control = NormMemory([grad], device), Control(device)
    memory.launch(control)
    expected = math.sqrt(grad.numel()) * grad[0].item()
    assert abs(control.values[2].item() - expected) <= DOCUMENTED * expected


@pytest.mark.parametrize("huge", [3e3, 1e15, 1e30])
def test_one_huge_element_among_millions(huge, device):
    grad = torch.randn(2_000_003, device=device)
    grad[1_234_567] = huge
    memory = NormMemory([grad], device)
    expected = sum_of_squares([grad])
    assert abs(memory.launch() - expected) <= 2 * DOCUMENTED * expected


@pytest.mark.parametrize("name", HARD)
def test_sum_of_squares_of_values_whose_squares_leave_the_range(name, device):
    """The sum itself, as fp64 holds it; a norm would hide half of an error."""
    grads = [g.view(-1) for g in hard_values(device)[name]]
    memory = NormMemory(grads, device)
    expected = sum_of_squares(grads)
    assert abs(memory.launch() - expected) <= 2 * bound_of("kernel", grads) * expected


def test_of_a_part_is_the_sum_alone(device, path):
    """What each device tells the first one where there are several."""
    params = params_like([torch.randn(n, device=device, dtype=d) for d in DTYPES for n in (3, 2000)])
    optimizer = AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    (part,) = optimizer._plan.parts
    decided = optimizer._control().values.clone()
    total = part.sum_of_squares([p.grad for p in part.params])
    expected = sum_of_squares(p.grad for p in params)
    bound = 2 * bound_of(path, [p.grad for p in params])
    assert total.dtype == torch.float64 and abs(total.item() - expected) <= bound * expected
    assert torch.equal(decided, optimizer._control().values)


# Launches that fail


class FailsAt:
    """A kernel whose n-th launch raises."""

    def __init__(self, kernel, n, error):
        self.kernel, self.n, self.error = kernel, n, error

    def __getitem__(self, grid):
        self.n -= 1
        if self.n == 0:
            raise self.error("launch")
        return self.kernel[grid]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_failure_between_launches_is_forgotten(n, error, device, monkeypatch):
    grads = [
        torch.randn(n, device=device, dtype=d) for d in (torch.float32, torch.float16, torch.float64) for n in (3, 40)
    ]
    memory, control = NormMemory(grads, device), Control(device)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "grad_norm_kernel", FailsAt(launch.grad_norm_kernel, n, error))
        before = control.values.clone(), control.skipped.clone()
        with pytest.raises(error):
            memory.launch(control, above=1e-9)
        assert memory.arrived.item() == 0
        assert torch.equal(bits(before[0]), bits(control.values)) and torch.equal(before[1], control.skipped)
    expected = sum_of_squares(grads)
    assert abs(memory.launch() - expected) <= 2 * DOCUMENTED * expected


def test_a_step_that_fails_between_launches(device, monkeypatch):
    """Nothing is written, and the next step is right."""
    params = params_like(
        [torch.randn(n, device=device, dtype=d) for d in (torch.float32, torch.float16) for n in (3, 40)]
    )
    optimizer = AdamW(params, max_grad_norm=1.0)
    optimizer.step()
    (part,) = optimizer._plan.parts
    before = saved(everything(params, optimizer))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "grad_norm_kernel", FailsAt(launch.grad_norm_kernel, 2, RuntimeError))
        with pytest.raises(RuntimeError, match="launch"):
            optimizer.step()
    assert part.arrived.item() == 0
    assert_same(before, everything(params, optimizer))
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert_norm(optimizer, params, "kernel")
    assert {optimizer.state[p]["step"].item() for p in params} == {2.0}
