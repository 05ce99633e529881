"""Gradients that come and go: any pattern of them is stepped as torch steps it."""

import copy
import random

import pytest
import torch
from helpers import allow_any_grad_dtype, bits
from torch import nn

from adamw_triton import AdamW

SHAPES = [(3, 5), (1100,), (2, 300), (7,), (530,), ()]
N_STEPS = 12
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def patterns():
    """For each step the indices of the parameters that have a gradient."""
    everyone, chance = range(len(SHAPES)), random.Random(0)
    return {
        "all": [everyone] * N_STEPS,
        "random": [[i for i in everyone if chance.random() < 0.5] for _ in range(N_STEPS)],
        "rare": [[i for i in everyone if chance.random() < 0.15] for _ in range(N_STEPS)],
        "experts": [[0, 1, *chance.sample(range(2, len(SHAPES)), 2)] for _ in range(N_STEPS)],
        "alternating halves": [everyone[step % 2 :: 2] for step in range(N_STEPS)],
        "five to one": [everyone[3:] if step % 6 == 5 else everyone[:3] for step in range(N_STEPS)],
        "none at times": [[] if step in (0, 3, 4, 11) else everyone for step in range(N_STEPS)],
        "first missing": [everyone[1:]] * N_STEPS,
        "first missing at times": [everyone[step % 2 :] for step in range(N_STEPS)],
        "late": [everyone if step >= 7 else everyone[:-2] for step in range(N_STEPS)],
    }


PATTERNS = patterns()


def make_params(device, dtypes=(torch.float32,), shapes=SHAPES):
    return [
        nn.Parameter(torch.randn(shape, device=device).to(dtypes[i % len(dtypes)])) for i, shape in enumerate(shapes)
    ]


def clones(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_gradients(present, *lists, dtype=None):
    for i, params in enumerate(zip(*lists, strict=True)):
        grad = torch.randn_like(params[0], dtype=dtype)
        for p in params:
            p.grad = grad.clone() if i in present else None


def implementation(path):
    """Torch's that has the same bits: on the CPU we use its fused one, but for amsgrad."""
    return {"fused": True} if path == "reference" else {"foreach": False}


def split_groups(params):
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-2, "weight_decay": 0.0}]


def assert_like_torch(optimizer, ours, reference, theirs, path):
    """Bits where the operations are torch's; a few roundings where kernels fuse them."""
    exact = {"rtol": 0, "atol": 0} if path == "reference" else {"rtol": 5e-6, "atol": 1e-6}
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **exact)
        mine, torchs = optimizer.state.get(p, {}), reference.state.get(q, {})
        assert mine.keys() == torchs.keys()
        for name, value in torchs.items():
            torch.testing.assert_close(mine[name], value, check_device=False, **exact)
        assert not mine or mine["step"] == torchs["step"]


def content(optimizer, params):
    """Parameters and state, to the bit."""
    found = []
    for p in params:
        tensors = {"param": p, **optimizer.state.get(p, {})}
        found.append({name: bits(value).numpy().tobytes() for name, value in tensors.items()})
    return found


@pytest.mark.parametrize(
    ("foreach", "n_groups"),
    [(None, 1), (True, 2), (False, 2)],
    ids=["one group", "foreach, 2 groups", "each, 2 groups"],
)
@pytest.mark.parametrize("name", PATTERNS)
def test_as_torch(name, foreach, n_groups, device, path):
    ours = make_params(device)
    theirs = clones(ours)
    ours_grouped, theirs_grouped = (ours, theirs) if n_groups == 1 else map(split_groups, (ours, theirs))
    optimizer = AdamW(ours_grouped, foreach=foreach, **OPTIONS)
    reference = torch.optim.AdamW(theirs_grouped, **implementation(path), **OPTIONS)
    for present in PATTERNS[name]:
        give_gradients(present, ours, theirs)
        optimizer.step()
        reference.step()
        assert_like_torch(optimizer, ours, reference, theirs, path)


@pytest.mark.fast
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("options", [{"amsgrad": True}, {"maximize": True}, {"lr": torch.tensor(1e-2)}], ids=str)
def test_options_as_torch(options, foreach, device, path):
    ours = make_params(device)
    theirs = clones(ours)
    optimizer = AdamW(ours, foreach=foreach, **options)
    how = implementation("kernel" if "amsgrad" in options else path)
    reference = torch.optim.AdamW(theirs, **how, **{k: float(v) if k == "lr" else v for k, v in options.items()})
    for present in PATTERNS["random"]:
        give_gradients(present, ours, theirs)
        optimizer.step()
        reference.step()
        assert_like_torch(optimizer, ours, reference, theirs, path)


