"""Gradient release: each parameter is stepped as soon as its gradient is there, and the gradient is freed."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..optimizer import AdamW
from ..plan import Plan
from ..rank_checks import is_flat_shard


def register_gradient_release(model: nn.Module, optimizer: AdamW) -> GradientRelease:
    """Step each parameter during the backward pass, and free its gradient at once.

    Gradients then exist one or two at a time instead of all together. `optimizer.step()` and `optimizer.zero_grad()`
    find none and do nothing. Tied parameters are stepped once, after all of their gradient (but with reentrant
    activation checkpointing once for each segment that has them). It ends with the optimizer, which the hooks do not
    keep alive.

    Args:
        model: whose parameters, those of the optimizer at least, are in the backward passes to come.
        optimizer: an `AdamW`. With `skip_nonfinite` and `skip_grad_norm_above` each parameter is skipped on its own,
            by the norm of its own gradient, on all ranks that have parts of it.

    Returns:
        A handle: `remove()` ends it, and `with handle.accumulate():` around a backward pass keeps gradients, which the
        next one outside adds to.

    Raises:
        ValueError: what needs all gradients at once: max_grad_norm, GradScaler (fused=True), gradients that are
            reduced after they are accumulated (FullyShardedDataParallel; DistributedDataParallel, whose `.module`
            cannot be told from a model of its own, and must not be given either); parameters that are not the model's;
            a second registration.
    """
    for wrong, what in (
        (optimizer.max_grad_norm is not None, _needs_all_gradients(optimizer)),
        (
            optimizer._step_supports_amp_scaling,
            "fused=True announces that torch.amp.GradScaler may leave unscaling to step(), which gradient release "
            "takes before there is a scaler's verdict; train in bfloat16 without GradScaler, with fused=None",
        ),
        (
            isinstance(model, nn.parallel.DistributedDataParallel),
            "DistributedDataParallel reduces gradients after they are accumulated, when they are released already",
        ),
        (
            any(map(is_flat_shard, model.parameters())),
            "FullyShardedDataParallel reduces gradients after they are accumulated, into flat ones of its own; use "
            "fully_shard (FSDP2) instead",
        ),
        (optimizer in _RELEASED, "this optimizer has gradient release already; remove() the handle first"),
    ):
        if wrong:
            raise ValueError(f"gradient release: {what}")
    known = {id(param) for param in model.parameters()}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    missing = sum(id(param) not in known for param in params)
    if missing:
        raise ValueError(f"gradient release: {missing} of the optimizer's {len(params)} parameters are not the model's")
    return GradientRelease(optimizer)


def is_released(optimizer: AdamW) -> bool:
    return optimizer in _RELEASED


class GradientRelease:
    """Handle of `register_gradient_release`; the hooks work without it too."""

    def __init__(self, optimizer: AdamW) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._accumulating = False
        self._plans: list[Plan] = []
        self._hooks: list[Any] = []
        seen: set[int] = set()
        # By index: load_state_dict makes new groups.
        owners = [(param, index) for index, group in enumerate(optimizer.param_groups) for param in group["params"]]
        for number, (param, index) in enumerate(owners):
            can_have_grad = param.is_floating_point() or param.is_complex()
            if can_have_grad and id(param) not in seen:
                seen.add(id(param))
                self._plans.append(Plan(number))
                self._hooks.append(self._hook(param, index, self._plans[-1]))
        optimizer._plans += self._plans
        # Parameters outlive their optimizer: hooks must not stay behind.
        weakref.finalize(optimizer, _remove, self._hooks)
        _RELEASED.add(optimizer)

    def _hook(self, param: Tensor, group: int, plan: Plan) -> Any:
        requires_grad = param.requires_grad
        param.requires_grad_()  # only then it takes hooks, and it may be unfrozen later
        hook = param.register_post_accumulate_grad_hook(lambda param: self._step(param, group, plan))
        param.requires_grad_(requires_grad)
        return hook

    def _step(self, param: Tensor, group: int, plan: Plan) -> None:
        optimizer = self._optimizer()
        if self._accumulating or optimizer is None:
            return
        if optimizer.max_grad_norm is not None:
            raise ValueError(f"gradient release: {_needs_all_gradients(optimizer)}")
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what learning rate schedulers look for
        optimizer._update(plan, group, param)
        param.grad = None

    def remove(self) -> None:
        """Go back to `optimizer.step()`; a second time it does nothing."""
        optimizer = self._optimizer()
        if optimizer is not None and self._hooks:
            _RELEASED.discard(optimizer)
            optimizer._plans = [plan for plan in optimizer._plans if plan not in self._plans]
        _remove(self._hooks)

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Keep gradients: backward passes within only add to them."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before


_RELEASED: weakref.WeakSet[AdamW] = weakref.WeakSet()


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()
    hooks.clear()


def _needs_all_gradients(optimizer: AdamW) -> str:
    return (
        f"max_grad_norm={optimizer.max_grad_norm} needs the norm of all gradients before the first is used; "
        f"use max_grad_norm=None, or skip_grad_norm_above, which acts on each parameter"
    )
