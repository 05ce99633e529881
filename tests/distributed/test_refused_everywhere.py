"""What cannot work is refused on every rank, in a sentence that says what to do."""

import warnings

import pytest
import torch
import torch.distributed as dist
from handmade import OPTIONS, Layers, changed, local_contents, make, refusal, set_grads, values
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.placement_types import Shard
from wrappers import batch, loss_of, mesh_of, wrap

from adamw_triton import AdamW, register_gradient_release

NORM_OPTIONS = {
    "max_grad_norm": 1.0,
    "skip_nonfinite": True,
    "skip_grad_norm_above": 1.0,
    "statistics": True,
}


def plain_gradient(options):
    """Two steps with one, of which the second could reuse a plan; the errors, and what changed."""
    params, optimizer = make("fsdp2", **options)
    found = []
    for step in range(2):
        set_grads("fsdp2", params, values(1 + step, torch.float32))
        right, params[2].grad = params[2].grad, None
        params[2].grad = torch.ones(params[2].shape)
        before = local_contents(params, optimizer)
        found.append((refusal(optimizer.step), changed(before, local_contents(params, optimizer))))
        params[2].grad = None
        params[2].grad = right
        optimizer.step()
    return found


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["", "max_grad_norm"])
@pytest.mark.parametrize("world", ["world2", "kernels2"], indirect=True)
def test_plain_gradient_of_a_dtensor(world, options):
    for of_rank in world.run(plain_gradient, options=options):
        for error, written in of_rank:
            assert error.startswith("RuntimeError") and "distribute_tensor" in error
            assert written == []


def gradient_on_another_mesh(other):
    """A parameter on the first dimension of a mesh of 2 x 2, its gradient elsewhere. The error, and what changed."""
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    meshes = {"the other dimension": mesh["tensor"], "all ranks": mesh_of(4, names=("data",))}
    torch.manual_seed(0)
    param = nn.Parameter(distribute_tensor(torch.randn(8, 3), mesh["data"], [Shard(0)]))
    param.grad = distribute_tensor(torch.randn(8, 3), meshes[other], [Shard(0)])
    before = param._local_tensor.detach().clone()
    error = refusal(AdamW([param], max_grad_norm=1.0).step)
    return error, torch.equal(before, param._local_tensor)


@pytest.mark.parametrize("other", ["the other dimension", "all ranks"])
def test_gradient_on_another_mesh(world4, other):
    """Of which the placements may be the parameter's, and the local shape too."""
    for error, is_same in world4.run(gradient_on_another_mesh, other=other):
        assert error is not None and error.startswith("RuntimeError") and "mesh" in error
        assert is_same


def built_before(shard):
    """An optimizer, then perhaps `fully_shard`, then two steps; the warnings."""
    model = Layers()
    optimizer = AdamW(model.parameters(), **OPTIONS)
    if shard:
        fully_shard(model, mesh=mesh_of(dist.get_world_size(), names=("data",)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.ones(2, 16)).sum().backward()
            optimizer.step()
    return [f"{warning.category.__name__}: {warning.message}"[:300] for warning in seen]


def test_optimizer_built_before_fully_shard(world2):
    for seen in world2.run(built_before, shard=True):
        assert len(seen) == 1, seen
        (warning,) = seen
        assert warning.startswith("UserWarning") and "fully_shard" in warning and "after" in warning
    assert world2.run(built_before, shard=False) == [[], []]


def norm_of_flat_shards(wrapper, option, later):
    """An option that needs a norm over parameters of FSDP1, given at once or later; the error."""
    wrapped = wrap(wrapper)
    if not later:
        return refusal(AdamW, wrapped.params, **{option: NORM_OPTIONS[option]}) or refused_at_step(wrapped, option)
    optimizer = AdamW(wrapped.params)
    setattr(optimizer, option, NORM_OPTIONS[option])
    loss_of(wrapped.model, wrapped.part_of(batch(0))).backward()
    return refusal(optimizer.step)


def refused_at_step(wrapped, option):
    """The error where the constructor cannot know: before the first forward."""
    optimizer = AdamW(wrapped.params, **{option: NORM_OPTIONS[option]})
    loss_of(wrapped.model, wrapped.part_of(batch(0))).backward()
    return refusal(optimizer.step)


@pytest.mark.parametrize("later", [False, True], ids=["", "later"])
@pytest.mark.parametrize("option", NORM_OPTIONS)
@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp1-flat"])
def test_norms_of_flat_shards(world2, wrapper, option, later):
    for error in world2.run(norm_of_flat_shards, wrapper=wrapper, option=option, later=later):
        assert error is not None and error.startswith(("ValueError", "RuntimeError"))
        assert option in error and "clip_grad_norm_" in error and "fully_shard" in error


def release_of_flat_shards(wrapper):
    wrapped = wrap(wrapper)
    return refusal(register_gradient_release, wrapped.model, AdamW(wrapped.params))


@pytest.mark.parametrize("wrapper", ["fsdp1", "fsdp1-flat"])
def test_gradient_release_of_flat_shards(world2, wrapper):
    for error in world2.run(release_of_flat_shards, wrapper=wrapper):
        assert error is not None and error.startswith(("ValueError", "RuntimeError"))
        assert "FullyShardedDataParallel" in error and "fully_shard" in error


def norm_under_zero():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    params = wrap("ddp").params
    return refusal(ZeroRedundancyOptimizer, params, optimizer_class=AdamW, max_grad_norm=1.0)


def test_norm_under_zero(world2):
    for error in world2.run(norm_under_zero):
        assert error is not None and "max_grad_norm" in error
        assert "ZeroRedundancyOptimizer" in error and "clip_grad_norm_" in error


def no_process_group(group):
    return refusal(AdamW, [nn.Parameter(torch.zeros(1))], norm_group=group)


def test_what_is_no_process_group(world2):
    for error in world2.run(no_process_group, group="world"):
        assert error is not None and error.startswith(("TypeError", "ValueError")) and "ProcessGroup" in error
