"""8-bit moments: codes of groups of elements that share a scale. kernels/storage.py describes the format."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..strides import dense, flat

GROUP_SIZE = 128  # elements that share a scale


class Coded(NamedTuple):
    """How a moment is stored in 8 bits: dtype of the codes, and names of the state entries of codes and scales."""

    dtype: torch.dtype
    codes: str
    scale: str


CODED = {
    "exp_avg": Coded(torch.int8, "exp_avg_codes", "exp_avg_scale"),
    "exp_avg_sq": Coded(torch.uint8, "exp_avg_sq_codes", "exp_avg_sq_scale"),
}
_SMALLEST_SQUARED = 16.0001  # of codes of exp_avg_sq, 4²: the least that all random bits round to 4 or more
_BELOW_SQUARED = 4.5**2  # what random bits round instead of less, to 4 or 5
_LARGEST_SQUARED = {"exp_avg": 127**2 * (1 + 2**-20), "exp_avg_sq": 255**2 * (1 + 2**-20)}
_NOT_ZERO = 1e-30
_SMALLEST_SCALE = 1e-33


def n_groups(n_elements: int) -> int:
    return -(-n_elements // GROUP_SIZE)


def scale_shape(like: Tensor) -> tuple[int, int] | None:
    """Return the shape of the scales of a parameter whose moments can have 8 bits; None if they cannot.

    They can where a row, which is all that follows the first dimension, is a multiple of GROUP_SIZE elements, and lies
    in one piece of memory. Groups then never cross a row, and the scales, (rows, groups of a row), can be sliced,
    concatenated and sharded along the first dimension as the parameter is.

    Args:
        like: a tensor in the shape and the dense layout of the parameter's state.
    """
    row = math.prod(like.shape[1:])
    if not row or row % GROUP_SIZE or (like.shape[0] > 1 and like.stride(0) != row):
        return None
    return like.shape[0], row // GROUP_SIZE


def decode(name: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of a moment, in the layout of its codes.

    Args:
        name: "exp_avg" or "exp_avg_sq".
        codes: int8 or uint8; gaps between them do not count.
        scale: float32 of n_groups elements, contiguous.
    """
    codes = dense(codes)
    value = torch.empty_like(codes, dtype=torch.float32)
    largest = 127 if name == "exp_avg" else 255
    units = _per_element(scale.reshape(-1) * (1.0 / largest**2), codes.numel())
    code = flat(codes).to(torch.float32)
    root = code * code.abs() * units
    flat(value).copy_(root if name == "exp_avg" else root * root)
    return value


def encode(name: str, value: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the codes and the scales [n_groups] of a dense floating-point tensor; `decode` is the inverse.

    Args:
        name: "exp_avg" or "exp_avg_sq".
        value: the moment.
        noise: 16 random bits for each element in the order of memory, int32, to round codes up or down with the
            probabilities that make the mean of the decoded values exact; None: to the nearest.
    """
    value = value.to(torch.float32)
    codes = torch.empty_like(value, dtype=CODED[name].dtype)
    n_elements = value.numel()
    magnitude = flat(value).abs() if name == "exp_avg" else flat(value).sqrt()
    padded = torch.zeros(n_groups(n_elements) * GROUP_SIZE, dtype=torch.float32, device=value.device)
    padded[:n_elements] = magnitude
    scale = padded.view(-1, GROUP_SIZE).amax(dim=1)
    rsqrt = scale.clamp(min=_SMALLEST_SCALE).rsqrt()
    squared = magnitude * _per_element(_LARGEST_SQUARED[name] * rsqrt * rsqrt, n_elements)
    if name == "exp_avg":
        code = _nearest_root(squared) if noise is None else _stochastic_root(squared, noise)
        code = torch.where(flat(value) < 0, -code, code)
    else:
        # A v that is lost while its m is not throws its weight away.
        squared = squared.nan_to_num(0.0)
        if noise is None:
            code = _nearest_root(squared.clamp(min=_SMALLEST_SQUARED))
        else:
            squared = torch.where(squared >= _SMALLEST_SQUARED, squared, _BELOW_SQUARED)
            code = _stochastic_fourth_root(squared, noise)
    flat(codes).copy_(code)
    return codes, scale


def _nearest_root(squared: Tensor) -> Tensor:
    return (squared * (squared + _NOT_ZERO).rsqrt()).nan_to_num(0.0).round()


def _stochastic_root(squared: Tensor, noise: Tensor) -> Tensor:
    """Round y, given y², so that the mean of the rounded squares is y²; kernels/storage.py says how."""
    centred = _centred(noise)
    squared = centred * centred + (squared - 0.25)
    squared = squared.nan_to_num(0.0).clamp(min=_NOT_ZERO)
    return (squared * squared.rsqrt() - centred).clamp(max=127.0).round()


def _stochastic_fourth_root(squared: Tensor, noise: Tensor) -> Tensor:
    """Round y >= 4, given y², so that the mean of the fourth powers is y⁴."""
    centred = _centred(noise)
    spread = centred * centred - 0.25
    squared = spread * 3.0 + squared
    rsqrt = squared.rsqrt()
    shift = spread * (rsqrt * rsqrt) * (centred * -1.94 - 0.08) - centred
    return (squared * rsqrt + shift).clamp(max=255.0).round()


def _centred(noise: Tensor) -> Tensor:
    return noise.to(torch.float32) * 2.0**-16 - (0.5 - 2.0**-16)


def _per_element(of_group: Tensor, n_elements: int) -> Tensor:
    return of_group.repeat_interleave(GROUP_SIZE)[:n_elements]
