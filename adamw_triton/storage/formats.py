"""What one parameter's update reads and writes, and in which formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtensors import local
from .eight_bit import CODED
from .master_weights import ENTRIES as MASTER_ENTRIES
from .master_weights import remainder_of


class StateTensors(NamedTuple):
    """What one parameter's update reads and writes besides the parameter: moments as floats, or as codes and scales."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None = None
    master: Tensor | None = None  # int16 or int8 remainder of a bf16 parameter, or a whole fp32 master
    exp_avg_scale: Tensor | None = None
    exp_avg_sq_scale: Tensor | None = None

    @classmethod
    def from_entries(cls, entries: Mapping[str, Any], amsgrad: bool) -> StateTensors:
        """Take them from the optimizer's state of a parameter."""
        return cls.named(entries, entry_names(entries, amsgrad))

    @classmethod
    def named(cls, entries: Mapping[str, Any], names: Sequence[str | None]) -> StateTensors:
        """Take them by these names, of `entry_names`; of DTensors what lies on this rank."""
        tensors: list[Any] = [None if name is None else local(entries[name]) for name in names]
        if tensors[3] is not None:
            tensors[3] = remainder_of(tensors[3])
        return cls(*tensors)

    @property
    def present(self) -> list[Tensor]:
        return [tensor for tensor in self if tensor is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> StateTensors:
        """Return another tensor for each that is present."""
        return StateTensors(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self.present}

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing but floating-point moments."""
        return self.master is None and self.exp_avg_scale is None and self.exp_avg_sq_scale is None


def entry_names(entries: Mapping[str, Any], amsgrad: bool) -> tuple[str | None, ...]:
    """Return the name of the state entry for each field of `StateTensors`."""
    moments = [coded.codes if coded.codes in entries else name for name, coded in CODED.items()]
    scales = [coded.scale if coded.codes in entries else None for coded in CODED.values()]
    master = next((name for name in MASTER_ENTRIES if name in entries), None)
    return (*moments, "max_exp_avg_sq" if amsgrad else None, master, *scales)


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
        formats = cls(param.dtype, grad, state.exp_avg.dtype, state.exp_avg_sq.dtype, master)
        return formats._replace(stochastic=stochastic and formats.can_round_stochastically)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Return the dtypes of all tensors that have an element for each of the parameter's."""
        return self[:4] if self.master is None else self[:5]  # type: ignore[return-value]

    @property
    def can_round_stochastically(self) -> bool:
        """Whether something is stored in bf16, as a code, or as a weight of 24 bits."""
        stored = {self.exp_avg, self.exp_avg_sq, *([self.param] if self.master is None else [self.master])}
        return self.param in ROUNDED_PARAMS and not stored.isdisjoint(_ROUNDED)


ROUNDED_PARAMS = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDED = (torch.bfloat16, torch.int8, torch.uint8)  # int8 also of a remainder
