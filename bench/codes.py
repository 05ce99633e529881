"""How optimizers store moments in 8 bits, each as a function from a value to what is read back; none is a kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from adamw_triton import storage


class Code(NamedTuple):
    """What `exp_avg` and `exp_avg_sq` (flat float32) become by being stored."""

    exp_avg: Callable[[Tensor], Tensor]
    exp_avg_sq: Callable[[Tensor], Tensor]
    bytes_per_element: float  # of both


def _grouped(value: Tensor, size: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Groups of `size` elements relative to the largest magnitude of each, and these, rounded to what stores them."""
    padded = torch.zeros(-(-value.numel() // size) * size)
    padded[: value.numel()] = value
    groups = padded.view(-1, size)
    scale = groups.abs().amax(dim=1, keepdim=True).to(scale_dtype).float()
    return (groups / scale).nan_to_num(0.0, 0.0, 0.0).clamp(-1, 1), scale


def _restored(relative: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    return (relative * scale).view(-1)[: like.numel()]


def _ours(name: str) -> Callable[[Tensor], Tensor]:
    return lambda value: storage.decode(name, *storage.encode(name, value))


def _ours_stochastic(name: str) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)  # the same bits for both moments

    def store(value: Tensor) -> Tensor:
        noise = torch.randint(2**16, (value.numel(),), dtype=torch.int32, generator=generator)
        return storage.decode(name, *storage.encode(name, value, noise))

    return store


def _linear(value: Tensor) -> Tensor:
    relative, scale = _grouped(value, storage.GROUP_SIZE)
    return _restored((relative * 127).round() / 127, scale, value)


def _linear_root(value: Tensor) -> Tensor:
    relative, scale = _grouped(value.sqrt(), storage.GROUP_SIZE)
    return _restored((relative * 255).round() / 255, scale, value).square()


def _softsign(value: Tensor) -> Tensor:
    """FlashOptim's exp_avg: y = 2x / (1 + |x|) in 127 steps, one fp16 scale for 32."""
    relative, scale = _grouped(value, 32, torch.float16)
    code = (127 * 2 * relative / (1 + relative.abs())).round() / 127
    return _restored(code / (2 - code.abs()), scale, value)


def _root_of_32(value: Tensor) -> Tensor:
    """FlashOptim's exp_avg_sq: sqrt(v) in 255 steps, one fp16 scale for 32."""
    relative, scale = _grouped(value.sqrt(), 32, torch.float16)
    return _restored((relative * 255).round() / 255, scale, value).square()


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The values of dynamic tree quantization (Dettmers et al., https://arxiv.org/abs/2110.02861), sorted.

    Each power of ten from 1e-6 to 1 has twice as many values as the one below, the middles of equal intervals.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        count = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        positive = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)).tolist()
        values += positive + [-value for value in positive if signed]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _dynamic(signed: bool) -> Callable[[Tensor], Tensor]:
    """torchao's (and bitsandbytes') moments: the nearest value of `dynamic_map`, one fp32 scale for 256."""

    def store(value: Tensor) -> Tensor:
        values = dynamic_map(signed)
        relative, scale = _grouped(value, 256)
        middles = (values[:-1] + values[1:]) / 2
        return _restored(values[torch.bucketize(relative, middles)], scale, value)

    return store


def _bf16(value: Tensor) -> Tensor:
    return value.bfloat16().float()


def _same(value: Tensor) -> Tensor:
    return value


CODES = {
    "fp32": Code(_same, _same, 8),
    "bf16": Code(_bf16, _bf16, 4),
    "adamw_triton 8-bit": Code(_ours("exp_avg"), _ours("exp_avg_sq"), 2 + 2 * 4 / 128),
    "adamw_triton 8-bit, stochastic": Code(
        _ours_stochastic("exp_avg"), _ours_stochastic("exp_avg_sq"), 2 + 2 * 4 / 128
    ),
    "flashoptim 8-bit": Code(_softsign, _root_of_32, 2 + 2 * 2 / 32),
    "torchao 8-bit": Code(_dynamic(signed=True), _dynamic(signed=False), 2 + 2 * 4 / 256),
    "linear 8-bit": Code(_linear, _linear_root, 2 + 2 * 4 / 128),
}
