"""How much memory the state takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..dtensors import local
from .eight_bit import CODED, GROUP_SIZE


@dataclass(frozen=True)
class StateBytes:
    """Bytes of optimizer state; `print` shows a table.

    Attributes:
        n_params: elements that this rank has of all parameters that have state.
        by_name: this rank's bytes of each kind of entry, like "exp_avg", "exp_avg_codes" or "param_remainder".
        n_in_floats: of elements of moments that are to have 8 bits and have floats, because their parameter's rows, or
            the parts that ranks have of these, are not multiples of 128.
        global_n_params: elements of these parameters on all ranks, each counted once.
        global_by_name: likewise bytes.
    """

    n_params: int
    by_name: dict[str, int]
    n_in_floats: dict[str, int]
    global_n_params: int
    global_by_name: dict[str, int]

    @classmethod
    def of(cls, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]) -> StateBytes:
        """Count.

        Args:
            groups: param groups with their storage options.
            state: of the optimizer.
        """
        by_name: dict[str, int] = defaultdict(int)
        global_by_name: dict[str, int] = defaultdict(int)
        n_in_floats: dict[str, int] = defaultdict(int)
        n_params = global_n_params = 0
        owners = {id(param): (param, group) for group in groups for param in group["params"]}
        for param, group in owners.values():
            entries = state.get(param, {})
            n_params += local(param).numel() if entries else 0
            global_n_params += param.numel() if entries else 0
            for name, value in entries.items():
                by_name[name] += _bytes(local(value))
                global_by_name[name] += _bytes(value)
            for name, coded in CODED.items():
                if group[f"{name}_dtype"] == coded.dtype and name in entries:
                    n_in_floats[name] += local(param).numel()
        return cls(n_params, dict(by_name), dict(n_in_floats), global_n_params, dict(global_by_name))

    @property
    def total(self) -> int:
        """This rank's bytes."""
        return sum(self.by_name.values())

    @property
    def global_total(self) -> int:
        """Bytes on all ranks, each counted once."""
        return sum(self.global_by_name.values())

    def __str__(self) -> str:
        rows = [*self.by_name.items(), ("total", self.total)]
        if self.global_n_params != self.n_params:
            rows.append(("on all ranks", self.global_total))
        lines = [f"{'state':<18}{'bytes':>16}{'per parameter':>16}"]
        counts = {"on all ranks": self.global_n_params}
        lines += [
            f"{name:<18}{size:>16,}{size / max(counts.get(name, self.n_params), 1):>16.3f}" for name, size in rows
        ]
        lines += [
            f"{name} in floats, not in 8 bits: {n:,} of {self.n_params:,} elements, whose parameters have rows (all "
            f"after the first dimension, or what a rank has of it) that are not multiples of {GROUP_SIZE} elements in "
            f"memory"
            for name, n in self.n_in_floats.items()
        ]
        return "\n".join(lines)


def _bytes(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
