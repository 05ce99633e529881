"""How the elements of a tensor lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory without gaps or overlaps, in any order of dimensions."""
    return fill_memory(tensor.shape, tensor.stride())


def fill_memory(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether a shape and its strides leave no gaps and no overlaps."""
    expected = 1
    for stride, size in _dimensions(shape, strides):
        if stride != expected:
            return False
        expected *= size
    return True


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape lay their elements out alike; strides of dimensions of size 1 are moot."""
    return strides_agree(a.shape, a.stride(), b.stride())


def strides_agree(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two sets of strides lay out the elements of a shape alike."""
    return 0 in shape or all(size == 1 or x == y for size, x, y in zip(shape, a, b, strict=True))


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements share memory, as after `expand`."""
    reach = 1
    for stride, size in _dimensions(tensor.shape, tensor.stride()):
        if stride < reach:
            # Not nested: either overlapping or interleaved, which only counting the places can tell.
            span = 1 + sum((s - 1) * t for s, t in zip(tensor.shape, tensor.stride(), strict=True))
            places = torch.arange(span, dtype=torch.int64, device="cpu").as_strided(tensor.shape, tensor.stride())
            return bool(places.unique().numel() < tensor.numel())
        reach = stride * (size - 1) + reach
    return False


def dense(tensor: Tensor) -> Tensor:
    """Return a tensor without gaps: the tensor itself, or a copy."""
    return tensor if is_dense(tensor) else torch.empty_like(tensor).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """Return the elements of a dense tensor in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


def real_view(tensor: Tensor) -> Tensor:
    """Return a complex tensor as one of real numbers, and any other as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _dimensions(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    if 0 in shape:
        return []
    return sorted((t, s) for s, t in zip(shape, strides, strict=True) if s != 1)
