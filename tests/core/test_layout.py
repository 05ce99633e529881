"""Parameters and gradients of every layout, against torch's loop; memory between their elements stays as it was."""

import pytest
import torch
from helpers import allow_any_grad_dtype, bits
from torch import nn

from adamw_triton import AdamW, adamw_
from adamw_triton.strides import is_dense, overlaps_itself, same_strides

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


def backing(n, device, dtype=torch.float32):
    return (
        torch.randn(n, device=device).to(dtype) if not dtype.is_complex else torch.randn(n, dtype=dtype, device=device)
    )


LAYOUTS = {
    "0-d": lambda b: b[5],
    "empty": lambda b: b[:0].view(0, 3),
    "one element": lambda b: b[3:4].view(1, 1),
    "contiguous": lambda b: b[:1200].view(40, 30),
    "transposed": lambda b: b[:1200].view(30, 40).t(),
    "channels_last": lambda b: b[: 2 * 5 * 4 * 3].view(2, 4, 3, 5).permute(0, 3, 1, 2),
    "permuted": lambda b: b[:1200].view(4, 10, 30).permute(2, 0, 1),
    "unaligned": lambda b: b[1:1201].view(40, 30),
    "columns with gaps": lambda b: b[:1200].view(40, 30)[:, ::2],
    "rows with gaps": lambda b: b[:1200].view(40, 30)[::3],
    "transposed with gaps": lambda b: b[:1200].view(30, 40)[:, :7].t(),
    "size-1 dimensions with odd strides": lambda b: b.as_strided((1, 300, 1), (7, 1, 999), 2),
}


@pytest.mark.fast
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("grad_layout", ["like", "contiguous", "transposed", "expanded", "strided"])
@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_layouts(layout, grad_layout, foreach, dtype, device, path):
    memory = backing(1300, device, dtype)
    twin = memory.clone()
    untouched = memory.clone()
    ours, theirs = nn.Parameter(layout(memory)), nn.Parameter(layout(twin))
    layout(untouched).fill_(0)
    mine = AdamW([ours], foreach=foreach, amsgrad=True, **OPTIONS)
    reference = torch.optim.AdamW([theirs], foreach=False, amsgrad=True, **OPTIONS)
    for _ in range(3):
        grad = torch.randn(ours.shape, device=device, dtype=dtype)
        if grad_layout == "like":
            grad = torch.empty_like(ours).copy_(grad)
        elif grad_layout == "transposed":
            backwards = list(reversed(range(grad.dim())))
            grad = grad.permute(backwards).contiguous().permute(backwards)
        elif grad_layout == "expanded":
            grad = grad.reshape(-1)[:1].sum().expand(ours.shape)
        elif grad_layout == "strided":
            grad = torch.stack((grad, grad * 7), dim=-1)[..., 0]
        saved = grad.clone()
        ours.grad, theirs.grad = grad, grad.clone()
        mine.step()
        reference.step()
        assert torch.equal(grad, saved)
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            state, expected = mine.state[ours][name], reference.state[theirs][name]
            torch.testing.assert_close(state, expected, rtol=2e-6, atol=2e-7)
            assert state.stride() == expected.stride() and state.dtype == dtype
    layout(memory).detach().fill_(0)
    assert torch.equal(bits(memory), bits(untouched)), "memory that is not the parameter's was written"


