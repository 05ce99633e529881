"""How each value is stored: which tensors that takes, and reading and writing them in eager torch.

The specification of kernels/storage.py, where the formats are described.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .layout import same_strides

GROUP_SIZE = 128  # elements of an 8-bit moment that share a scale
PHILOX_ROUNDS = 7
SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
EIGHT_BITS = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}
_REMAINDERS = {32: torch.int16, 24: torch.int8}
_NOT_ZERO = 1e-30
_SMALLEST_SCALE = 1e-33


class TensorState(NamedTuple):
    """What one parameter's update reads and writes besides the parameter."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    master: Tensor | None = None  # int16 or int8 remainder of a bf16 parameter, or a whole fp32 master
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None

    @classmethod
    def of(cls, entries: Mapping[str, Any], amsgrad: bool) -> TensorState:
        """From the optimizer's state of a parameter."""
        return cls(
            entries["exp_avg"],
            entries["exp_avg_sq"],
            entries["max_exp_avg_sq"] if amsgrad else None,
            entries.get("param_remainder", entries.get("master_param")),
            entries.get("exp_avg_scale"),
            entries.get("exp_avg_sq_scale"),
        )

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def each(self, function: Callable[[Tensor], Tensor]) -> TensorState:
        """With another tensor for each that there is."""
        return TensorState(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but floating-point moments."""
        return self.master is None and self.exp_avg_scale is None and self.exp_avg_sq_scale is None


class Rounding(NamedTuple):
    """Of values stored in bf16 or with a remainder of 8 bits: stochastic, by these numbers."""

    seed: int
    stream: int  # number of the parameter
    element_offset: int = 0  # index of its first element in the whole parameter


class Storage(NamedTuple):
    """Formats of the tensors of one launch."""

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    master: torch.dtype | None = None
    stochastic: bool = False

    @classmethod
    def of(cls, param: Tensor, grad: Tensor, state: TensorState, *, stochastic: bool = False) -> Storage:
        master = None if state.master is None else state.master.dtype
        return cls(param.dtype, grad.dtype, state.exp_avg.dtype, state.exp_avg_sq.dtype, master, stochastic)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Of all tensors that have an element for each of the parameter's."""
        return self[:4] if self.master is None else self[:5]  # type: ignore[return-value]


class Policy(NamedTuple):
    """The storage options of a param group."""

    exp_avg_dtype: torch.dtype | None
    exp_avg_sq_dtype: torch.dtype | None
    master_weight_bits: int | None
    stochastic_rounding: bool
    seed: int

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Policy:
        return cls(*(group[name] for name in cls._fields))

    def moment_dtype(self, name: str, param: Tensor, present: Tensor | None = None) -> torch.dtype:
        """Of a moment; without a wish, a floating-point one that is `present` keeps its own."""
        wish = self.exp_avg_dtype if name == "exp_avg" else self.exp_avg_sq_dtype
        if wish is not None:
            return wish
        if present is not None and (present.is_floating_point() or present.is_complex()):
            return present.dtype
        return param.dtype if self.master_weight_bits is None else torch.float32

    def master_of(self, param: Tensor) -> tuple[str, torch.dtype] | None:
        """Name and dtype of the state entry that completes a parameter to its master weight."""
        if self.master_weight_bits is None:
            return None
        if param.dtype == torch.bfloat16:
            return "param_remainder", _REMAINDERS[self.master_weight_bits]
        return "master_param", torch.float32

    def complete(self, param: Tensor, entries: dict[str, Any], *, amsgrad: bool) -> None:
        """Create what a parameter's state lacks, and convert what is of another format or memory layout.

        Values survive as well as the new format can hold them. A tensor that fits is left as it is.
        """
        entries.setdefault("step", 0.0)
        like = torch.empty_like(param, device="meta")  # for a parameter with gaps, the order without the gaps
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq"):
            present, scale = entries.get(name), SCALES.get(name, "")
            dtype = self.moment_dtype(name, param, present)
            if present is None:
                entries[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
                if dtype == EIGHT_BITS.get(name):
                    entries[scale] = torch.zeros(_groups(param.numel()), device=param.device)
            elif present.dtype != dtype or not same_strides(present, like):
                if scale in entries:
                    present = decode(name, present, entries.pop(scale))
                value = torch.empty_like(like, dtype=present.dtype, device=param.device).copy_(present)
                if dtype == EIGHT_BITS.get(name):
                    entries[name], entries[scale] = encode(name, value)
                else:
                    entries[name] = value.to(dtype)
            if scale in entries:
                entries[scale] = entries[scale].contiguous()
        self._complete_master(param, entries, like)

    def set_master(self, param: Tensor, entries: dict[str, Any], value: Tensor) -> None:
        """Set a parameter, and the entry that completes it if there is to be one."""
        wanted = self.master_of(param)
        if wanted is None:
            param.copy_(value)
            return
        name, dtype = wanted
        like = torch.empty_like(param, device="meta")
        weight = torch.empty_like(like, dtype=torch.float32, device=param.device).copy_(value)
        if name == "master_param":
            param.copy_(weight)
            entries[name] = weight
        else:
            high, entries[name] = split(weight, dtype)
            param.copy_(high)

    def _complete_master(self, param: Tensor, entries: dict[str, Any], like: Tensor) -> None:
        wanted = self.master_of(param)
        if wanted is None and "param_remainder" not in entries and "master_param" not in entries:
            return
        name, dtype = wanted or ("", torch.float32)
        present = entries.get(name)
        if wanted is not None and present is not None and present.dtype == dtype and same_strides(present, like):
            return
        master = master_weight(param, entries)
        for other in ("param_remainder", "master_param"):
            entries.pop(other, None)
        if wanted is None:
            return
        weight = torch.empty_like(like, dtype=torch.float32, device=param.device).copy_(master)
        if name == "master_param":
            entries[name] = weight
        else:
            # The parameter stays: its nearest remainder.
            rest = weight.view(torch.int32) - (_dense(param).to(torch.float32).view(torch.int32))
            shift = 16 - torch.iinfo(dtype).bits
            limits = torch.iinfo(dtype)
            rest = (rest + (1 << shift >> 1)) >> shift
            entries[name] = rest.clamp(limits.min, limits.max).to(dtype)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state; `print` shows a table.

    Attributes:
        n_params: elements of all parameters that have state.
        by_name: bytes of each kind of entry, like "exp_avg" or "param_remainder".
    """

    n_params: int
    by_name: dict[str, int]

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> StateBytes:
        by_name: dict[str, int] = defaultdict(int)
        n_params = 0
        for param in {id(p): p for group in groups for p in group["params"]}.values():
            entries = state.get(param, {})
            n_params += param.numel() if entries else 0
            for name, value in entries.items():
                by_name[name] += value.numel() * value.element_size() if isinstance(value, Tensor) else 0
        return cls(n_params, dict(by_name))

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def __str__(self) -> str:
        rows = [*self.by_name.items(), ("total", self.total)]
        lines = [f"{'state':<18}{'bytes':>16}{'per parameter':>16}"]
        lines += [f"{name:<18}{size:>16,}{size / max(self.n_params, 1):>16.3f}" for name, size in rows]
        return "\n".join(lines)


def _groups(n_elements: int) -> int:
    return -(-n_elements // GROUP_SIZE)


def _dense(tensor: Tensor) -> Tensor:
    """Without gaps: the tensor itself, or a copy."""
    like = torch.empty_like(tensor, device="meta")
    return tensor if same_strides(tensor, like) else torch.empty_like(tensor).copy_(tensor)


def flat(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


# 8-bit moments


def _per_element(of_group: Tensor, n_elements: int) -> Tensor:
    return of_group.repeat_interleave(GROUP_SIZE)[:n_elements]


def decode(name: str, codes: Tensor, scale: Tensor) -> Tensor:
    """float32 values of an 8-bit moment, in the layout of `codes`."""
    value = torch.empty_like(codes, dtype=torch.float32)
    largest = 127 if name == "exp_avg" else 255
    units = _per_element(scale * (1.0 / largest**2), codes.numel())
    code = flat(codes).to(torch.float32)
    root = code * code.abs() * units
    flat(value).copy_(root if name == "exp_avg" else root * root)
    return value


def encode(name: str, value: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scale of a dense floating-point tensor; `decode` is the inverse."""
    value = value.to(torch.float32)
    codes = torch.empty_like(value, dtype=EIGHT_BITS[name])
    n_elements = value.numel()
    magnitude = flat(value) if name == "exp_avg" else flat(value).sqrt()
    padded = torch.zeros(_groups(n_elements) * GROUP_SIZE, device=value.device)
    padded[:n_elements] = magnitude.abs()
    scale = padded.view(-1, GROUP_SIZE).amax(dim=1)
    largest = 127.0 if name == "exp_avg" else 255.0
    squared = magnitude * _per_element(largest**2 / scale.clamp(min=_SMALLEST_SCALE), n_elements)
    code = (squared * (squared.abs() + _NOT_ZERO).rsqrt()).nan_to_num(0.0).round()
    if name == "exp_avg_sq":
        code.clamp_(min=1)  # a v that is lost while its m is not throws its weight away
    flat(codes).copy_(code)
    return codes, scale


# Master weights


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """float32 master weights of a bf16 parameter, dense."""
    high = _dense(param).to(torch.float32).view(torch.int32)
    shift = 16 - torch.iinfo(remainder.dtype).bits
    return (high + (remainder.to(torch.int32) << shift)).view(torch.float32)


def split(weight: Tensor, dtype: torch.dtype, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """bf16 parameter and remainder of `dtype` of float32 weights; the inverse of `join`.

    Args:
        noise: 16 random bits for each element; of these 8 round a remainder of 8 bits.
    """
    # A carry out of a NaN's ones would make it -0.0.
    bits = torch.where(weight.isnan(), 0x7FC00000, weight.view(torch.int32))
    shift = 16 - torch.iinfo(dtype).bits
    if shift:
        bits = bits + (0x80 if noise is None else noise >> 8)
    high = (bits + 0x8000) >> 16
    remainder = (bits - (high << 16)) >> shift
    return (high << 16).view(torch.float32).to(torch.bfloat16), remainder.to(dtype)


def master_weight(param: Tensor, entries: Mapping[str, Any]) -> Tensor:
    """float32 value of a parameter, with what its state adds to it; of a float64 or complex one its own."""
    if "param_remainder" in entries:
        return join(param.detach(), entries["param_remainder"])
    if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return param.detach()
    return entries.get("master_param", param.detach()).to(torch.float32)


# Stochastic rounding


def round_to_bfloat16(value: Tensor, noise: Tensor) -> Tensor:
    """float32 to bf16: random bits are added below the last that is kept, and the rest cut off."""
    return ((value.view(torch.int32) + noise) >> 16 << 16).view(torch.float32).to(torch.bfloat16)


def _philox(seed: int, counter: Tensor, step: int, stream: int) -> list[Tensor]:
    """Philox4x32 with PHILOX_ROUNDS rounds (Salmon et al., https://doi.org/10.1145/2063384.2063405), in int64."""
    mask = 0xFFFFFFFF
    c0, c1 = counter & mask, counter >> 32
    c2, c3 = torch.full_like(counter, step & mask), torch.full_like(counter, stream & mask)
    k0, k1 = seed & mask, seed >> 32 & mask

    def high(a: Tensor, b: int) -> Tensor:
        return ((a >> 16) * b + ((a & 0xFFFF) * b >> 16)) >> 16

    for _ in range(PHILOX_ROUNDS):
        a, b = 0xD2511F53, 0xCD9E8D57
        c0, c1, c2, c3 = high(c2, b) ^ c1 ^ k0, c2 * b & mask, high(c0, a) ^ c3 ^ k1, c0 * a & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def noise(rounding: Rounding, step: int, param: Tensor) -> Iterator[Tensor]:
    """16 random bits for each element (int32) and each of parameter, exp_avg and exp_avg_sq.

    Args:
        step: number of this update.
        param: new parameter, float32 [n]; of 8 elements one of which is not finite all bits are 0.
    """
    n_elements = param.numel()
    index = rounding.element_offset + torch.arange(n_elements, device=param.device)
    words = torch.stack(_philox(rounding.seed, index >> 3, step, rounding.stream))
    padded = torch.zeros(-(-n_elements // 8) * 8, device=param.device)
    padded[:n_elements] = param * 0.0
    words *= (padded.view(-1, 8).sum(dim=1) == 0).repeat_interleave(8)[:n_elements]
    pair = ((index >> 1) & 3).unsqueeze(0)
    word = words.gather(0, pair)[0]
    other = words.gather(0, (pair + 1) & 3)[0]
    is_odd = (index & 1) == 1
    yield torch.where(is_odd, word >> 16, word & 0xFFFF).to(torch.int32)
    for factor, source in ((0x9E3779B1, word), (0x85EBCA77, other)):
        product = source * factor & 0xFFFFFFFF
        yield torch.where(is_odd, product & 0xFFFF, product >> 16).to(torch.int32)
