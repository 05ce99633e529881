"""One step of one tensor against the float64 oracle: every storage, both entries, edges and neighbours."""

import itertools

import numpy as np
import pytest
import torch
from helpers import (
    DTYPES,
    Guarded,
    allow_any_grad_dtype,
    assert_step,
    bits,
    exact,
    oracle,
    random_state,
    truncates_bf16,
)

from adamw_triton import AdamW, adamw_

LOW = (torch.float32, torch.bfloat16, torch.float16)
MIXES = [(p, g, m, v) for p, g, m, v in itertools.product(LOW, repeat=4)]
NAMES = {torch.float32: "f32", torch.bfloat16: "b16", torch.float16: "f16", torch.float64: "f64"}
OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
# Shorter than a block, one block, around a multiple of 16 and of a block, several blocks and a tail.
SIZES = (1, 2, 15, 16, 17, 511, 512, 1023, 1024, 1025, 2048, 3 * 1024 + 5)


def mix_id(dtypes):
    return "-".join(NAMES[dtype] for dtype in dtypes)


def step_by_optimizer(tensors, *, foreach, step=5, **options):
    """Step (param, grad, *moments) through the optimizer, a list of such tuples."""
    params = []
    for param, grad, *_ in tensors:
        leaf = torch.nn.Parameter(param)
        if grad.dtype != param.dtype:
            allow_any_grad_dtype(leaf)
        leaf.grad = grad
        params.append(leaf)
    optimizer = AdamW(params, foreach=foreach, amsgrad=len(tensors[0]) == 5, **options)
    for param, (_, _, *moments) in zip(params, tensors, strict=True):
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        optimizer.state[param] = {"step": torch.tensor(step - 1.0), **dict(zip(names, moments, strict=False))}
    optimizer.step()
    assert all(optimizer.state[param]["step"] == step for param in params)
    return optimizer


@pytest.mark.fast
@pytest.mark.parametrize("dtypes", MIXES, ids=mix_id)
def test_every_mix_of_storage(dtypes, device, path):
    tensors = random_state((1031,), dtypes, device)
    before = [t.clone() for t in tensors]
    adamw_(*tensors, step=7, **OPTIONS)
    assert_step(before, tensors, step=7, **OPTIONS)


@pytest.mark.fast
@pytest.mark.parametrize("dtypes", [(dtype,) * 4 for dtype in DTYPES], ids=mix_id)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
def test_options(dtypes, amsgrad, maximize, foreach, device, path):
    tensors = random_state((1031,), dtypes, device, amsgrad=amsgrad)
    before = [t.clone() for t in tensors]
    step_by_optimizer([tensors], foreach=foreach, maximize=maximize, **OPTIONS)
    assert_step(before, tensors, step=5, maximize=maximize, **OPTIONS)


@pytest.mark.parametrize(
    "dtypes", [(dtype,) * 4 for dtype in DTYPES] + [(torch.bfloat16,) * 2 + (torch.float32,) * 2], ids=mix_id
)
@pytest.mark.parametrize("offset", [0, 1, 3, 8])
def test_edges_and_neighbours(dtypes, offset, device, path):
    guard = Guarded()
    tensors = [[guard.place(t, offset) for t in random_state((size,), dtypes, device, amsgrad=True)] for size in SIZES]
    before = [[t.clone() for t in ts] for ts in tensors]
    for foreach in (True, False):
        for ts, saved in zip(tensors, before, strict=True):
            for t, s in zip(ts, saved, strict=True):
                t.copy_(s)
        step_by_optimizer(tensors, foreach=foreach, **OPTIONS)
        guard.assert_untouched()
        for ts, saved in zip(tensors, before, strict=True):
            assert_step(saved, ts, step=5, **OPTIONS)


@pytest.mark.parametrize(
    "dtypes",
    [(dtype,) * 4 for dtype in DTYPES]
    + [
        (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.bfloat16, torch.float16),
    ],
    ids=mix_id,
)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_both_entries_give_the_same_bits(dtypes, offset, amsgrad, device, launches):
    guard = Guarded()
    results = []
    originals = [random_state((size,), dtypes, device, amsgrad=amsgrad) for size in (1, 700, 1024, 2500)]
    for foreach in (True, False):
        tensors = [[guard.place(t, offset) for t in ts] for ts in originals]
        for ts in tensors:  # what must propagate must do so alike
            ts[1].view(-1)[0] = float("nan")
            ts[1].view(-1)[-1] = float("inf")
        launches.clear()
        step_by_optimizer(tensors, foreach=foreach, **OPTIONS)
        assert {name for name, _ in launches[1:]} == {"adamw_table_kernel" if foreach else "adamw_kernel"}
        results.append([bits(t) for ts in tensors for t in ts])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("beta2", [0.0, 0.999])
@pytest.mark.parametrize("step", [1, 2, 1000, 2**24])
def test_betas_and_steps(beta1, beta2, step, device, path):
    options = {"lr": 1e-2, "betas": (beta1, beta2), "eps": 1e-8, "weight_decay": 0.0}
    tensors = random_state((1031,), (torch.float32,) * 4, device)
    if step == 1:
        tensors[2].zero_()
        tensors[3].zero_()
    before = [t.clone() for t in tensors]
    adamw_(*tensors, step=step, **options)
    assert_step(before, tensors, step=step, **options)
    if beta1 == 0:
        assert torch.equal(tensors[2], tensors[1])