@pytest.mark.parametrize("foreach", [None, False])
def test_gradients_of_another_dtype(foreach, device, path):
    """float32 and bfloat16 gradients in turn, each missing at times."""
    ours = make_params(device)
    theirs = clones(ours)
    for p in ours:
        allow_any_grad_dtype(p)
    optimizer = AdamW(ours, foreach=foreach, **OPTIONS)
    reference = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    for step, present in enumerate(PATTERNS["random"]):
        give_gradients(present, ours, dtype=(torch.float32, torch.bfloat16)[step % 3 == 1])
        for p, q in zip(ours, theirs, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        reference.step()
        assert_like_torch(optimizer, ours, reference, theirs, "kernel")  # mixed dtypes are not torch's fused step


EIGHT_BITS = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
STORED = {
    "fp32": ((torch.float32,), {}),
    "fp64": ((torch.float64,), {"cautious": True}),
    "mixed": ((torch.float32, torch.bfloat16), {"foreach": True}),
    "8 bits": ((torch.float32,), EIGHT_BITS),
    "masters": ((torch.bfloat16,), {"master_weight_bits": 32}),
    "smallest": ((torch.bfloat16,), {**EIGHT_BITS, "master_weight_bits": 24}),
    "stochastic": ((torch.bfloat16,), {"stochastic_rounding": True, "seed": 5}),
    "capturable": ((torch.float32,), {"capturable": True}),
    "tensor each": ((torch.bfloat16,), {"foreach": False, "master_weight_bits": 32}),
}


@pytest.mark.parametrize("pattern", ["random", "late", "none at times"])
@pytest.mark.parametrize("name", STORED)
def test_as_one_parameter_at_a_time(name, pattern, device, path):
    """Who else has a gradient changes no bit: an optimizer that is called once for each gradient does the same."""
    dtypes, options = STORED[name]
    together = make_params(device, dtypes)
    one_by_one = clones(together)
    optimizer, reference = AdamW(together, **OPTIONS, **options), AdamW(one_by_one, **OPTIONS, **options)
    for present in PATTERNS[pattern][: N_STEPS // 2]:
        give_gradients(present, together)
        optimizer.step()
        for p, q in zip(together, one_by_one, strict=True):
            if p.grad is not None:
                q.grad = p.grad.clone()
                reference.step()
                q.grad = None
        assert content(optimizer, together) == content(reference, one_by_one)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("name", ["random", "alternating halves", "none at times", "late", "first missing at times"])
def test_clipping(name, foreach, device, path):
    """By the norm of those that are there."""
    ours = make_params(device)
    theirs = clones(ours)
    optimizer = AdamW(ours, foreach=foreach, max_grad_norm=1.5, **OPTIONS)
    reference = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    for present in PATTERNS[name]:
        give_gradients(present, ours, theirs)
        norm_before = optimizer.grad_norm.clone()
        optimizer.step()
        if len(present):
            norm = torch.nn.utils.clip_grad_norm_([theirs[i] for i in present], 1.5, foreach=False)
            torch.testing.assert_close(optimizer.grad_norm, norm.double(), rtol=1e-6, atol=0)
        else:
            torch.testing.assert_close(optimizer.grad_norm, norm_before, rtol=0, atol=0, equal_nan=True)
        reference.step()
        assert_like_torch(optimizer, ours, reference, theirs, "a norm of other roundings")


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("name", ["random", "alternating halves", "none at times", "late"])
def test_skipping(name, foreach, device, path):
    """A step with an infinity counts for nobody."""
    ours = make_params(device)
    theirs = clones(ours)
    optimizer = AdamW(ours, foreach=foreach, skip_nonfinite=True, **OPTIONS)
    reference = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    skipped = 0
    for step, present in enumerate(PATTERNS[name]):
        give_gradients(present, ours, theirs)
        before = content(optimizer, [p for p in ours if p in optimizer.state])
        stepped = [p for p in ours if p in optimizer.state]
        if step % 3 == 1 and len(present):
            ours[present[-1]].grad.view(-1)[-1] = (torch.inf, torch.nan)[step % 2]
            skipped += 1
            optimizer.step()
            assert content(optimizer, stepped) == before
        else:
            optimizer.step()
            reference.step()
        assert optimizer.skipped_steps == skipped
        for p, q in zip(ours, theirs, strict=True):
            tolerance = {"rtol": 5e-6, "atol": 1e-6}
            torch.testing.assert_close(p, q, **tolerance)
            count = optimizer.state[p]["step"] if optimizer.state.get(p) else 0
            assert count == (reference.state[q]["step"] if q in reference.state else 0)
    assert skipped > 1


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("name", ["random", "alternating halves", "none at times", "late"])
def test_statistics(name, foreach, device, path):
    """Over the parameters with gradients; a step without any leaves them."""
    params = make_params(device)
    optimizer = AdamW(params, foreach=foreach, statistics=True, **OPTIONS)
    expected = None
    for present in PATTERNS[name]:
        give_gradients(present, params)
        before = [p.detach().double() for p in params]
        optimizer.step()
        if len(present):
            now = [params[i].detach().double() for i in present]
            change = [new - before[i] for i, new in zip(present, now, strict=True)]
            expected = [torch.cat([t.reshape(-1) for t in tensors]).norm() for tensors in (change, now)]
        if expected is not None:
            torch.testing.assert_close(optimizer.update_norm, expected[0], rtol=1e-5, atol=0)
            torch.testing.assert_close(optimizer.param_norm, expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_empty_complex_and_strided_parameters(max_grad_norm, foreach, device, path):
    ours = [
        nn.Parameter(torch.empty(0, 3, device=device)),
        nn.Parameter(torch.randn(40, 30, dtype=torch.complex64, device=device)),
        nn.Parameter(torch.randn(40, 30, device=device).t()),
        nn.Parameter(torch.randn(40, 60, device=device)[:, ::2]),
        nn.Parameter(torch.randn(1100, device=device)),
        nn.Parameter(torch.empty(0, device=device)),
    ]
    theirs = clones(ours)
    assert not ours[3].is_contiguous() and ours[3].stride() == (60, 2)
    optimizer = AdamW(ours, foreach=foreach, max_grad_norm=max_grad_norm, **OPTIONS)
    reference = torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    for present in PATTERNS["random"]:
        give_gradients(present, ours, theirs)
        optimizer.step()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(theirs, max_grad_norm, foreach=False)
        reference.step()
        assert_like_torch(optimizer, ours, reference, theirs, "other roundings, of complex numbers too")
    empty_counts = [sum(i in present for present in PATTERNS["random"]) for i in (0, 5)]
    assert [optimizer.state[ours[i]]["step"].item() for i in (0, 5)] == empty_counts


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"statistics": True}], ids=str)
@pytest.mark.parametrize("foreach", [None, False])
def test_memory_of_a_gradient_that_is_gone_is_not_read(foreach, options, device, path):
    ours = make_params(device)
    theirs = clones(ours)
    optimizer, reference = (AdamW(params, foreach=foreach, **options, **OPTIONS) for params in (ours, theirs))
    kept = []
    for present in PATTERNS["random"]:
        kept += [p.grad for p in ours if p.grad is not None]
        give_gradients(present, ours, theirs)
        for gone in kept:
            gone.fill_(torch.nan)
        optimizer.step()
        reference.load_state_dict(copy.deepcopy(reference.state_dict()))  # nothing it remembers can be old
        reference.step()
        assert content(optimizer, ours) == content(reference, theirs)
        assert all(p.isfinite().all() for p in ours)
    assert len(kept) > N_STEPS


@pytest.mark.parametrize("n_groups", [1, 2])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"statistics": True}, {"capturable": True}], ids=str)
def test_launches_do_not_depend_on_the_pattern(options, n_groups, device, launches):
    """Once all have had a gradient and one has been missing, a step launches the same programs for any pattern."""
    params = make_params(device)
    optimizer = AdamW(params if n_groups == 1 else split_groups(params), foreach=True, **options, **OPTIONS)
    give_gradients(range(len(params)), params)
    optimizer.step()
    seen = set()
    for step, present in enumerate(PATTERNS["random"] + PATTERNS["experts"] + PATTERNS["alternating halves"]):
        give_gradients(present, params)
        launches.clear()
        optimizer.step()
        # Parameters that count apart have scalars of their own, as many as there are.
        updates = [launch for launch in launches if launch[0] != "scalars_kernel"]
        if step > 0 and len(present):
            seen.add(tuple(sorted(updates)))
    assert len(seen) == 1, seen
    assert sum(name == "adamw_table_kernel" for name, _ in next(iter(seen))) == 1
