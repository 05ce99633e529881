"""The step of one tensor as a function."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch, reference
from .checks import check_grad, check_hyper, check_param, check_state, is_dense, same_strides
from .scalars import Hyper, Scalars, host_scalars


def step_tensor(
    param: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    scalars: Scalars | Tensor,
    *,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Launch the kernel for one checked parameter of any layout; a complex one is a pair of real numbers.

    The kernel walks through memory, so tensors with gaps, or in another order than the parameter, take part
    as copies.
    """
    work = param if is_dense(param) else torch.empty_like(param).copy_(param)

    def like_work(tensor: Tensor) -> Tensor:
        tensor = tensor.resolve_conj().resolve_neg()
        return tensor if same_strides(tensor, work) else torch.empty_like(work, dtype=tensor.dtype).copy_(tensor)

    written = [work, *map(like_work, moments)]
    param_view, *moment_views = map(real_view, written)
    launch.launch_tensor(
        param_view,
        real_view(like_work(grad)),
        moment_views[0],
        moment_views[1],
        moment_views[2] if len(moment_views) == 3 else None,
        scalars,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    for tensor, copy in zip((param, *moments), written, strict=True):
        if copy is not tensor:
            tensor.copy_(copy)


def step_tensor_reference(
    param: Tensor,
    grad: Tensor,
    moments: list[Tensor],
    hyper: Hyper,
    step: float,
    *,
    maximize: bool,
    grad_scale: Tensor | None,
) -> None:
    """The same without kernels."""
    exp_avg, exp_avg_sq, *rest = map(real_view, moments)
    reference.adamw_(
        real_view(param),
        real_view(grad.resolve_conj()),
        exp_avg,
        exp_avg_sq,
        rest[0] if rest else None,
        step=step,
        maximize=maximize,
        grad_scale=grad_scale,
        **{name: float(value) for name, value in hyper._asdict().items()},
    )


def real_view(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_exp_avg_sq: Tensor | None = None,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One AdamW update of one tensor and its state, in place: what `AdamW.step` does to each parameter.

    Args:
        param: float32, bfloat16, float16, float64 or complex tensor of any shape and strides.
        grad: gradient in param's shape, of any of these dtypes; not modified.
        exp_avg, exp_avg_sq: moments in param's shape, of any of these dtypes; zeros before the first update.
        step: number of this update, 1 for the first. Not incremented.
        lr, betas, eps, weight_decay, maximize: as for `AdamW`.
        max_exp_avg_sq: running maximum of exp_avg_sq; given, the update is AMSGrad's.
        grad_scale: one-element tensor that the gradient is divided by.
        found_inf: one-element tensor; if it is not 0, nothing is written.

    Raises:
        ValueError: a hyper-parameter out of range, step < 1, or a param whose elements share memory.
        TypeError: a param of integer or another dtype that cannot be optimized.
        RuntimeError: grad or state of another shape or device than param, or a sparse grad.

    Example:
        >>> param, grad = torch.ones(3), torch.ones(3)
        >>> exp_avg, exp_avg_sq = torch.zeros(3), torch.zeros(3)
        >>> adamw_(param, grad, exp_avg, exp_avg_sq, step=1, lr=0.1, weight_decay=0.0)
        >>> param
        tensor([0.9000, 0.9000, 0.9000])
    """
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    check_hyper(options)
    if step < 1:
        raise ValueError(f"step must be at least 1, the number of this update; got {step}")
    check_param(param)
    check_grad(param, grad)
    moments = [exp_avg, exp_avg_sq] + ([] if max_exp_avg_sq is None else [max_exp_avg_sq])
    for name, moment in zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), moments, strict=False):
        check_state(param, name, moment)

    hyper = Hyper.of(options)
    if launch.has_kernels(param.device):
        scalars = host_scalars(hyper, float(step))
        step_tensor(param, grad, moments, scalars, maximize=maximize, grad_scale=grad_scale, found_inf=found_inf)
        torch.autograd.graph.increment_version([param, *moments])
    elif found_inf is None or not found_inf.item():
        step_tensor_reference(param, grad, moments, hyper, float(step), maximize=maximize, grad_scale=grad_scale)