@pytest.mark.parametrize("scale", [1e-18, 1e-12, 1e-4, 1e6, 1e15])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_range_of_gradients(scale, eps, device, path):
    """The square root and the division hold from denormal v to v near the end of fp32's range."""
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": eps, "weight_decay": 0.0}
    tensors = random_state((1031,), (torch.float32,) * 4, device, scale=scale)
    before = [t.clone() for t in tensors]
    adamw_(*tensors, step=3, **options)
    if scale < 1e-15:
        # v itself is denormal, with few bits; only the parameter's share of that error is bounded.
        expected, *_ = oracle(before[0], before[1], before[2:], step=3, **options)
        assert abs(exact(tensors[0]) - expected).max() <= 1e-3 * options["lr"]
    else:
        assert_step(before, tensors, step=3, **options)


SPECIAL = [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e20, -1e25, 3e38, float("inf"), -float("inf"), float("nan")]


@pytest.mark.fast
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("beta1", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("foreach", [False, True])
def test_non_finite_values_propagate_as_in_torch(amsgrad, eps, beta1, foreach, device, path):
    """Every combination of special gradient, exp_avg and parameter: NaN and inf where torch has them."""
    grad, exp_avg, param = (
        t.reshape(-1).contiguous() for t in torch.meshgrid(*[torch.tensor(SPECIAL, device=device)] * 3, indexing="ij")
    )
    exp_avg_sq = torch.tensor([0.0, 1e-45, 1.0, 1e30, float("inf"), float("nan")], device=device)
    exp_avg_sq = exp_avg_sq.repeat(-(-grad.numel() // 6))[: grad.numel()].clone()
    tensors = [param, grad, exp_avg, exp_avg_sq] + ([exp_avg_sq.flip(0).clone()] if amsgrad else [])
    theirs = [t.clone() for t in tensors]
    options = {"lr": 1e-2, "betas": (beta1, 0.999), "eps": eps, "weight_decay": 0.1}
    step_by_optimizer([tensors], foreach=foreach, **options)

    leaf = torch.nn.Parameter(theirs[0])
    leaf.grad = theirs[1]
    reference = torch.optim.AdamW([leaf], foreach=False, amsgrad=amsgrad, **options)
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    reference.state[leaf] = {"step": torch.tensor(4.0), **dict(zip(names, theirs[2:], strict=False))}
    reference.step()
    # torch rounds (step size · m) first: of a denormal m nothing may be left, and eps = 0 makes it 0 / 0.
    exact = ~((theirs[2] != 0) & (theirs[2].abs() < 1e-35))
    assert exact.sum() > 0.5 * exact.numel()
    for name, ours, expected in zip(("param", "grad", *names), tensors, theirs, strict=False):
        if name == "param":
            ours, expected = ours[exact], expected[exact]
        assert torch.equal(ours.isnan(), expected.isnan()), f"NaNs of {name} differ"
        assert torch.equal(ours[expected.isinf()], expected[expected.isinf()]), name
        finite = expected.isfinite()
        assert torch.allclose(ours[finite], expected[finite], rtol=1e-5, atol=1e-43), name


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
def test_error_is_no_worse_than_torchs(dtype, device):
    """Root mean square error of the parameter against float64, over 20 steps of random gradients.

    The oracle takes every step from the values stored so far, so that the errors of one step are compared.
    """
    n = 4096
    options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1}  # eps: 1e-8 is 0 in fp16
    param = torch.randn(n, device=device).to(dtype)
    ours, theirs = (torch.nn.Parameter(param.clone()) for _ in range(2))
    optimizers = [AdamW([ours], **options), torch.optim.AdamW([theirs], foreach=False, **options)]
    squares = [0.0, 0.0]
    for step in range(1, 21):
        grad = torch.randn(n, device=device).to(dtype)
        for i, (leaf, optimizer) in enumerate(zip((ours, theirs), optimizers, strict=True)):
            state = optimizer.state[leaf] or {k: torch.zeros_like(leaf) for k in ("exp_avg", "exp_avg_sq")}
            expected, *_ = oracle(leaf, grad, [state["exp_avg"], state["exp_avg_sq"]], step=step, **options)
            leaf.grad = grad.clone()
            optimizer.step()
            squares[i] += np.mean((exact(leaf) - expected) ** 2)
    ratio = (squares[0] / squares[1]) ** 0.5
    if dtype == torch.bfloat16 and truncates_bf16():
        # Truncation has twice the root mean square error of rounding; what is left must be no worse.
        ratio /= 2
    assert ratio <= 1.02, f"our error is {ratio:.3f} of torch's"


def test_bitwise_deterministic(device, path):
    results = []
    originals = [random_state((size,), (torch.bfloat16,) * 4, device) for size in (3, 1500)]
    for _ in range(2):
        tensors = [[t.clone() for t in ts] for ts in originals]
        step_by_optimizer(tensors, foreach=True, **OPTIONS)
        results.append([bits(t) for ts in tensors for t in ts])
    assert all(map(torch.equal, *results))
