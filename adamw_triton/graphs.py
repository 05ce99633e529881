"""CUDA graphs: what a captured step needs to stay valid, and saying so when it no longer is."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

_FORGET = "After discarding those graphs, call optimizer.forget_graphs()."


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def refuse(groups: Sequence[Mapping[str, Any]]) -> NoReturn:
    """Say why a step cannot be captured.

    Raises:
        RuntimeError: always.
    """
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(
            "step() cannot be captured in a CUDA graph: the step count lives on the host. Build the optimizer with "
            "capturable=True, or capture forward and backward only"
        )
    raise RuntimeError(
        "step() can be captured in a CUDA graph only after one like it outside, which allocates what the graph uses: "
        "take a warm-up step with gradients for the same parameters and with the same options (and GradScaler, if "
        "there is one), on a side stream, before the capture"
    )


def weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that calls the method as long as its object is there."""
    reference = weakref.WeakMethod(method)

    def hook(param: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive(param)

    return hook


def _remove(hooks: Sequence[Any]) -> None:
    for hook in hooks:
        hook.remove()


class Graphs:
    """The graphs that hold steps of an optimizer.

    A replay reads the gradients where they were at the capture. Where the graph does not hold the backward pass that
    wrote them, whoever puts them elsewhere is told.
    """

    def __init__(self) -> None:
        self._kept: list[Any] = []  # replays use the memory of these
        self._hooks: dict[Tensor, Any] = {}
        self._removable: list[Any] = []
        # Parameters outlive their optimizer: hooks must not keep it, nor stay behind.
        weakref.finalize(self, _remove, self._removable)
        self._accumulated: set[Tensor] = set()  # parameters whose backward pass is in the graph that is being captured
        self._addresses: dict[Tensor, int] = {}  # of gradients that come from outside of the graphs

    def watch(self, params: Sequence[Tensor]) -> None:
        """Notice where gradients of these parameters are accumulated."""
        for param in params:
            if param not in self._hooks and param.requires_grad and param.is_leaf:
                self._hooks[param] = param.register_post_accumulate_grad_hook(weakly(self._on_accumulated))
                self._removable.append(self._hooks[param])

    def _on_accumulated(self, param: Tensor) -> None:
        if is_capturing():
            self._accumulated.add(param)
            return
        self._accumulated.clear()
        known = self._addresses.get(param)
        if known is not None and param.grad is not None and param.grad.data_ptr() != known:
            raise RuntimeError(
                f"the gradient of a parameter (shape {tuple(param.shape)}) was allocated anew after step() was "
                f"captured in a CUDA graph, whose replays would go on with the old one. Keep gradients where they are: "
                f"zero_grad(set_to_none=False). {_FORGET}"
            )

    def add(self, plan: Any, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Note that a step with these gradients has been captured."""
        self._kept.append((plan, list(grads), plan.copies, [part.rows.in_memory for part in plan.parts]))
        for param, grad in zip(params, grads, strict=False):
            if param not in self._accumulated:
                self._addresses[param] = grad.data_ptr()

    def check_zero_grad(self, set_to_none: bool) -> None:
        if set_to_none and self._addresses and not is_capturing():
            raise RuntimeError(
                "zero_grad(set_to_none=True) after step() was captured in a CUDA graph: its replays would go on with "
                f"the old gradients. Use zero_grad(set_to_none=False). {_FORGET}"
            )

    def outdated(self, what: str) -> None:
        if self._kept:
            warnings.warn(
                f"{what} after step() was captured in a CUDA graph: replays go on with the former step counts and "
                f"state. Capture again. {_FORGET}",
                stacklevel=3,
            )

    def forget(self) -> None:
        _remove(self._removable)
        for collection in (self._kept, self._hooks, self._removable, self._accumulated, self._addresses):
            collection.clear()  # type: ignore[attr-defined]
