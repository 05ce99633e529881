"""Gradient release on sharded parameters: the same steps, while the backward pass goes on."""

import math

import pytest
import torch
import torch.distributed as dist
from training import BF16, OPTIONS, spoil
from wrappers import batch, loss_of, wrap

from adamw_triton import AdamW, register_gradient_release

WRAPPERS = [
    pytest.param(world, wrapper, id=f"{wrapper}-{world}")
    for world, wrapper in [
        ("world2", "fsdp2"),
        ("world2", "tp"),
        ("world4", "hsdp"),
        ("world4", "tp-fsdp2"),
        ("kernels2", "fsdp2"),
    ]
]


def accumulate(wrapper, released, n_steps):
    """Steps over two micro-batches each. The whole parameters, and whether gradients were gone after each."""
    wrapped = wrap(wrapper, BF16)
    optimizer = AdamW(wrapped.params, **OPTIONS, stochastic_rounding=True)
    handle = register_gradient_release(wrapped.model, optimizer) if released else None
    are_gone = []
    for step in range(n_steps):
        first, second = (loss_of(wrapped.model, part) for part in wrapped.part_of(batch(step)).chunk(2))
        if handle is None:
            first.backward()
            second.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            with handle.accumulate():
                first.backward()
            second.backward()
        are_gone.append(all(param.grad is None for param in wrapped.params))
    return wrapped.full_params(), are_gone


@pytest.mark.parametrize(("world", "wrapper"), WRAPPERS, indirect=["world"])
def test_accumulation(world, wrapper):
    """Random bits as well: they are those of the parameter's number, whichever is stepped first."""
    n_steps = 1 if world.kernels else 2
    expected, _ = world.run(accumulate, wrapper=wrapper, released=False, n_steps=n_steps)[0]
    for found, are_gone in world.run(accumulate, wrapper=wrapper, released=True, n_steps=n_steps):
        assert are_gone == n_steps * [True]
        assert all(map(torch.equal, found, expected))


def skip_one(wrapper):
    """An infinity in one rank's part of one gradient. Names of what moved, and what it should be."""
    wrapped = wrap(wrapper)
    optimizer = AdamW(wrapped.params, **OPTIONS, skip_nonfinite=True)
    target = wrapped.params[wrapped.index_of("block.v.weight")]
    target.register_post_accumulate_grad_hook(lambda param: spoil(param, math.inf))
    register_gradient_release(wrapped.model, optimizer)
    start = wrapped.full_params()
    loss_of(wrapped.model, wrapped.part_of(batch(0))).backward()
    names = [name for name, _ in wrapped.model.named_parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(start, wrapped.full_params(), strict=True)]
    still = [name for name, has_moved in zip(names, moved, strict=True) if not has_moved]
    return still, bool(optimizer.state[target]["step"] == 0), dist.get_rank()


@pytest.mark.parametrize(("world", "wrapper"), WRAPPERS[:2], indirect=["world"])
def test_all_ranks_skip_a_parameter_that_one_has_an_infinity_of(world, wrapper):
    for still, is_not_counted, _ in world.run(skip_one, wrapper=wrapper):
        assert still == ["block.v.weight"] and is_not_counted
