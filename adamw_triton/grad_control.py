"""What is decided over the gradients of the whole model: clipping, unscaling and skipping."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class GradNormOptions(NamedTuple):
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
        """Refuse options out of range.

        Raises:
            ValueError: which.
        """
        for name in ("max_grad_norm", "skip_grad_norm_above"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool) or not value > 0):
                raise ValueError(f"{name} must be None (off) or a number above 0; got {value!r}")
        if not isinstance(self.skip_nonfinite, bool):
            raise ValueError(f"skip_nonfinite must be True or False; got {self.skip_nonfinite!r}")


NO_NORM = GradNormOptions()


class GradScalerInputs(NamedTuple):
    """What `torch.amp.GradScaler` leaves to the step: one-element tensors, or None."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def to(self, device: torch.device) -> GradScalerInputs:
        if not self.present:
            return self
        return GradScalerInputs(*(None if tensor is None else move(tensor, device) for tensor in self))

    @property
    def present(self) -> bool:
        return self.grad_scale is not None or self.found_inf is not None


class GradDecision:
    """The decision, on a device: the kernels read it there, the host never has to.

    Attributes:
        values: float64 [3]: factor for the gradients, flag to skip the step, norm of the gradients.
        skipped: 0-d int64: steps skipped so far.
    """

    def __init__(self, device: torch.device) -> None:
        self.values = torch.tensor([1.0, 0.0, math.nan], dtype=torch.float64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)

    def set(self, values: Tensor) -> None:
        """Take a decision made elsewhere, and count it if it is to skip."""
        self.values.copy_(move(values, self.values.device))
        self.skipped.add_(self.values[1].to(torch.int64))


def decide(sum_of_squares: Tensor | None, scaler: GradScalerInputs, options: GradNormOptions) -> Tensor:
    """Return factor for the gradients, flag to skip the step, and norm: what kernels/grad_norm.py computes.

    Args:
        sum_of_squares: 0-d float64, of all gradients; the scaler's tensors are on its device.
        scaler: all gradients are divided by its grad_scale; the step is skipped where found_inf is not 0.
        options: of the norm; without effect without `sum_of_squares`.

    Returns:
        float64 [3]; the norm is NaN without `sum_of_squares`.
    """
    device = next(t.device for t in (sum_of_squares, *scaler) if t is not None)
    factor, skip, norm = (torch.full((), x, dtype=torch.float64, device=device) for x in (1.0, 0.0, math.nan))
    if scaler.grad_scale is not None:
        factor = 1 / scaler.grad_scale.double().reshape(())
    if scaler.found_inf is not None:
        skip = (scaler.found_inf != 0).double().reshape(())
    if sum_of_squares is not None:
        norm = sum_of_squares.sqrt() * factor
        if options.max_grad_norm is not None:
            factor = factor * (options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if options.skip_above is not None:
            fits = (norm <= options.skip_above) & (norm < math.inf)
            skip = torch.maximum(skip, (~fits).double())
    return torch.stack((factor, skip, norm))


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """Move a tensor to a device, without waiting unless the host is to read it."""
    return tensor.to(device, non_blocking=device.type != "cpu")
