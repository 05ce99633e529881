"""What is decided over the gradients of the whole model: clipping, unscaling and skipping."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """Options of the whole optimizer, not of a group: there is one global norm.

    Attributes:
        max_grad_norm: gradients with a larger global norm are scaled down to it.
        skip_nonfinite: skip a step whose global norm is not finite.
        skip_grad_norm_above: skip a step with a larger global norm, or one that is not finite.
    """

    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    skip_grad_norm_above: float | None = None

    @property
    def skip_above(self) -> float | None:
        """The norm above which a step is skipped; one that is not finite is above any."""
        if self.skip_grad_norm_above is not None:
            return float(self.skip_grad_norm_above)
        return math.inf if self.skip_nonfinite else None

    @property
    def need_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_above is not None

    def check(self) -> None:
        """Refuse limits that are none.

        Raises:
            ValueError: which.
        """
        for name in ("max_grad_norm", "skip_grad_norm_above"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0):
                raise ValueError(f"{name} must be None or a number above 0; got {value!r}")
        if not isinstance(self.skip_nonfinite, bool):
            raise ValueError(f"skip_nonfinite must be True or False; got {self.skip_nonfinite!r}")


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting unless the host is to read it."""
    return tensor.to(device, non_blocking=device.type != "cpu")


class Scaling(NamedTuple):
    """What `torch.amp.GradScaler` leaves to the step: one-element tensors, or None."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def to(self, device: torch.device) -> Scaling:
        return Scaling(*(None if tensor is None else move(tensor, device) for tensor in self))

    @property
    def given(self) -> bool:
        return self.grad_scale is not None or self.found_inf is not None


class Control:
    """The decision, on a device: the kernels read it there, the host never has to.

    Attributes:
        values: float64 [3]: factor for the gradients, flag to skip the step, norm of the gradients.
        skipped: 0-d int64: steps skipped so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.tensor([1.0, 0.0, math.nan], dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def set(self, values: Tensor) -> None:
        """Take a decision made elsewhere."""
        self.values.copy_(move(values, self.values.device))
        self.skipped.add_(self.values[1].to(torch.int64))
