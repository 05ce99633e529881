"""How each value is stored: which tensors that takes, in which formats, and making them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..strides import same_strides
from .eight_bit import CODES, SCALES, decode, encode, n_groups
from .master_weights import ENTRIES as MASTER_ENTRIES
from .master_weights import REMAINDERS, master_weight, nearest_remainder, split


class StateTensors(NamedTuple):
    """What one parameter's update reads and writes besides the parameter."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    master: Tensor | None = None  # int16 or int8 remainder of a bf16 parameter, or a whole fp32 master
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], amsgrad: bool) -> StateTensors:
        """Take them from the optimizer's state of a parameter."""
        return cls(*(None if name is None else entries[name] for name in entry_names(entries, amsgrad)))  # type: ignore[arg-type]

    @property
    def present(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> StateTensors:
        """Return another tensor for each that is present."""
        return StateTensors(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but floating-point moments."""
        return self.master is None and self.exp_avg_scale is None and self.exp_avg_sq_scale is None


def entry_names(entries: Mapping[str, Any], amsgrad: bool) -> tuple[str | None, ...]:
    """Return the name of the state entry for each field of `StateTensors`."""
    master = next((name for name in MASTER_ENTRIES if name in entries), None)
    scales = (scale if scale in entries else None for scale in SCALES.values())
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if amsgrad else None, master, *scales)


class Formats(NamedTuple):
    """Formats of the tensors of one launch."""

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    master: torch.dtype | None = None
    stochastic: bool = False

    @classmethod
    def of(cls, param: Tensor, grad: torch.dtype, state: StateTensors, *, stochastic: bool = False) -> Formats:
        master = None if state.master is None else state.master.dtype
        return cls(param.dtype, grad, state.exp_avg.dtype, state.exp_avg_sq.dtype, master, stochastic)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of all tensors that have an element for each of the parameter's."""
        return self[:4] if self.master is None else self[:5]  # type: ignore[return-value]


class StorageOptions(NamedTuple):
    """The storage options of a param group."""

    exp_avg_dtype: torch.dtype | None
    exp_avg_sq_dtype: torch.dtype | None
    master_weight_bits: int | None
    stochastic_rounding: bool
    seed: int

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> StorageOptions:
        return cls(*(group[name] for name in cls._fields))

    def moment_dtype(self, name: str, param: Tensor, present: Tensor | None = None) -> torch.dtype:
        """Return the dtype a moment is to have; without a wish, a floating-point one that is there keeps its own."""
        wish = self.exp_avg_dtype if name == "exp_avg" else self.exp_avg_sq_dtype
        if wish is not None:
            return wish
        if present is not None and (present.is_floating_point() or present.is_complex()):
            return present.dtype
        return param.dtype if self.master_weight_bits is None else torch.float32

    def master_entry(self, param: Tensor) -> tuple[str, torch.dtype] | None:
        """Return name and dtype of the state entry that completes a parameter to its master weight."""
        if self.master_weight_bits is None:
            return None
        if param.dtype == torch.bfloat16:
            return "param_remainder", REMAINDERS[self.master_weight_bits]
        return "master_param", torch.float32

    def is_complete(self, param: Tensor, entries: Mapping[str, Any], *, amsgrad: bool) -> bool:
        """Whether `complete` would change nothing but the step count."""
        like = _dense_like(param)
        for name in _moments(amsgrad):
            present = entries.get(name)
            if present is None or not _fits(present, self.moment_dtype(name, param, present), like):
                return False
            if (SCALES.get(name) in entries) != (present.dtype == CODES.get(name)):
                return False
        wanted = self.master_entry(param)
        present_masters = [name for name in MASTER_ENTRIES if name in entries]
        return present_masters == ([] if wanted is None else [wanted[0]]) and (
            wanted is None or _fits(entries[wanted[0]], wanted[1], like)
        )

    def complete(self, param: Tensor, entries: MutableMapping[str, Any], *, amsgrad: bool) -> None:
        """Create what a parameter's state lacks, and convert what is of another format or memory layout.

        Values survive as well as the new format can hold them. A tensor that fits is left as it is.
        """
        entries.setdefault("step", 0.0)
        like = _dense_like(param)
        for name in _moments(amsgrad):
            present, scale = entries.get(name), SCALES.get(name, "")
            dtype = self.moment_dtype(name, param, present)
            if present is None:
                entries[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
                if dtype == CODES.get(name):
                    n_scales = n_groups(param.numel())
                    entries[scale] = torch.zeros(n_scales, dtype=torch.float32, device=param.device)
            elif not _fits(present, dtype, like):
                if scale in entries:
                    present = decode(name, present, entries.pop(scale))
                value = torch.empty_like(like, dtype=present.dtype, device=param.device).copy_(present)
                if dtype == CODES.get(name):
                    entries[name], entries[scale] = encode(name, value)
                else:
                    entries[name] = value.to(dtype)
            if scale in entries:
                entries[scale] = entries[scale].contiguous()
        self._complete_master(param, entries, like)

    def set_master(self, param: Tensor, entries: MutableMapping[str, Any], value: Tensor) -> None:
        """Set a parameter, and the entry that completes it if there is to be one."""
        wanted = self.master_entry(param)
        if wanted is None:
            param.copy_(value)
            return
        name, dtype = wanted
        weight = torch.empty_like(_dense_like(param), dtype=torch.float32, device=param.device).copy_(value)
        if name == "master_param":
            param.copy_(weight)
            entries[name] = weight
        else:
            high, entries[name] = split(weight, dtype)
            param.copy_(high)

    def _complete_master(self, param: Tensor, entries: MutableMapping[str, Any], like: Tensor) -> None:
        wanted = self.master_entry(param)
        if wanted is None and not any(name in entries for name in MASTER_ENTRIES):
            return
        name, dtype = wanted or ("", torch.float32)
        present = entries.get(name)
        if wanted is not None and present is not None and _fits(present, dtype, like):
            return
        master = master_weight(param, entries)
        for other in MASTER_ENTRIES:
            entries.pop(other, None)
        if wanted is None:
            return
        weight = torch.empty_like(like, dtype=torch.float32, device=param.device).copy_(master)
        entries[name] = weight if name == "master_param" else nearest_remainder(param, weight, dtype)


def _moments(amsgrad: bool) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if amsgrad else ("exp_avg", "exp_avg_sq")


def _dense_like(param: Tensor) -> Tensor:
    """Return a tensor without memory in the layout of the state: the parameter's, without its gaps."""
    return torch.empty_like(param, device="meta")


def _fits(present: Tensor, dtype: torch.dtype, like: Tensor) -> bool:
    return present.dtype == dtype and same_strides(present, like)


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
