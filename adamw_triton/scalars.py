"""The numbers that a launch needs, made once per step in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Hyper(NamedTuple):
    """Hyper-parameters of one group: numbers, or one-element tensors."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float | Tensor
    decay_lr: float = 1.0  # weight decay is multiplied by lr / decay_lr

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Hyper:
        """Of a param group; the tensors themselves, whose values may change in place."""
        beta1, beta2 = group["betas"]
        decay_lr = group["decay_lr"] if group.get("decouple_lr") else 1.0
        return cls(group["lr"], beta1, beta2, float(group["eps"]), group["weight_decay"], decay_lr)

    @property
    def on_device(self) -> bool:
        """Whether reading the values on the host would synchronise with a device."""
        return any(isinstance(value, Tensor) and value.device.type != "cpu" for value in self)


def set_decay_lr(group: dict[str, Any]) -> None:
    """Note what `decouple_lr` divides by; not under the name of learning rate schedulers, some of which change it.

    Raises:
        ValueError: it is 0.
    """
    if group["decouple_lr"] and "decay_lr" not in group:
        lr = float(group["lr"])
        if not lr > 0:
            raise ValueError(
                f"decouple_lr=True decays by weight_decay * lr / initial lr; the initial lr must be above 0, got {lr}"
            )
        group["decay_lr"] = lr


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
    lr, beta1, beta2, eps, weight_decay, decay_lr = map(float, hyper)
    return Scalars(
        decay=1 - lr * weight_decay / decay_lr,
        lerp_weight=1 - beta1 if beta1 > 0.5 else -beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        neg_step_size=-lr / (1 - beta1**step),
        inv_bias_correction2_sqrt=(1 - beta2**step) ** -0.5,
        eps=eps,
        step=step,
    )


def scalar_rows(hypers: Tensor, steps: Tensor) -> Tensor:
    """`host_scalars` of many, and the specification of kernels/scalars.py.

    Args:
        hypers: float64 [n, 6], in the order of `Hyper`.
        steps: float64 [n], numbers of the updates.

    Returns:
        float64 [n, 8], in the order of `Scalars`.
    """
    lr, beta1, beta2, eps, weight_decay, decay_lr = hypers.unbind(1)
    return torch.stack(
        (
            1 - lr * weight_decay / decay_lr,
            torch.where(beta1 > 0.5, 1 - beta1, -beta1),
            beta2,
            1 - beta2,
            -lr / (1 - beta1**steps),
            (1 - beta2**steps) ** -0.5,
            eps,
            steps,
        ),
        dim=1,
    )
