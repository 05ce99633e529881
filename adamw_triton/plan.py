"""Which tensors go in which launch, and when that has to be thought over.

Between two steps almost nothing changes: the addresses of the gradients and a few scalars. A `Plan` holds the
rest: tensors in buckets, one launch each. `Plan.gradients` looks, in a few passes over lists, for everything
that would make the plan wrong: parameters, state and options are the user's to replace.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch, reference
from .bucket import Bucket, Item
from .checks import check_implementation, check_storage
from .control import Control, Limits, Scaling, move
from .layout import is_dense
from .part import Part
from .scalars import Hyper, set_decay_lr
from .state import State
from .storage import Policy

# The options that a plan is built for; all others are read at every step.
_structural_of = itemgetter(
    "foreach", "amsgrad", "maximize", "capturable", "differentiable", "cautious", "decouple_lr", *Policy._fields
)
_values_of = itemgetter("lr", "betas", "eps", "weight_decay")
_params_of = itemgetter("params")
_grad_of = attrgetter("grad")


class Frame(NamedTuple):
    """What a plan is built for besides the param groups.

    Attributes:
        need_norm: whether steps need the norm of all gradients.
        skippable: whether the device decides whether a step is taken.
        statistics: whether norms of update and parameters are wanted.
    """

    need_norm: bool
    skippable: bool
    statistics: bool

    @classmethod
    def of(cls, limits: Limits, scaling: Scaling, *, statistics: bool) -> Frame:
        return cls(limits.need_norm, scaling.given or limits.skip_above is not None, statistics)


class Plan:
    """The launches of a step, for one set of parameters that have gradients.

    Building one checks everything it is given, then creates missing state; a refusal leaves all as it was.

    Args:
        groups: the optimizer's param groups.
        state: the optimizer's state, filled in for parameters at their first update.
        frame: what else the steps are taken with.
        only: one parameter, of the first group, to step alone.
        numbers: of each parameter among all, by its id, if these are not all.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        state: State,
        frame: Frame,
        *,
        only: Tensor | None = None,
        numbers: Mapping[int, int] | None = None,
    ) -> None:
        self.frame, self.only = frame, only
        for group in groups:
            set_decay_lr(group)
        self.structure = _structure(groups)
        self._read_values(groups)
        self.hypers_on_device = any(hyper.on_device for hyper in self.hypers)
        self.capturable = any(group["capturable"] for group in groups)
        params_of_groups = [list(group["params"]) if only is None else [only] for group in groups]
        self.sizes = list(map(len, params_of_groups))
        self.group_params = list(chain.from_iterable(params_of_groups))
        everything = {id(param): param for param in self.group_params}
        numbers = numbers or {key: number for number, key in enumerate(everything)}
        self.without_grad = [param for param in everything.values() if param.grad is None]

        items = [
            Item(param, param.grad, state.get(param, {}), index, numbers[id(param)])
            for index, params in enumerate(params_of_groups)
            for param in params
            if param.grad is not None and everything.pop(id(param), None) is not None  # a duplicate steps once
        ]
        for group, params in zip(
            groups, params_of_groups, strict=True
        ):  # which may have changed since they were checked
            check_implementation(group)
            check_storage(group, params)
        for item in items:
            item.check()
            no_kernels = self.capturable and item.param.is_cuda and not launch.has_kernels(item.param.device)
            if no_kernels:
                raise RuntimeError("capturable=True needs Triton on a GPU; install triton, or use capturable=False")
        for item in items:
            item.entries = state.watch(item.param)
            group = groups[item.group]
            Policy.of(group).complete(item.param, item.entries, amsgrad=group["amsgrad"])
        _separate_shared_memory(items)

        steps = dict(zip(items, _read_steps(items), strict=True))
        by_device: dict[torch.device, list[Item]] = defaultdict(list)
        for item in items:
            by_device[item.param.device].append(item)
        self.parts = [
            Part(
                members,
                [steps[item] for item in members],
                groups,
                self.hypers,
                need_norm=frame.need_norm,
                count_on_device=frame.skippable or self.capturable or self.hypers_on_device,
                capturable=self.capturable,
                statistics=frame.statistics,
            )
            for members in by_device.values()
        ]
        self._remember(state)

    def _remember(self, state: State) -> None:
        """What `gradients` compares with."""
        self.changes = state.changes
        if self.only is None:
            self.changes.seen = True
        else:
            self.entries = list(state[self.only].values())
        self.first_moments = [tensor for bucket in self.buckets for tensor in bucket.states[0].tensors]
        self.first_moment_addresses = list(map(Tensor.data_ptr, self.first_moments))
        self.params = [param for part in self.parts for param in part.params]
        self.param_addresses = list(map(Tensor.data_ptr, self.params))
        self.param_numels = list(map(Tensor.numel, self.params))
        # Only with two equal dimensions can strides change while address and shape stay.
        self.squares = [p for p in self.params if len({n for n in p.shape if n > 1}) < sum(n > 1 for n in p.shape)]
        self.square_strides = list(map(Tensor.stride, self.squares))
        grads: list[Any] = list(map(_grad_of, self.params))
        self.grad_addresses = list(map(Tensor.data_ptr, grads))
        self.grad_contiguous = list(map(Tensor.is_contiguous, grads))
        self.strided = [i for i, param in enumerate(self.params) if not param.is_contiguous()]
        self.grad_strides = [grads[i].stride() for i in self.strided]
        # For all other parameters, assigning `.grad` checks the dtype.
        self.any_dtype = [i for i, p in enumerate(self.params) if getattr(p, "grad_dtype", p.dtype) != p.dtype]
        self.grad_dtypes = [grads[i].dtype for i in self.any_dtype]
        # Only the imaginary part of a conjugate is negated lazily: every other element of something.
        self.may_be_neg = [i for i, g in enumerate(grads) if g.numel() < 2 or not g.is_contiguous()]
        self.grad_neg = [grads[i].is_neg() for i in self.may_be_neg]
        # The norm walks through memory: gradients with gaps take part as copies.
        self.may_have_gaps = [i for i, g in enumerate(grads) if self.frame.need_norm and not g.is_contiguous()]
        self.copies: list[Tensor] = []

    def _read_values(self, groups: Sequence[dict[str, Any]]) -> None:
        self.values = list(map(_values_of, groups))
        self.hypers = list(map(Hyper.of, groups))
        # Neither the values of tensors nor those in a list are seen by comparing with what they were.
        self.volatile = any(
            type(betas) is not tuple or any(isinstance(value, Tensor) for value in (lr, weight_decay, *betas))
            for lr, betas, _, weight_decay in self.values
        )

    @property
    def buckets(self) -> list[Bucket]:
        return [bucket for part in self.parts for bucket in part.buckets]

    def gradients(
        self, groups: Sequence[dict[str, Any]], state: State, frame: Frame, *, capturing: bool = False
    ) -> list[Tensor] | None:
        """The gradients to step with, in the order of the buckets, or None if the plan no longer fits."""
        params = self.params
        if (
            frame != self.frame
            or _structure(groups) != self.structure
            or (self.only is None and not self._same_params(groups))
            or not self._same_state(state)
            # Offloading code re-points every state at once: the first of each bucket tells.
            or list(map(Tensor.data_ptr, self.first_moments)) != self.first_moment_addresses
            or any(part.rows.steps._version != part.rows.version for part in self.parts)
            or list(map(Tensor.data_ptr, params)) != self.param_addresses
            or list(map(Tensor.numel, params)) != self.param_numels
            or list(map(Tensor.stride, self.squares)) != self.square_strides
            or any(param.grad is not None for param in self.without_grad)
        ):
            return None
        if self.volatile or list(map(_values_of, groups)) != self.values:
            self._read_values(groups)
            if any(hyper.on_device for hyper in self.hypers) != self.hypers_on_device:
                return None
        grads = list(map(_grad_of, params))
        try:
            addresses = list(map(Tensor.data_ptr, grads))
        except (TypeError, RuntimeError):  # no gradient any more, or one without memory of its own
            return None
        # An allocator hands out the same address for another layout, so that addresses alone do not tell.
        if (
            list(map(Tensor.is_contiguous, grads)) != self.grad_contiguous
            or (self.strided and [grads[i].stride() for i in self.strided] != self.grad_strides)
            or (self.any_dtype and [grads[i].dtype for i in self.any_dtype] != self.grad_dtypes)
            or (self.may_be_neg and [grads[i].is_neg() for i in self.may_be_neg] != self.grad_neg)
        ):
            return None
        if self.may_have_gaps:
            self.copies = []
            for i in self.may_have_gaps:
                if not is_dense(grads[i]):
                    self.copies.append(grads[i].contiguous())
                    addresses[i] = self.copies[-1].data_ptr()
        replayed = any(part.addresses is not None and part.addresses.replayed for part in self.parts)
        moved = capturing or replayed or addresses != self.grad_addresses
        if moved and not self._take_addresses(grads, addresses, capturing):
            return None
        return grads

    def _same_params(self, groups: Sequence[dict[str, Any]]) -> bool:
        """Whether the groups hold the same objects. `==` would compare the tensors' elements."""
        params = list(map(_params_of, groups))
        return list(map(len, params)) == self.sizes and all(map(is_, chain.from_iterable(params), self.group_params))

    def _same_state(self, state: State) -> bool:
        """Whether no entry has been replaced."""
        if self.only is None:
            return state.changes is self.changes and self.changes.seen
        entries = state.get(self.only, {})
        return len(entries) == len(self.entries) and all(map(is_, entries.values(), self.entries))

    def _take_addresses(self, grads: list[Tensor], addresses: list[int], capturing: bool) -> bool:
        """Use gradients that lie elsewhere; False if they are not like the ones before."""
        if list(map(Tensor.numel, grads)) != self.param_numels:
            return False
        for part, its in self._slices():
            replayed = part.addresses is not None and part.addresses.replayed
            moved = capturing or replayed or addresses[its] != self.grad_addresses[its]
            if moved and not part.take_addresses(addresses[its], capturing=capturing):
                return False
        self.grad_addresses = addresses
        return True

    def step(
        self,
        grads: list[Tensor],
        limits: Limits,
        scaling: Scaling,
        control_on: Callable[[torch.device], Control],
        *,
        capturing: bool = False,
    ) -> None:
        """Step everything, with gradients from `gradients`.

        Args:
            limits: of this step.
            scaling: of the gradients.
            control_on: the optimizer's control on a device.
            capturing: whether a CUDA graph is being captured.
        """
        need_norm = self.frame.need_norm
        if need_norm and self.parts:
            self._decide(grads, limits, scaling, control_on)
        for part, its in self._slices():
            control = control_on(part.device) if need_norm or scaling.given else None
            part.step(grads[its], self.hypers, scaling, control, known=need_norm, capturing=capturing)
        if not capturing:
            self.copies = []

    def _decide(
        self, grads: list[Tensor], limits: Limits, scaling: Scaling, control_on: Callable[[torch.device], Control]
    ) -> None:
        """The norm of all gradients, and what follows from it, on every device."""
        first = self.parts[0]
        if len(self.parts) == 1 and first.has_kernels:
            first.write_control(control_on(first.device), limits, scaling)
            return
        sums = [move(part.sum_of_squares(grads[its]), first.device) for part, its in self._slices()]
        values = reference.gradient_control(
            torch.stack(sums).sum(), *scaling.to(first.device), limits.max_grad_norm, limits.skip_above
        )
        for part in self.parts:
            control_on(part.device).set(values)

    def _slices(self) -> list[tuple[Part, slice]]:
        slices, start = [], 0
        for part in self.parts:
            slices.append((part, slice(start, start + len(part.params))))
            start += len(part.params)
        return slices