@pytest.mark.parametrize("foreach", [True, False])
def test_conjugated_and_negated_gradients(foreach, device, path):
    """Lazy views: the memory holds something else than the values."""
    ours, real = (nn.Parameter(torch.randn(50, dtype=d, device=device)) for d in (torch.complex64, torch.float32))
    grad = torch.randn(50, dtype=torch.complex64, device=device)
    ours.grad = grad.conj()
    real.grad = grad.conj().imag
    assert ours.grad.is_conj() and real.grad.is_neg()
    twins = [nn.Parameter(p.detach().clone()) for p in (ours, real)]
    for twin, p in zip(twins, (ours, real), strict=True):
        twin.grad = p.grad.resolve_conj().resolve_neg().clone()
    AdamW([ours, real], foreach=foreach, **OPTIONS).step()
    torch.optim.AdamW(twins, foreach=False, **OPTIONS).step()
    torch.testing.assert_close([ours, real], twins, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("foreach", [True, False])
def test_gradient_of_another_dtype(grad_dtype, foreach, device, path):
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 1100, device=device)) for _ in range(2))
    allow_any_grad_dtype(ours)
    mine, reference = AdamW([ours], foreach=foreach, **OPTIONS), torch.optim.AdamW([theirs], foreach=False, **OPTIONS)
    for step in range(4):
        ours.grad = torch.randn(1100, device=device).to(grad_dtype if step != 2 else torch.float32)
        theirs.grad = ours.grad.float()
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def test_one_address_for_changing_layouts(device, path):
    """Allocators hand the same memory out again: a gradient may keep its address and change its strides."""
    memory = torch.randn(30 * 30, device=device)
    ours, theirs = (nn.Parameter(torch.eye(30, device=device)) for _ in range(2))
    mine, reference = AdamW([ours], **OPTIONS), torch.optim.AdamW([theirs], foreach=False, **OPTIONS)
    for transposed in (False, True, True, False, True):
        square = memory.view(30, 30)
        ours.grad = square.t() if transposed else square
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


def test_tied_and_duplicate_parameters(device, path):
    embedding, head = nn.Embedding(20, 30).to(device), nn.Linear(30, 20, bias=False).to(device)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    twin = nn.Parameter(head.weight.detach().clone())
    mine, reference = AdamW(model.parameters(), **OPTIONS), torch.optim.AdamW([twin], foreach=False, **OPTIONS)
    with pytest.warns(UserWarning, match="duplicate parameters"):
        duplicated = AdamW([embedding.weight, head.weight], **OPTIONS)
    for optimizer in (mine, duplicated):
        head.weight.grad = torch.randn(20, 30, device=device)
        twin.grad = head.weight.grad.clone()
        reference.state.clear()
        optimizer.step()
        reference.step()
        torch.testing.assert_close(head.weight, twin, rtol=2e-6, atol=2e-7)


def test_parameters_that_share_memory_step_one_after_the_other(device, path):
    memory = torch.randn(3000, device=device)
    twin = memory.clone()
    slices = (slice(0, 2000), slice(1000, 3000), slice(500, 1500))
    ours, theirs = [nn.Parameter(memory[s]) for s in slices], [nn.Parameter(twin[s]) for s in slices]
    mine, reference = AdamW(ours, **OPTIONS), torch.optim.AdamW(theirs, foreach=False, **OPTIONS)
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        reference.step()
        torch.testing.assert_close(memory, twin, rtol=2e-6, atol=4e-7)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_function_with_moments_in_another_layout(layout, device, path):
    param = layout(backing(1300, device))
    grad, exp_avg, exp_avg_sq = (torch.rand(param.shape, device=device) for _ in range(3))
    twins = [t.contiguous().clone() for t in (param, grad, exp_avg, exp_avg_sq)]
    tensors = [param, grad, exp_avg, exp_avg_sq]
    for ts in (tensors, twins):
        adamw_(*ts, step=3, lr=0.1)
    torch.testing.assert_close(tensors, twins, rtol=0, atol=0)


def test_layout_predicates():
    base = torch.zeros(4, 6)
    assert is_dense(base) and is_dense(base.t()) and is_dense(base[1:]) and is_dense(base[0, 0]) and is_dense(base[:0])
    assert not is_dense(base[:, :5]) and not is_dense(base[::2]) and not is_dense(base[:1].expand(4, 6))
    assert overlaps_itself(base[:1].expand(4, 6))
    assert overlaps_itself(torch.zeros(10).as_strided((3, 3), (1, 1)))
    assert overlaps_itself(torch.zeros(10).as_strided((3, 3), (2, 1)))
    assert not overlaps_itself(torch.zeros(10).as_strided((2, 3), (3, 2)))  # interleaved, all places distinct
    assert not any(map(overlaps_itself, (base, base.t(), base[:, ::2], base[::2].t(), base[:0].expand(0, 6))))
    assert same_strides(torch.zeros(1, 5), torch.zeros(5, 1).t()) and not same_strides(
        torch.zeros(2, 5), torch.zeros(5, 2).t()
    )
