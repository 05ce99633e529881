"""Hyper-parameters of a param group, and the numbers that a launch makes of them at step t, in double precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Hyperparams(NamedTuple):
    """Hyper-parameters of one group: numbers, or one-element tensors."""

    lr: float | Tensor
    beta1: float | Tensor
    beta2: float | Tensor
    eps: float
    weight_decay: float | Tensor
    decay_lr: float = 1.0  # weight decay is multiplied by lr / decay_lr

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> Hyperparams:
        """Take them from a param group; the tensors themselves, whose values may change in place."""
        beta1, beta2 = group["betas"]
        decay_lr = group["decay_lr"] if group.get("decouple_lr") else 1.0
        return cls(group["lr"], beta1, beta2, float(group["eps"]), group["weight_decay"], decay_lr)

    def numbers(self) -> tuple[float, ...]:
        """Return plain numbers; reading a tensor on a device waits for it."""
        return tuple(map(float, self))


class KernelScalars(NamedTuple):
    """What is left of the hyper-parameters at step t; kernels/adamw.py says what each is."""

    decay: float
    lerp_weight: float
    beta2: float
    one_minus_beta2: float
    neg_step_size: float
    inv_bias_correction2_sqrt: float
    eps: float
    step: float


def kernel_scalars(hyperparams: Hyperparams, step: float) -> KernelScalars:
    """Return the scalars of update number `step` >= 1: the specification of kernels/scalars.py."""
    lr, beta1, beta2, eps, weight_decay, decay_lr = hyperparams.numbers()
    return KernelScalars(
        decay=1 - lr * weight_decay / decay_lr,
        lerp_weight=1 - beta1 if beta1 > 0.5 else -beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        neg_step_size=-lr / (1 - beta1**step),
        inv_bias_correction2_sqrt=(1 - beta2**step) ** -0.5,
        eps=eps,
        step=step,
    )
