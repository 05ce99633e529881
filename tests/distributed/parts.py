"""In the workers: which elements of whole parameters a rank has, found by sharding their indices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Parts = list[Tensor]  # of each parameter


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A plain copy of the whole tensor, on every rank."""
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def indices_of_parts(model: nn.Module, shard: Callable[[Any], Any]) -> Parts:
    """Return where in the whole, flattened, each of this rank's elements is.

    Args:
        model: of plain parameters, which is used up.
        shard: makes DTensors of them, in place.
    """
    model = model.double()
    for param in model.parameters():
        param.data.copy_(torch.arange(param.numel()).view_as(param))
    shard(model)
    return [local(param.detach()).long() for param in model.parameters()]


def on_first_rank(value: Any) -> list[Any]:
    """Return everyone's value, by rank; nothing on other ranks than the first."""
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def put_together(flat: Sequence[Tensor], indices: Sequence[Parts], shapes: Sequence[torch.Size]) -> Iterator[Parts]:
    """Return lists of whole tensors.

    Args:
        flat: of each rank, the parts of all tensors of all lists, flattened, one after the other.
        indices: where they are in the whole, of each rank, for each tensor of a list.
        shapes: of the whole tensors of a list.
    """
    sizes = [shape.numel() for shape in shapes]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    at = [torch.cat([start + i.flatten() for start, i in zip(starts, of_rank, strict=True)]) for of_rank in indices]
    for parts in zip(*(tensor.split(len(i)) for tensor, i in zip(flat, at, strict=True)), strict=True):
        whole = torch.full((sum(sizes),), torch.nan, dtype=flat[0].dtype)
        for part, i in zip(parts, at, strict=True):
            whole[i] = part
        yield [piece.view(shape) for piece, shape in zip(whole.split(sizes), shapes, strict=True)]
