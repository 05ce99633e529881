"""kernels/grad_norm.py and its specification: sums of squares, and what is decided from them."""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Guarded, bits
from norms import DOCUMENTED, DTYPES, HARD, INF, NAN, bound_of, hard_values, real, sum_of_squares
from pairs import assert_same, contents, params_of, set_grads
from torch import nn

from adamw_triton import AdamW, launch
from adamw_triton.device_plan import GradNorms
from adamw_triton.grad_control import GradDecision, GradNormOptions, GradScalerInputs, decide
from adamw_triton.param_work import GradLayout


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
    memory, decision, skips = NormMemory(grads, device), GradDecision(device), 0
    for found_inf, max_norm, above in itertools.product((None, 0.0, 1.0), limits, limits):
        factor = 1 / (scale or 1.0)
        if max_norm is not None:
            ratio = np.float64(max_norm) / np.float64(norm + 1e-6)
            factor *= ratio if math.isnan(ratio) else min(1.0, float(ratio))
        skip = found_inf == 1.0 or (above is not None and not (norm <= above and norm < INF))
        expected = torch.tensor([factor, float(skip), norm], dtype=torch.float64)
        found = None if found_inf is None else torch.full((1,), found_inf, device=device)
        decision.values.fill_(-1.0)
        scaler, options = GradScalerInputs(grad_scale, found), GradNormOptions(max_norm, skip_grad_norm_above=above)
        memory.launch(decision, scaler, options)
        skips += skip
        assert decision.skipped.item() == skips
        for values in (decision.values, decide(total, scaler, options)):
            # Two roundings of 2^-53, in any order.
            torch.testing.assert_close(values.cpu(), expected, rtol=2**-51, atol=0, equal_nan=True)


@pytest.mark.parametrize("max_norm", [1.25, 5.0, 6.0, INF])
@pytest.mark.parametrize("grad", [(3.0, 4.0), (0.0, 0.0), (3.0, INF), (NAN, 4.0)], ids=str)
def test_decision_is_torchs(grad, max_norm, device):
    param = nn.Parameter(torch.zeros(2, dtype=torch.float64, device=device))
    param.grad = torch.tensor(grad, dtype=torch.float64, device=device)
    norm = torch.nn.utils.clip_grad_norm_([param], max_norm)
    factor, skip, ours = decide(norm.square(), GradScalerInputs(), GradNormOptions(max_norm))
    torch.testing.assert_close(ours, norm, rtol=2**-51, atol=0, equal_nan=True)
    before = torch.tensor(grad, dtype=torch.float64, device=device)
    torch.testing.assert_close(before * factor, param.grad, rtol=2**-51, atol=0, equal_nan=True)
    assert skip.item() == 0


def test_decision_without_a_norm(device):
    """Of a scaler alone; what is asked of a norm that is not there does not matter."""
    scale, found = torch.full((1,), 8.0, device=device), torch.ones((), device=device)
    for given, expected in (((scale, None), (0.125, 0.0)), ((None, found), (1.0, 1.0)), ((scale, found), (0.125, 1.0))):
        values = decide(None, GradScalerInputs(*given), GradNormOptions())
        assert values.dtype == torch.float64 and tuple(values[:2].tolist()) == expected and values[2].isnan()


# The kernel itself


class NormMemory:
    """Tables for some gradients, and outputs with guarded borders."""

    def __init__(self, grads, device, *, split=True):
        self.addresses = torch.tensor([g.data_ptr() for g in grads]).to(device)
        self.numels = [real(g).numel() for g in grads]
        members = defaultdict(list)
        for i, grad in enumerate(grads):
            members[grad.dtype.to_real(), split and grad.data_ptr() % 16 == 0].append(i)
        self.tables, first = [], 0
        for (dtype, aligned), indices in members.items():
            numels = torch.tensor(self.numels).to(device)
            table = launch.NormTable.of(numels, indices, first=first, dtype=dtype, aligned=aligned)
            self.tables.append(table)
            first += table.spans.shape[0]
        self.guarded = Guarded()
        self.partials = self.guarded.place(torch.full((first + 1,), NAN, dtype=torch.float64, device=device))
        self.finished = self.guarded.place(torch.zeros(1, dtype=torch.int32, device=device))

    def launch(self, decision=None, scaler=None, options=None):
        """Returns what lies where the sum of squares is."""
        self.partials.fill_(NAN)
        launch.launch_norms(
            self.tables,
            self.addresses,
            self.partials,
            self.finished,
            decision,
            scaler or GradScalerInputs(),
            options or GradNormOptions(),
        )
        assert self.finished.item() == 0
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
    before = list(map(bits, grads))
    memory = NormMemory(grads, device)
    total = memory.launch()
    bound = 2 * bound_of("kernel", grads)
    for i, grad in enumerate(grads):
        expected = sum_of_squares([grad])
        assert abs(memory.of_tensor(i) - expected) <= bound * expected, sizes[i]
    expected = sum_of_squares(grads)
    assert abs(total - expected) <= bound * expected
    borders.assert_untouched()
    assert all(map(torch.equal, before, map(bits, grads)))


