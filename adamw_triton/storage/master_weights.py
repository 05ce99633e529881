"""Master weights: a bf16 parameter and its remainder are one fp32 number. kernels/storage.py describes the format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..strides import dense

REMAINDERS = {32: torch.int16, 24: torch.int8}
ENTRIES = ("param_remainder", "master_param")


def remainder_entry(remainder: Tensor) -> Tensor:
    """Return a remainder as it is kept in the state: of 16 bits two bytes, uint8 with a last dimension of 2.

    Neither NCCL nor gloo can send int16. The memory is that of the remainder, unless that is of bytes that no int16 can
    be made of.
    """
    if remainder.dtype == torch.int16:
        return remainder.unsqueeze(-1).view(torch.uint8)
    try:
        remainder_of(remainder)
    except RuntimeError:
        return remainder.clone(memory_format=torch.contiguous_format)
    return remainder


def remainder_of(entry: Tensor) -> Tensor:
    """Return what `remainder_entry` made an entry of: int16 or int8, the entry's memory.

    Raises:
        RuntimeError: the two bytes of an element do not lie together.
    """
    return entry.view(torch.int16).squeeze(-1) if entry.dtype == torch.uint8 else entry


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """Return the float32 weights of a bf16 parameter and its int16 or int8 remainder, dense."""
    high = dense(param).to(torch.float32).view(torch.int32)
    shift = 16 - torch.iinfo(remainder.dtype).bits
    return (high + (remainder.to(torch.int32) << shift)).view(torch.float32)


def split(weight: Tensor, dtype: torch.dtype, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the bf16 parameter and the remainder of float32 weights; `join` is the inverse.

    Args:
        weight: float32.
        dtype: of the remainder, int16 or int8.
        noise: 16 random bits for each element, int32; 8 of them round a remainder of 8 bits.
    """
    # A carry out of a NaN's ones would make it -0.0.
    bits = torch.where(weight.isnan(), 0x7FC00000, weight.view(torch.int32))
    shift = 16 - torch.iinfo(dtype).bits
    if shift:
        bits = bits + (0x80 if noise is None else noise >> 8)
    high = (bits + 0x8000) >> 16
    remainder = (bits - (high << 16)) >> shift
    return (high << 16).view(torch.float32).to(torch.bfloat16), remainder.to(dtype)


def nearest_remainder(param: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the remainder that brings a bf16 parameter, which stays, closest to float32 weights."""
    limits = torch.iinfo(dtype)
    shift = 16 - limits.bits
    rest = weight.view(torch.int32) - dense(param).to(torch.float32).view(torch.int32)
    return ((rest + (1 << shift >> 1)) >> shift).clamp(limits.min, limits.max).to(dtype)


def master_weight(param: Tensor, entries: Mapping[str, Any]) -> Tensor:
    """Return the float32 value of a parameter with what its state adds to it; of a float64 or complex one its own.

    A step leaves a parameter that is its float32 master rounded: where it is not, it was written by others since, and
    is the weight itself.
    """
    if "param_remainder" in entries:
        return join(param.detach(), remainder_of(entries["param_remainder"]))
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return param.detach()
    weight = param.detach().to(torch.float32)
    if "master_param" not in entries:
        return weight
    master = entries["master_param"]
    bits = torch.int16 if param.dtype.itemsize == 2 else torch.int32
    untouched = master.to(param.dtype).view(bits) == param.detach().view(bits)
    return torch.where(untouched, master, weight)
