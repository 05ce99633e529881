"""Storage policies: in which dtype each tensor of a step lies, and what a step therefore moves.

The byte formula: a step reads parameter, gradient and state once, and writes all but the gradient once. Nothing
else is counted: no caches, no second pass, no scalars and tables, which are a few bytes for a block of elements.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from .machine_code import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Policy:
    """One way of storing what AdamW needs; bytes are per element and step."""

    name: str
    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    amsgrad: bool = False

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]:
        return self.param, self.grad, self.exp_avg, self.exp_avg_sq

    @property
    def dtype_names(self) -> tuple[str, str, str, str]:
        """As `machine_code.Variant` calls them."""
        param, grad, exp_avg, exp_avg_sq = (_NAMES[dtype] for dtype in self.dtypes)
        return param, grad, exp_avg, exp_avg_sq

    @property
    def state_bytes(self) -> int:
        """Bytes per element that the optimizer keeps from one step to the next."""
        return self.exp_avg.itemsize + self.exp_avg_sq.itemsize * (2 if self.amsgrad else 1)

    @property
    def read_bytes(self) -> int:
        return self.param.itemsize + self.grad.itemsize + self.state_bytes

    @property
    def written_bytes(self) -> int:
        return self.param.itemsize + self.state_bytes

    @property
    def bytes_per_element(self) -> int:
        return self.read_bytes + self.written_bytes

    @property
    def description(self) -> str:
        """Which tensors have which dtype, like "bf16 p, g; fp32 m, v"."""
        tensors: dict[str, list[str]] = defaultdict(list)
        for letter, name in zip("pgmv", self.dtype_names, strict=True):
            tensors[name].append(letter)
        if self.amsgrad:
            tensors[self.dtype_names[3]].append("max v")
        return "; ".join(f"{name} {', '.join(letters)}" for name, letters in tensors.items())


_fp32, _bf16, _fp16 = torch.float32, torch.bfloat16, torch.float16

POLICIES = [
    Policy("fp32", _fp32, _fp32, _fp32, _fp32),
    Policy("fp32-amsgrad", _fp32, _fp32, _fp32, _fp32, amsgrad=True),
    Policy("bf16-grad", _fp32, _bf16, _fp32, _fp32),
    Policy("bf16-state", _fp32, _fp32, _bf16, _bf16),
    Policy("bf16-param-grad", _bf16, _bf16, _fp32, _fp32),
    Policy("bf16", _bf16, _bf16, _bf16, _bf16),
    Policy("fp16", _fp16, _fp16, _fp16, _fp16),
]
BY_NAME = {policy.name: policy for policy in POLICIES}
