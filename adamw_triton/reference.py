"""The AdamW step in eager torch: the specification of the kernels, and what runs where they do not."""

from __future__ import annotations

import torch
from torch import Tensor


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
) -> None:
    """Update number `step` (1 is the first) of one real parameter and its state, in place.

    Arithmetic is in float32, or float64 for a float64 parameter, whatever the storage; each value is
    rounded to its storage once, at the end. In float32 these are the operations of torch.optim.AdamW's
    single-tensor loop in their order, and the results are the same bits.

    Args:
        param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq: same shape, any strides, any floating dtypes;
            max_exp_avg_sq is None without amsgrad. grad is not modified.
        grad_scale: one-element tensor that the gradient is divided by, as torch.amp.GradScaler passes it.
    """
    dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
    stored = [t for t in (param, exp_avg, exp_avg_sq, max_exp_avg_sq) if t is not None]
    computed = [t.to(dtype) for t in stored]
    p, m, v = computed[:3]
    g = grad.to(dtype)
    if grad_scale is not None:
        g = g / grad_scale.to(dtype)
    if maximize:
        g = -g

    if weight_decay != 0:
        p.mul_(1 - lr * weight_decay)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if max_exp_avg_sq is not None:
        v = torch.maximum(computed[3], v, out=computed[3])
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    denominator = (v.sqrt() / bias_correction2**0.5).add_(eps)
    p.addcdiv_(m, denominator, value=-lr / bias_correction1)

    for tensor, value in zip(stored, computed, strict=True):
        if value is not tensor:
            tensor.copy_(value)