def _structure(groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    return [*map(_structural_of, groups), *[group.get("decay_lr") for group in groups]]


def _read_steps(items: Sequence[Item]) -> list[float]:
    """Step counts, with one synchronisation for each device that holds some."""
    steps = [torch.as_tensor(item.entries["step"], dtype=torch.float32).reshape(()) for item in items]
    values = [0.0] * len(steps)
    for device in {step.device for step in steps}:
        indices = [i for i, step in enumerate(steps) if step.device == device]
        for i, value in zip(indices, torch.stack([steps[i] for i in indices]).tolist(), strict=True):
            values[i] = value
    return values


def _separate_shared_memory(items: Sequence[Item]) -> None:
    """Give parameters that share memory different waves, in their order: in one launch they would race."""
    by_device: dict[torch.device, list[tuple[int, int, int]]] = defaultdict(list)
    for order, param in enumerate(item.param for item in items):
        if param.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
            start = param.data_ptr()
            by_device[param.device].append((start, start + span * param.element_size(), order))
    for extents in by_device.values():
        sharing: list[int] = []
        reach = 0
        for start, end, order in sorted(extents):
            if start >= reach:
                sharing = []
            sharing.append(order)
            reach = max(reach, end)
            if len(sharing) > 1:
                for wave, index in enumerate(sorted(sharing)):
                    items[index].wave = wave
