"""How the elements of a tensor lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, size in _dimensions(tensor):
        if stride != expected:
            return False
        expected *= size
    return True


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lay their elements out alike; strides of dimensions of size 1 are moot."""
    return a.numel() == 0 or all(
        size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory, as after `expand`."""
    reach = 1
    for stride, size in _dimensions(tensor):
        if stride < reach:
            # Not nested: either overlapping or interleaved, which only counting the places can tell.
            span = 1 + sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True))
            places = torch.arange(span).as_strided(tensor.shape, tensor.stride())
            return bool(places.unique().numel() < tensor.numel())
        reach = stride * (size - 1) + reach
    return False


def _dimensions(tensor: Tensor) -> list[tuple[int, int]]:
    if tensor.numel() == 0:
        return []
    return sorted((t, s) for s, t in zip(tensor.shape, tensor.stride(), strict=True) if s != 1)
