"""Parameters on the CPU: torch's fused step where that does the same; the same bits however they are joined or cut."""

import copy

import pytest
import torch
from helpers import bits
from torch import nn

from adamw_triton import AdamW, functional, host_plan, launch

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
SHAPES = [(3, 5), (1100,), (2, 700), (7,), (), (0,), (64, 128), (1,)]
STORAGES = {
    "bf16 moments": {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16"},
    "stochastic": {"exp_avg_dtype": "bfloat16", "exp_avg_sq_dtype": "bfloat16", "stochastic_rounding": True},
    "8 bits": {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8"},
    "8 bits, nearest": {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8", "stochastic_rounding": False},
    "master 32": {"master_weight_bits": 32},
    "master 24, 8 bits": {"master_weight_bits": 24, "exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8"},
}


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)


def make_params(dtype=torch.float32, shapes=SHAPES):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def give_gradients(seed, *lists, missing=()):
    generator = torch.Generator().manual_seed(seed)
    for i, params in enumerate(zip(*lists, strict=True)):
        grad = torch.randn(params[0].shape, generator=generator).to(params[0].dtype)
        for p in params:
            p.grad = None if i in missing else grad.clone()


def everything(optimizer, params):
    return [[p.detach(), *(optimizer.state[p][name] for name in sorted(optimizer.state[p]))] for p in params]


def assert_same_bits(one, other):
    for tensors, others in zip(one, other, strict=True):
        for a, b in zip(tensors, others, strict=True):
            assert torch.equal(bits(a), bits(b))


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"maximize": True}, {"weight_decay": 0.0}, {"lr": torch.tensor(3e-3)}], ids=str
)
def test_the_bits_of_torchs_fused_step(dtype, options):
    ours = make_params(dtype)
    theirs = copies(ours)
    options = {**OPTIONS, **options}
    optimizer = AdamW(ours, **options)
    reference = torch.optim.AdamW(theirs, fused=True, **options)
    for step in range(5):
        give_gradients(step, ours, theirs, missing=(step, step + 1))
        before = [None if p.grad is None else p.grad.clone() for p in ours]
        optimizer.step()
        reference.step()
        for p, grad in zip(ours, before, strict=True):
            assert p.grad is grad is None or torch.equal(p.grad, grad), "gradients are not written"
    assert_same_bits(everything(optimizer, ours), everything(reference, theirs))


def test_clipped_gradients_are_not_written():
    """torch's fused step would leave in them what it made of them."""
    ours = make_params()
    theirs = copies(ours)
    optimizer, reference = AdamW(ours, max_grad_norm=0.5, **OPTIONS), torch.optim.AdamW(theirs, fused=True, **OPTIONS)
    for step in range(3):
        give_gradients(step, ours, theirs)
        before = [p.grad.clone() for p in ours]
        optimizer.step()
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        reference.step()
        assert all(map(torch.equal, before, (p.grad for p in ours)))
        torch.testing.assert_close(optimizer.grad_norm.float(), norm)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def strided(shape):
    """Views that torch's fused step on the CPU gets wrong."""
    return torch.randn(*shape[:-1], 2 * shape[-1])[..., ::2]


@pytest.mark.parametrize("make", [strided, lambda shape: torch.randn(shape[::-1]).t()], ids=["gaps", "transposed"])
def test_other_strides(make):
    base = make((6, 35))
    ours, theirs = nn.Parameter(base), nn.Parameter(base.clone(memory_format=torch.contiguous_format))
    optimizer, reference = AdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], foreach=False, **OPTIONS)
    guard = None if base._base is None else base._base.clone()
    for step in range(3):
        give_gradients(step, [ours], [theirs])
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    if make is strided:
        assert torch.equal(base._base[:, 1::2], guard[:, 1::2]), "the gaps are others'"


@pytest.mark.parametrize("storage", STORAGES)
def test_joined_and_alone(storage):
    """foreach=False steps one by one; missing gradients change who is joined with whom."""
    dtype = torch.bfloat16 if "master" in storage else torch.float32
    ours = make_params(dtype)
    theirs = copies(ours)
    joined, alone = (
        AdamW(params, foreach=foreach, **STORAGES[storage], **OPTIONS)
        for params, foreach in ((ours, None), (theirs, False))
    )
    for step in range(6):
        give_gradients(step, ours, theirs, missing=(step, step + 2))
        if step == 4:  # whose eight elements get no random bits, and no others
            for params in (ours, theirs):
                params[3].grad[2] = float("nan")
        joined.step()
        alone.step()
    assert_same_bits(everything(joined, ours), everything(alone, theirs))


@pytest.mark.parametrize("storage", STORAGES)
def test_cut_into_pieces(storage, monkeypatch):
    """Pieces of 128 elements and whole tensors."""
    dtype = torch.bfloat16 if "master" in storage else torch.float32
    ours = make_params(dtype, [(20, 640), (12_345,), (3, 5)])
    theirs = copies(ours)
    one, other = (AdamW(params, **STORAGES[storage], **OPTIONS) for params in (ours, theirs))
    for step in range(3):
        give_gradients(step, ours, theirs)
        one.step()
        with monkeypatch.context() as context:
            for module in (functional, host_plan):
                context.setattr(module, "host_piece", lambda: 128)
            other.step()
    assert_same_bits(everything(one, ours), everything(other, theirs))


def test_parameters_of_different_counts_are_not_joined(monkeypatch):
    """Their bias corrections differ: each count against an optimizer of its own."""
    options = {**STORAGES["bf16 moments"], **OPTIONS}
    ours = make_params(shapes=[(64,), (64,)])
    theirs = copies(ours)
    optimizer, others = AdamW(ours, **options), [AdamW([p], **options) for p in theirs]
    for step in range(3):
        give_gradients(step, ours, theirs, missing=(1,) if step == 0 else ())
        optimizer.step()
        for other in others:
            other.step()
    assert [float(optimizer.state[p]["step"]) for p in ours] == [3.0, 2.0]
    assert_same_bits(everything(optimizer, ours), [everything(o, [p])[0] for o, p in zip(others, theirs, strict=True)])


def test_nan_of_amsgrad():
    """torch's fused maximum drops a NaN, so that it is not used."""
    param = nn.Parameter(torch.ones(70))
    optimizer = AdamW([param], amsgrad=True)
    param.grad = torch.ones(70)
    param.grad[3] = torch.nan
    optimizer.step()
    param.grad = torch.ones(70)
    optimizer.step()
    assert optimizer.state[param]["max_exp_avg_sq"][3].isnan() and param[3].isnan() and param.isnan().sum() == 1


def test_a_plan_is_kept_and_follows(monkeypatch):
    """Nothing is checked anew while nothing changes; moved state is found."""
    params = make_params()
    optimizer = AdamW(params, **OPTIONS)
    give_gradients(0, params)
    optimizer.step()
    built = []
    init = host_plan.HostPlan.__init__
    monkeypatch.setattr(
        host_plan.HostPlan, "__init__", lambda self, *a, **k: (built.append(self), init(self, *a, **k))[1]
    )
    give_gradients(1, params)
    optimizer.step()
    assert not built
    twin = copy.deepcopy(optimizer.state[params[1]]["exp_avg"])
    optimizer.state[params[1]]["exp_avg"] = twin
    give_gradients(2, params)
    before = twin.clone()
    optimizer.step()
    assert len(built) == 1 and not torch.equal(before, twin)
