"""Gradient release: each parameter is stepped as soon as its gradient is there, and the gradient is freed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .bucket import Bucket
from .control import Scaling
from .graphs import weakly
from .plan import Plan

if TYPE_CHECKING:
    from .optimizer import AdamW


def register_gradient_release(model: nn.Module, optimizer: AdamW) -> GradientRelease:
    """Step each parameter during the backward pass, and free its gradient at once.

    Gradients then exist one or two at a time instead of all together. `optimizer.step()` and `optimizer.zero_grad()`
    do nothing from now on, which they say once. Tied parameters are stepped once, after all of their gradient (but with
    reentrant activation checkpointing once for each segment that has them). It ends with the optimizer, which the hooks
    do not keep alive.

    Args:
        model: whose parameters, those of the optimizer at least, are in the backward passes to come.
        optimizer: an `AdamW`. With `skip_nonfinite` and `skip_grad_norm_above` each parameter is skipped on its own,
            by the norm of its own gradient.

    Returns:
        A handle: `remove()` ends it, and `with handle.accumulate():` around a backward pass keeps gradients, which the
        next one outside adds to.

    Raises:
        ValueError: what needs all gradients at once: max_grad_norm, GradScaler (fused=True), gradients that are
            reduced after they are accumulated (DistributedDataParallel; its `.module` cannot be told from a model of
            its own, and must not be given either); parameters that are not the model's; a second registration.
    """
    for wrong, what in (
        (
            optimizer.max_grad_norm is not None,
            f"max_grad_norm={optimizer.max_grad_norm} needs the norm of all gradients before the first is used; "
            f"use max_grad_norm=None, or skip_grad_norm_above, which acts on each parameter",
        ),
        (
            optimizer._step_supports_amp_scaling,
            "fused=True announces that torch.amp.GradScaler may leave unscaling to step(), which gradient release "
            "takes before there is a scaler's verdict; train in bfloat16 without GradScaler, with fused=None",
        ),
        (
            isinstance(model, nn.parallel.DistributedDataParallel),
            "DistributedDataParallel reduces gradients after they are accumulated, when they are released already",
        ),
        (optimizer._release is not None, "this optimizer has gradient release already; remove() the handle first"),
    ):
        if wrong:
            raise ValueError(f"gradient release: {what}")
    known = {id(param) for param in model.parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    missing = sum(id(param) not in known for param in params)
    if missing:
        raise ValueError(f"gradient release: {missing} of the optimizer's {len(params)} parameters are not the model's")
    return GradientRelease(optimizer)


class GradientRelease:
    """Handle of `register_gradient_release`."""

    def __init__(self, optimizer: AdamW) -> None:
        self._optimizer = optimizer
        self._accumulating = False
        self._warned: set[str] = set()
        self._plans: dict[Tensor, Plan] = {}
        params = [param for group in optimizer.param_groups for param in group["params"]]
        self._numbers = {id(param): number for number, param in enumerate({id(p): p for p in params}.values())}
        # By index: load_state_dict makes new groups.
        self._group_of = {
            param: index
            for index, group in reversed(list(enumerate(optimizer.param_groups)))
            for param in group["params"]
        }
        self._hooks = list(map(self._hook, self._group_of))
        optimizer._release = self

    def _hook(self, param: Tensor) -> Any:
        requires_grad = param.requires_grad
        param.requires_grad_()  # only then it takes hooks, and it may be unfrozen later
        hook = param.register_post_accumulate_grad_hook(weakly(self._on_accumulated))
        param.requires_grad_(requires_grad)
        return hook

    @property
    def buckets(self) -> list[Bucket]:
        return [bucket for plan in self._plans.values() for bucket in plan.buckets]

    def remove(self) -> None:
        """Go back to `optimizer.step()`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._optimizer._release is self:
            self._optimizer._release = None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Keep gradients: backward passes within only add to them."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    @torch.no_grad()
    def _on_accumulated(self, param: Tensor) -> None:
        if self._accumulating:
            return
        optimizer = self._optimizer
        optimizer._opt_called = True  # what learning rate schedulers look for
        group = optimizer.param_groups[self._group_of[param]]
        self._plans[param] = optimizer._step_plan(self._plans.get(param), [group], only=param, numbers=self._numbers)
        param.grad = None

    def refuse_scaling(self, scaling: Scaling) -> None:
        if scaling.given:
            raise RuntimeError(
                "gradient release cannot unscale for torch.amp.GradScaler: parameters were stepped before its verdict"
            )

    def say_once(self, name: str) -> None:
        """That a method does nothing."""
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"optimizer.{name}() does nothing: with gradient release parameters are stepped, and gradients freed, "
                f"during the backward pass",
                stacklevel=_stack_level(),
            )


def _stack_level() -> int:
    """Of the first caller outside of torch and of this package, for whoever calls the caller of this."""
    inside = tuple(str(Path(module.__file__ or "").parent) for module in (torch, sys.modules[__package__]))
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level
