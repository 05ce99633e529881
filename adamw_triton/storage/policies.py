"""Storage policies: in which dtype each tensor of a step lies, and what a step therefore moves.

The byte formula: a step reads parameter, gradient and state once, and writes all but the gradient once. Nothing
else is counted: no caches, no second pass, no scalars and tables, which are a few bytes for a block of elements.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from .eight_bit import GROUP_SIZE

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
}


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, known in DTYPES.items() if known == dtype)


SCALE_BYTES = 4 / GROUP_SIZE  # of an 8-bit moment, per element


@dataclass(frozen=True)
class Policy:
    """One way of storing what AdamW needs; bytes are per element and step."""

    name: str
    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    amsgrad: bool = False
    master_weight_bits: int | None = None
    stochastic_rounding: bool = False

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq

    @property
    def dtype_names(self) -> tuple[str, str, str, str]:
        """Short ones, like "bf16"."""
        param, grad, exp_avg, exp_avg_sq = map(dtype_name, self.dtypes)
        return param, grad, exp_avg, exp_avg_sq

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of AdamW, given where they are not its defaults."""
        default = self.param if self.master_weight_bits is None else torch.float32
        return {
            "amsgrad": self.amsgrad,
            "exp_avg_dtype": None if self.exp_avg == default else self.exp_avg,
            "exp_avg_sq_dtype": None if self.exp_avg_sq == default else self.exp_avg_sq,
            "master_weight_bits": self.master_weight_bits,
            "stochastic_rounding": self.stochastic_rounding,
        }

    @property
    def is_plain(self) -> bool:
        """Whether other implementations of AdamW can have their state so."""
        return self.exp_avg.is_floating_point and self.master_weight_bits is None and not self.stochastic_rounding

    @property
    def master(self) -> torch.dtype | None:
        """Of the remainder, or of the whole master weight."""
        if self.master_weight_bits is None:
            return None
        if self.param != torch.bfloat16:
            return torch.float32
        return torch.int16 if self.master_weight_bits == 32 else torch.int8

    @property
    def state_bytes(self) -> float:
        """Bytes per element that the optimizer keeps from one step to the next."""
        moments = [self.exp_avg, self.exp_avg_sq, *([self.exp_avg_sq] if self.amsgrad else [])]
        scales = SCALE_BYTES * sum(not dtype.is_floating_point for dtype in moments)
        return sum(dtype.itemsize for dtype in moments) + scales + (self.master.itemsize if self.master else 0)

    @property
    def read_bytes(self) -> float:
        return self.param.itemsize + self.grad.itemsize + self.state_bytes

    @property
    def written_bytes(self) -> float:
        return self.param.itemsize + self.state_bytes

    @property
    def bytes_per_element(self) -> float:
        return self.read_bytes + self.written_bytes

    @property
    def description(self) -> str:
        """Which tensors have which dtype, like "bf16 p, g; fp32 m, v"."""
        tensors: dict[str, list[str]] = defaultdict(list)
        for letter, name in zip("pgmv", self.dtype_names, strict=True):
            tensors[name].append(letter)
        if self.amsgrad:
            tensors[self.dtype_names[3]].append("max v")
        parts = [f"{name} {', '.join(letters)}" for name, letters in tensors.items()]
        if self.master is not None:
            whole = self.master == torch.float32
            parts.append("fp32 master" if whole else f"{8 * self.master.itemsize}-bit remainder")
        if self.stochastic_rounding:
            parts.append("stochastic rounding")
        return "; ".join(parts)


_fp32, _bf16, _fp16, _int8, _uint8 = torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8

POLICIES = [
    Policy("fp32", _fp32, _fp32, _fp32, _fp32),
    Policy("fp32-amsgrad", _fp32, _fp32, _fp32, _fp32, amsgrad=True),
    Policy("fp32-8bit", _fp32, _fp32, _int8, _uint8),
    Policy("fp32-8bit-stochastic", _fp32, _fp32, _int8, _uint8, stochastic_rounding=True),
    Policy("bf16-grad", _fp32, _bf16, _fp32, _fp32),
    Policy("bf16-state", _fp32, _fp32, _bf16, _bf16),
    Policy("bf16-param-grad", _bf16, _bf16, _fp32, _fp32),
    Policy("bf16", _bf16, _bf16, _bf16, _bf16),
    Policy("bf16-master32", _bf16, _bf16, _fp32, _fp32, master_weight_bits=32),
    Policy("bf16-master32-bf16", _bf16, _bf16, _bf16, _bf16, master_weight_bits=32),
    Policy("bf16-master24-8bit", _bf16, _bf16, _int8, _uint8, master_weight_bits=24),
    Policy(
        "bf16-master24-8bit-stochastic", _bf16, _bf16, _int8, _uint8, master_weight_bits=24, stochastic_rounding=True
    ),
    Policy("bf16-stochastic", _bf16, _bf16, _bf16, _bf16, stochastic_rounding=True),
    Policy("fp16", _fp16, _fp16, _fp16, _fp16),
    Policy("fp16-master32", _fp16, _fp16, _fp32, _fp32, master_weight_bits=32),
]
BY_NAME = {policy.name: policy for policy in POLICIES}
