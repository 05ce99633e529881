"""The step under torch.compile: one operator that the compiler need not look into.

Traced code reads plain lists here. It must not touch `param_groups`, whose learning rates it would compile in, nor
`state`, whose entries are created late. What the operator reads and writes is its arguments; options are read from
the living optimizer when it runs, so that no change of them compiles anything anew.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_entries, check_grad, check_param
from .plan import Plan
from .scalars import Hyper, set_decay_lr
from .state import State
from .storage import Policy

if TYPE_CHECKING:
    from .optimizer import AdamW

LIVE: weakref.WeakValueDictionary[int, AdamW] = weakref.WeakValueDictionary()
_HANDLES = itertools.count(1)
# Cuda graphs of the compiler would replay what was decided at their capture.
_TAGS = [torch.Tag.cudagraph_unsafe] if hasattr(torch.Tag, "cudagraph_unsafe") else []


@torch.library.custom_op(
    "adamw_triton::step_",
    mutates_args=("params", "state"),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] state, int[] numbers, int handle) -> ()",
    tags=_TAGS,
)
def step_(params: list[Tensor], grads: list[Tensor], state: list[Tensor], numbers: list[int], handle: int) -> None:
    """Take a step.

    Args:
        params, grads: tensors of one length.
        state: all their states' tensors, in the order of `CompiledStep.names`.
        numbers: of each parameter among all of the optimizer.
        handle: of the `CompiledStep` whose optimizer's options to use.

    Raises:
        RuntimeError: the optimizer is gone, or its options want other state now.
    """
    optimizer = LIVE.get(handle)
    if optimizer is None:
        raise RuntimeError("the optimizer of this compiled step no longer exists")
    optimizer._compiled.run(optimizer, params, grads, state, numbers)


@step_.register_fake
def _(params: Any, grads: Any, state: Any, numbers: Any, handle: Any) -> None:
    return None


class CompiledStep:
    """What the traced step of one optimizer reads.

    Attributes:
        params: all parameters.
        entries: of each, its state's tensors; empty where there is none.
        names: of these tensors.
    """

    def __init__(self, optimizer: AdamW) -> None:
        self.handle = next(_HANDLES)
        self.key = str(self.handle)
        LIVE[self.handle] = optimizer
        self.list_params(optimizer)

    def list_params(self, optimizer: AdamW) -> None:
        owners = [(p, i) for i, group in enumerate(optimizer.param_groups) for p in group["params"]]
        first = {id(p): (p, i) for p, i in reversed(owners)}  # a duplicate steps once, in its first group
        in_order = [first.pop(id(p)) for p, _ in owners if id(p) in first]
        self.params = [p for p, _ in in_order]
        self.groups = [i for _, i in in_order]
        self.entries: list[list[Tensor]] = [[] for _ in in_order]
        self.names: list[list[str]] = [[] for _ in in_order]
        self.state = optimizer._watch_state()
        self.changes = self.state.changes
        self.changes.seen_compiled = False
        self._kept: tuple[Any, ...] | None = None

    # Traced

    def trace(self) -> None:
        numbers, params, grads = [], [], []
        for number, param in enumerate(self.params):
            if param.grad is not None:
                numbers.append(number)
                params.append(param)
                grads.append(param.grad)
        if not params:
            return
        from .prepare import prepare

        handle = prepare(self.key, tuple(numbers))
        # True now; having looked makes a guard that it still is: state that is replaced is compiled anew.
        if not self.changes.seen_compiled:
            raise RuntimeError("the optimizer's state changes while its step is being compiled")
        state = []
        for number in numbers:
            state += self.entries[number]
        step_(params, grads, state, numbers, handle)

    def zero_grad(self, set_to_none: bool) -> None:
        for param in self.params:
            if set_to_none:
                param.grad = None  # without a look at what it was, which would be guarded
            elif param.grad is not None:
                param.grad.zero_()

    # At trace time, and at run time

    @torch._disable_dynamo
    def complete(self, optimizer: AdamW, numbers: Sequence[int]) -> None:
        state = optimizer._watch_state()
        if state is not self.state:
            self.list_params(optimizer)
        counts_on_device = (
            optimizer._frame()[1].skippable
            or optimizer._step_supports_amp_scaling
            or any(group["capturable"] or Hyper.of(group).on_device for group in optimizer.param_groups)
        )
        for number in numbers:
            param = self.params[number]
            group = optimizer.param_groups[self.groups[number]]
            check_param(param)
            if isinstance(param.grad, Tensor) and type(param.grad) is Tensor:
                check_grad(param, param.grad)
            check_entries(param, state.get(param, {}))
            entries = state.watch(param)
            Policy.of(group).complete(param, entries, amsgrad=group["amsgrad"])
            # Of its own, not a part of a plan's vector: tensors that share memory cannot be written independently.
            step = torch.as_tensor(entries["step"], dtype=torch.float32).reshape(())
            entries["step"] = step.to(param.device if counts_on_device else step.device, copy=True)
            names = [name for name, value in entries.items() if isinstance(value, Tensor)]
            self.names[number] = names
            self.entries[number] = [entries[name] for name in names]
        self.changes.seen_compiled = True

    def run(
        self, optimizer: AdamW, params: list[Tensor], grads: list[Tensor], state: list[Tensor], numbers: list[int]
    ) -> None:
        optimizer._opt_called = True  # what learning rate schedulers look for
        if optimizer.state is not self.state:
            raise RuntimeError("optimizer.state was replaced after this step was compiled; call torch._dynamo.reset()")
        entries, start = [], 0
        for number in numbers:
            names = self.names[number]
            entries.append(dict(zip(names, state[start : start + len(names)], strict=True)))
            start += len(names)
        steps = [each["step"] for each in entries]
        identity = (numbers, list(map(Tensor.data_ptr, [*params, *state])))
        scaling, frame = optimizer._frame()
        for group in optimizer.param_groups:
            set_decay_lr(group)
        if self._kept is not None and self._kept[0] == (identity, _on_host(steps)):
            _, plan, views, groups, plan_state = self._kept
            for group, live in zip(groups, optimizer.param_groups, strict=True):
                group.update({name: value for name, value in live.items() if name != "params"})
        else:
            plan, views = None, [param.detach() for param in params]
            members: list[list[Tensor]] = [[] for _ in optimizer.param_groups]
            for number, view in zip(numbers, views, strict=True):
                members[self.groups[number]].append(view)
            groups = [{**live, "params": some} for live, some in zip(optimizer.param_groups, members, strict=True)]
            plan_state = State(dict(zip(views, entries, strict=True)))
        for view, grad in zip(views, grads, strict=True):
            if grad.dtype != view.dtype:
                view.grad_dtype = None  # type: ignore[attr-defined]
            view.grad = grad
        now = (groups, plan_state, frame)
        found = None if plan is None else plan.gradients(*now)
        if plan is None or found is None:
            ids = {id(view): number for view, number in zip(views, numbers, strict=True)}
            plan = Plan(*now, numbers=ids)
            optimizer._keep_statistics([] if optimizer._plan is None else optimizer._plan.buckets, plan.buckets)
            found = plan.gradients(*now)
            assert found is not None
            if not all(_same_tensors(plan_state[view], given) for view, given in zip(views, entries, strict=True)):
                raise RuntimeError(
                    "the optimizer's options want other state than this step was compiled for; "
                    "call torch._dynamo.reset()"
                )
        plan.step(found, optimizer._limits, scaling, optimizer._control_on)
        for view in views:
            view.grad = None
        if steps:
            torch._foreach_copy_(steps, [plan_state[view]["step"] for view in views])
        own = [self.params[number].data_ptr() for number in numbers]
        self._kept = None
        if list(map(Tensor.data_ptr, params)) == own:  # and not copies that live as long as this call
            self._kept = (identity, _on_host(steps)), plan, views, groups, plan_state
        optimizer._plan = plan


def _on_host(steps: list[Tensor]) -> list[float] | None:
    """The counts, where reading them waits for nothing."""
    return torch.stack(steps).tolist() if steps and not any(step.is_cuda for step in steps) else None


def _same_tensors(entries: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    """Whether a plan has left all tensors in their place; it has step counts of its own."""
    return len(entries) == len(given) and all(entries.get(name) is given[name] for name in given if name != "step")
