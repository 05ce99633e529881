"""8-bit moments: codes of groups of elements that share a scale. kernels/storage.py describes the format."""

from __future__ import annotations

import torch
from torch import Tensor

from ..strides import flat

GROUP_SIZE = 128  # elements that share a scale
SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
CODES = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
_NOT_ZERO = 1e-30
_SMALLEST_SCALE = 1e-33


def n_groups(n_elements: int) -> int:
    return -(-n_elements // GROUP_SIZE)


def decode(name: str, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of a moment, in the layout of its codes.

    Args:
        name: "exp_avg" or "exp_avg_sq".
        codes: int8 or uint8, dense.
        scale: float32 [n_groups].
    """
    value = torch.empty_like(codes, dtype=torch.float32)
    largest = 127 if name == "exp_avg" else 255
    units = _per_element(scale * (1.0 / largest**2), codes.numel())
    code = flat(codes).to(torch.float32)
    root = code * code.abs() * units
    flat(value).copy_(root if name == "exp_avg" else root * root)
    return value


def encode(name: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes and the scale of a dense floating-point tensor; `decode` is the inverse."""
    value = value.to(torch.float32)
    codes = torch.empty_like(value, dtype=CODES[name])
    n_elements = value.numel()
    magnitude = flat(value) if name == "exp_avg" else flat(value).sqrt()
    padded = torch.zeros(n_groups(n_elements) * GROUP_SIZE, dtype=torch.float32, device=value.device)
    padded[:n_elements] = magnitude.abs()
    scale = padded.view(-1, GROUP_SIZE).amax(dim=1)
    largest = 127.0 if name == "exp_avg" else 255.0
    squared = magnitude * _per_element(largest**2 / scale.clamp(min=_SMALLEST_SCALE), n_elements)
    code = (squared * (squared.abs() + _NOT_ZERO).rsqrt()).nan_to_num(0.0).round()
    if name == "exp_avg_sq":
        code.clamp_(min=1)  # a v that is lost while its m is not throws its weight away
    flat(codes).copy_(code)
    return codes, scale


def _per_element(of_group: Tensor, n_elements: int) -> Tensor:
    return of_group.repeat_interleave(GROUP_SIZE)[:n_elements]
