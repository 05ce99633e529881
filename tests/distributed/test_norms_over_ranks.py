"""Norms over all ranks: of every mesh, of stages of a pipeline, and with gradients that only some ranks have."""

import math

import pytest
import torch
import torch.distributed as dist
from handmade import OPTIONS, SHARDED_GROUPS, make, set_grads, steps, values
from parts import local
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from wrappers import mesh_of

from adamw_triton import AdamW

DEALS = [pytest.param(f"world{size}", deal, id=f"{deal}x{size}") for deal, size in SHARDED_GROUPS] + [
    pytest.param(f"kernels{size}", deal, id=f"kernels-{deal}x{size}")
    for deal, size in [("fsdp2", 2), ("tp", 2), ("several-meshes", 4), ("tp-fsdp2", 4)]
]
DIGITS = 1e-6


def length(tensors):
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors))


def is_close(value, expected):
    return math.isclose(value, expected, rel_tol=DIGITS)


def norms(deal):
    """All norms after each of two steps."""
    params, optimizer = make(deal, max_grad_norm=0.7, statistics=True)
    found = []
    for step in range(2):
        steps(deal, params, optimizer, step, step + 1)
        found.append((optimizer.grad_norm.item(), optimizer.update_norm.item(), optimizer.param_norm.item()))
    return found


def norms_alone():
    return norms("plain") if dist.get_rank() == 0 else None


@pytest.mark.parametrize(("world", "deal"), DEALS, indirect=["world"])
def test_norms_are_those_of_one_process(world, deal):
    """Also where torch's clip_grad_norm_ refuses: plain tensors next to DTensors, and several meshes."""
    results = world.run(norms, deal=deal)
    assert all(result == results[0] for result in results), "ranks have different norms"
    for step, (found, expected) in enumerate(zip(results[0], world.run(norms_alone)[0], strict=True)):
        assert is_close(found[0], length(values(1 + step, torch.float32)))
        assert all(map(is_close, found, expected)), f"{found} are not {expected}"


def norms_with_missing_gradients(deal):
    """Norm at each step, and the sum of squares that this rank contributes."""
    params, optimizer = make(deal, max_grad_norm=0.7, skip_nonfinite=True, statistics=True)
    found = []
    for step in range(4):
        set_grads(deal, params, values(1 + step, torch.float32))
        for i, param in enumerate(params):
            if (step == 1 and dist.get_rank() == 1 and i % 2) or (step == 2 and dist.get_rank() == 0) or i == 3:
                param.grad = None
        before = [local(param.detach()).clone() for param in params]
        optimizer.step()
        moved = [not torch.equal(local(param), old) for param, old in zip(params, before, strict=True)]
        has_some = [param.grad is not None and local(param).numel() > 0 for param in params]
        squares = sum(local(param.grad).double().square().sum().item() for param in params if param.grad is not None)
        found.append((optimizer.grad_norm.item(), squares, moved == has_some))
    return found


@pytest.mark.parametrize("world", ["world2", "kernels2"], indirect=True)
def test_gradients_that_only_some_ranks_have(world):
    """Nobody waits: what a rank lacks counts as zero, and what it has is stepped."""
    for at_0, at_1 in zip(*world.run(norms_with_missing_gradients, deal="fsdp2"), strict=True):
        assert at_0[0] == at_1[0] and is_close(at_0[0], math.sqrt(at_0[1] + at_1[1]))
        assert at_0[2] and at_1[2], "not exactly what has a gradient was stepped"


def norms_of_stages(infinite):
    """Two stages of different parameters, each on one rank, or sharded over two."""
    size = dist.get_world_size()
    mesh = mesh_of(2, size // 2, names=("stage", "data"))
    stage = mesh["stage"].get_local_rank()
    generator = torch.Generator().manual_seed(stage)
    model = nn.Linear(5, 3 + stage)
    if size > 2:
        fully_shard(model, mesh=mesh["data"])
    params = list(model.parameters())
    optimizer = AdamW(params, max_grad_norm=0.5, skip_nonfinite=True, norm_group=mesh.get_group("stage"), **OPTIONS)
    found = []
    for step in range(3):
        squares = 0.0
        for param in params:
            grad = torch.randn(param.shape, generator=generator)
            squares += grad.double().square().sum().item()
            if isinstance(param, DTensor):
                part = grad.chunk(2)[mesh["data"].get_local_rank()].clone()
                param.grad = DTensor(part, param._spec, requires_grad=False)
            else:
                param.grad = grad
        if infinite and step == 1 and dist.get_rank() == 0:
            local(params[0].grad)[0, 0] = math.inf
        before = local(params[0].detach()).clone()
        optimizer.step()
        is_same = torch.equal(before, local(params[0]))
        found.append((stage, squares, optimizer.grad_norm.item(), is_same, int(optimizer.skipped_steps)))
    return found


@pytest.mark.parametrize("infinite", [False, True], ids=["", "infinite"])
@pytest.mark.parametrize("world", ["world2", "world4", "kernels2"], indirect=True)
def test_norm_over_stages_of_a_pipeline(world, infinite):
    """Each stage clips by the norm of the whole model, and skips if another has an infinity."""
    results = world.run(norms_of_stages, infinite=infinite)
    for step, of_ranks in enumerate(zip(*results, strict=True)):
        squares = {stage: its_squares for stage, its_squares, *_ in of_ranks}
        assert len(squares) == 2
        skips = infinite and step == 1
        expected = math.inf if skips else math.sqrt(sum(squares.values()))
        for _, _, norm, is_same, n_skipped in of_ranks:
            assert is_close(norm, expected) and norm == of_ranks[0][2]
            assert is_same == skips and n_skipped == int(infinite and step >= 1)