def test_with_a_decision_the_sum_is_not_stored(device):
    grads = [torch.randn(n, device=device) for n in (5, 20_000)]
    memory, decision = NormMemory(grads, device), GradDecision(device)
    assert math.isnan(memory.launch(decision)), "nobody asked for it"
    expected = np.sqrt(sum_of_squares(grads))
    factor, skip, norm = decision.values.tolist()
    assert factor == 1 and skip == 0 and abs(norm - expected) <= DOCUMENTED * expected
    memory.launch()
    assert decision.values.tolist() == [factor, skip, norm]


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
    memory, decision = NormMemory([grad], device), GradDecision(device)
    memory.launch(decision)
    expected = math.sqrt(grad.numel()) * grad[0].item()
    assert abs(decision.values[2].item() - expected) <= DOCUMENTED * expected


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


@pytest.mark.parametrize("missing", [(), (0,), (1, 4, 7), tuple(range(12))], ids=str)
def test_of_one_device(missing, device):
    """What each device tells the first one where there are several; a missing gradient takes no part."""
    params = [nn.Parameter(torch.empty(n, device=device, dtype=d)) for d in DTYPES for n in (3, 2000)]
    set_grads(
        params,
        [torch.randn(p.numel() + 1, device=device, dtype=p.dtype)[i % 2 :][: p.numel()] for i, p in enumerate(params)],
    )
    works = [SimpleNamespace(param=p, grad_layout=GradLayout.of(p.grad), norm_class=0) for p in params]
    norms = GradNorms(works, [p.grad.data_ptr() % 16 == 0 for p in params])
    addresses = [0 if i in missing else p.grad.data_ptr() for i, p in enumerate(params)]
    for _ in range(2):
        addresses_there = torch.tensor(addresses, device=device)
        norms.launch(addresses_there, None, GradScalerInputs(), GradNormOptions())
        present = [p.grad for i, p in enumerate(params) if i not in missing]
        expected = sum_of_squares(present)
        assert abs(norms.partials[-1].item() - expected) <= 2 * DOCUMENTED * expected
    assert {t.device for t in norms.tensors} == {device}


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
    memory, decision = NormMemory(grads, device), GradDecision(device)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "grad_norm_kernel", FailsAt(launch.grad_norm_kernel, n, error))
        before = decision.values.clone(), decision.skipped.clone()
        with pytest.raises(error):
            memory.launch(decision, options=GradNormOptions(skip_grad_norm_above=1e-9))
        assert memory.finished.item() == 0
        assert torch.equal(bits(before[0]), bits(decision.values)) and torch.equal(before[1], decision.skipped)
    expected = sum_of_squares(grads)
    assert abs(memory.launch() - expected) <= 2 * DOCUMENTED * expected


def test_a_step_that_fails_between_launches(device, monkeypatch):
    """Nothing is written, and the next step is right."""
    params = [
        nn.Parameter(torch.randn(n, device=device, dtype=d)) for d in (torch.float32, torch.float16) for n in (3, 40)
    ]
    optimizer = AdamW(params, max_grad_norm=1.0)
    set_grads(params)
    optimizer.step()
    before = contents(optimizer, with_grads=True)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "grad_norm_kernel", FailsAt(launch.grad_norm_kernel, 2, RuntimeError))
        with pytest.raises(RuntimeError, match="launch"):
            optimizer.step()
    assert_same(before, contents(optimizer, with_grads=True))
    grads = set_grads(params)
    optimizer.step()
    expected = np.sqrt(sum_of_squares(grads))
    assert abs(optimizer.grad_norm.item() - expected) <= DOCUMENTED * expected
    assert {optimizer.state[p]["step"].item() for p in params_of(optimizer)} == {2.0}
