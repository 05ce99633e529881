"""The numbers that a launch needs, made once per step in double precision."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Hyper(NamedTuple):
    """Hyper-parameters of one group: Python floats, or 0-d tensors where their values live on a device."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float

    @classmethod
    def of(cls, group: dict) -> Hyper:
        """Read a param group; 0-d tensors on the CPU are read now, those on a device are left there."""

        def read(value: float | Tensor) -> float | Tensor:
            return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)

        beta1, beta2 = group["betas"]
        return cls(read(group["lr"]), read(beta1), read(beta2), float(group["eps"]), float(group["weight_decay"]))

    @property
    def on_device(self) -> bool:
        """Whether reading the values on the host would synchronise with a device."""
        return any(isinstance(value, Tensor) for value in self)


class Scalars(NamedTuple):
    """What is left of the hyper-parameters at step t; see kernels/adamw.py for the meaning of each."""

    decay: float
    lerp_weight: float
    beta2: float
    one_minus_beta2: float
    neg_step_size: float
    inv_bias_correction2_sqrt: float
    eps: float
    step: float


def host_scalars(hyper: Hyper, step: float) -> Scalars:
    """Scalars of update number `step` >= 1; hyper-parameters on a device are read, which synchronises."""
    lr, beta1, beta2, eps, weight_decay = map(float, hyper)
    return Scalars(
        decay=1 - lr * weight_decay,
        lerp_weight=1 - beta1 if beta1 > 0.5 else -beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        neg_step_size=-lr / (1 - beta1**step),
        inv_bias_correction2_sqrt=(1 - beta2**step) ** -0.5,
        eps=eps,
        step=step,
    )


def device_scalars(hyper: Hyper, step: Tensor) -> Tensor:
    """The same as a float64 row on the device of `step`, without a synchronisation.

    Args:
        hyper: hyper-parameters; tensors may be on that device or on the CPU.
        step: 0-d, number of this update, on the device that the row is for.

    Returns:
        float64 tensor of shape [8], in the order of `Scalars`.
    """

    def double(value: float | Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value.detach().to(step.device, torch.float64, non_blocking=True).reshape(())
        return torch.full((), value, dtype=torch.float64, device=step.device)

    lr, beta1, beta2, eps, weight_decay = map(double, hyper)
    t = step.to(torch.float64)
    return torch.stack(
        (
            1 - lr * weight_decay,
            torch.where(beta1 > 0.5, 1 - beta1, -beta1),
            beta2,
            1 - beta2,
            -lr / (1 - beta1**t),
            (1 - beta2**t) ** -0.5,
            eps,
            t,
        )
    )
