"""Which tensors go in which launch, and when that has to be thought over.

    param groups, state, gradients          read anew at every step
          |
      Signature ---- different ----> build: check all, complete state, group what can share a launch
          |                              |
        equal                            |
          |                              v
          +--------> DevicePlan of each device: tables of addresses, step counts
                         |
                     LaunchGroup of each mix of formats: one launch

Kept between steps are numbers, and tables on the device; no parameter, gradient or state, so that whatever is dropped
or replaced is free at once. Compared at every step is all that a table holds: addresses, dtypes, shapes and strides,
and the options that choose a kernel. Addresses of gradients, and hyper-parameters, are written to the device when they
change. Parameters on devices without kernels are stepped one by one in eager torch, and nothing about them is kept.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager, launch
from .device_plan import DevicePlan, Members
from .grad_control import GradDecision, GradNormOptions, GradScalerInputs, decide, move
from .hyperparams import Hyperparams
from .launch_group import GradLayout, ParamWork
from .signature import Signature
from .step_counts import place_steps
from .storage import StorageOptions
from .validation import check_decay_lr, check_hyperparams, check_implementation, check_storage

_options_of = itemgetter(
    "foreach", "amsgrad", "maximize", "capturable", "differentiable", "cautious", *StorageOptions._fields
)
_values_of = itemgetter("lr", "betas", "eps", "weight_decay", "decouple_lr", "decay_lr")
_params_of, _grad_of = itemgetter("params"), attrgetter("grad")


class StepInputs(NamedTuple):
    """What a step is taken with, besides param groups and state.

    Attributes:
        norm_options: of the norm of all gradients.
        scaler: what GradScaler leaves to the step.
        statistics: whether norms of update and parameters are wanted.
        home: device of the optimizer's first parameter.
        decision_on: the optimizer's decision on a device.
    """

    norm_options: GradNormOptions
    scaler: GradScalerInputs
    statistics: bool
    home: torch.device
    decision_on: Callable[[torch.device], GradDecision]


class Plan:
    """The launches of a step.

    Args:
        first_index: number of the first parameter among all of the optimizer: random bits depend on it.
    """

    def __init__(self, first_index: int = 0) -> None:
        self._first_index = first_index
        self._signature: Signature | None = None
        self._devices: list[tuple[DevicePlan, slice]] = []  # with their parameters' place in the signature
        self._outside: list[int] = []  # indices of parameters that are not in it
        self._values: list[Any] | None = None
        self._hyperparams: list[Hyperparams] = []
        self._known_grads: dict[int, tuple[GradLayout, bool]] = {}  # by id of the parameter: layout, alignment
        self._eager_sums: list[Tensor] = []
        self._captured: list[Any] = []  # whose tables CUDA graphs read

    def step(self, groups: Sequence[Mapping[str, Any]], state: MutableMapping[Any, Any], inputs: StepInputs) -> None:
        """Step every parameter that has a gradient.

        Args:
            groups: param groups with all their options.
            state: of the optimizer, filled in for parameters at their first update.

        Raises:
            RuntimeError, ValueError, TypeError: of `validation`; nothing has been written then.
        """
        params = list(chain.from_iterable(map(_params_of, groups)))
        grads: list[Tensor | None] = list(map(_grad_of, params))
        hyperparams = self._read_hyperparams(groups)
        sizes = [len(group["params"]) for group in groups]
        options = (list(map(_options_of, groups)), sizes, inputs.norm_options.need_norm, inputs.statistics)
        members = None if self._signature is None else self._signature.read(options, params, grads, state)
        if members is not None and any(grads[i] is not None and launch.can_launch(params[i]) for i in self._outside):
            members = None
        outside = self._outside if members is not None else _first_occurrences(params)
        with_grad = [i for i in outside if grads[i] is not None]
        works = self._works(with_grad, params, grads, groups, state) if with_grad else []
        _check(works, groups)
        capturing = is_capturing()
        if capturing:
            _check_capture(groups, members is not None and not any(work.param.is_cuda for work in works))
        eager_works = [work for work in works if not launch.can_launch(work.param)]
        for work in works:
            state.setdefault(work.param, work.entries)
            amsgrad = groups[work.group]["amsgrad"]
            _storage_of(work, groups).complete(work.param, work.entries, amsgrad=amsgrad)
        eager.place_steps(eager_works)
        if members is None:
            members = self._build(works, options, params, grads, groups, state, inputs)
        if eager_works or any(grad is not None for grad in members.grads):
            self._launch(members, eager_works, groups, hyperparams, inputs, capturing)

    def forget_captures(self) -> None:
        """Free the tables of CUDA graphs, which must not be replayed any more."""
        self._captured.clear()

    def sums_of_squares(self, device: torch.device) -> Tensor | None:
        """Return those of the change of all parameters at the last step, and of these: float64 [2] on the device."""
        tables = [plan.statistics for plan, _ in self._devices if plan.statistics is not None]
        sums = [table[..., :2].sum(dim=(0, 1), dtype=torch.float64) for table in tables]
        sums = [move(of_device, device) for of_device in (*sums, *self._eager_sums)]
        return torch.stack(sums).sum(dim=0) if sums else None

    def _read_hyperparams(self, groups: Sequence[Mapping[str, Any]]) -> list[Hyperparams]:
        """Return those of each group, checked when they have changed."""
        values = list(chain.from_iterable(map(_values_of, groups)))
        if self._values is None or len(values) != len(self._values) or not all(map(is_, values, self._values)):
            for group in groups:
                check_hyperparams(group)
                check_decay_lr(group)
            self._hyperparams = list(map(Hyperparams.from_group, groups))
            # What a tensor or a list holds can change while the object stays.
            is_fixed = not any(isinstance(value, Tensor) for of_group in self._hyperparams for value in of_group)
            self._values = values if is_fixed and not any(type(value) is list for value in values) else None
        return self._hyperparams

    def _works(
        self,
        indices: Sequence[int],
        params: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
    ) -> list[ParamWork]:
        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        return [
            ParamWork(params[i], grads[i], state.get(params[i], {}), group_of[i], self._first_index + i)
            for i in indices
        ]

    def _build(
        self,
        works: Sequence[ParamWork],
        options: Any,
        params: list[Tensor],
        grads: list[Tensor | None],
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
        inputs: StepInputs,
    ) -> Members:
        """Make the tables of all parameters that go through kernels, and have a gradient or had one.

        Args:
            works: of the parameters with gradients, checked and complete.
        """
        self._signature, self._devices = None, []
        chosen = {work.index - self._first_index for work in works}
        without_grad = [i for i in _first_occurrences(params) if i not in chosen and state.get(params[i])]
        candidates = [*works, *self._works(without_grad, params, grads, groups, state)]
        by_device: dict[torch.device, list[ParamWork]] = defaultdict(list)
        for work in sorted(candidates, key=lambda work: work.index):
            if launch.can_launch(work.param) and (work.grad is not None or _is_ready(work, groups)):
                work.see_gradient(self._known_grads)
                by_device[work.param.device].append(work)
        in_order: list[ParamWork] = []
        for device, its_works in by_device.items():
            place_steps([work.entries for work in its_works], device)
            _set_turns(its_works)
            plan = DevicePlan(its_works, groups, need_norm=inputs.norm_options.need_norm, statistics=inputs.statistics)
            self._devices.append((plan, slice(len(in_order), len(in_order) + len(its_works))))
            inputs.decision_on(device)  # which a capture could not make
            in_order += [its_works[i] for i in plan.order]
        self._known_grads = {id(work.param): (work.grad_layout, work.is_aligned) for work in in_order}
        order = [work.index - self._first_index for work in in_order]
        self._outside = sorted(set(_first_occurrences(params)) - set(order))
        if not in_order:
            return Members([], [], [], b"", True)
        self._signature = Signature(
            options,
            len(params),
            order,
            [
                (slice(span.start + group.span.start, span.start + group.span.stop), group.state_names)
                for plan, span in self._devices
                for group in plan.groups
            ],
            [work.param for work in in_order],
            [work.entries for work in in_order],
            [work.grad_layout for work in in_order],
            [is_aligned for plan, _ in self._devices for is_aligned in plan.aligned],
        )
        members = self._signature.read(options, params, grads, state)
        assert members is not None, "a plan fits what it was just built from"
        return members

    def _launch(
        self,
        members: Members,
        eager_works: Sequence[ParamWork],
        groups: Sequence[Mapping[str, Any]],
        hyperparams: Sequence[Hyperparams],
        inputs: StepInputs,
        capturing: bool,
    ) -> None:
        """Decide, and step all; everything has been checked."""
        norm_options, scaler = inputs.norm_options, inputs.scaler
        if norm_options.need_norm and self._signature is not None:
            members = _without_gaps(members, self._signature.with_gaps)
        parts = [(plan, members.part(span)) for plan, span in self._devices]
        temporary = [plan.write_inputs(part, hyperparams, capturing=capturing) for plan, part in parts]
        subject = norm_options.need_norm or scaler.present
        decided = subject and self._decide(parts, eager_works, inputs)
        for plan, part in parts:
            decision = inputs.decision_on(plan.device) if subject else None
            plan.step(part, decision, scaler, decided=decided)
        decision_on = inputs.decision_on if subject else None
        sums = eager.step(eager_works, groups, hyperparams, decision_on, statistics=inputs.statistics)
        if sums is not None:
            self._eager_sums = sums
        if capturing:
            self._captured.append((self._devices, temporary))

    def _decide(
        self, parts: Sequence[tuple[DevicePlan, Members]], eager_works: Sequence[ParamWork], inputs: StepInputs
    ) -> bool:
        """Decide over the gradients of the whole model; return False where that is left to the kernel that counts."""
        need_norm = inputs.norm_options.need_norm
        if len(parts) == 1 and not eager_works and parts[0][0].device == inputs.home:
            if need_norm:
                parts[0][0].decide(inputs.decision_on(inputs.home), inputs.scaler, inputs.norm_options)
            return need_norm
        devices = [*(plan.device for plan, _ in parts), *(work.param.device for work in eager_works)]
        at = inputs.home if inputs.home.type != "meta" else next((d for d in devices if d.type != "meta"), inputs.home)
        total = None
        if need_norm:
            sums = [plan.sum_of_squares() for plan, _ in parts]
            sums += [
                eager.sum_of_squares(work)
                for work in eager_works
                if work.param.device.type != "meta" or at.type == "meta"
            ]
            total = torch.stack([move(of_device, at) for of_device in sums]).sum()
        values = decide(total, inputs.scaler.to(at), inputs.norm_options)
        inputs.decision_on(inputs.home).set(values)
        for device in set(devices) - {inputs.home}:
            inputs.decision_on(device).values.copy_(move(values, device))
        return True


def is_capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _check_capture(groups: Sequence[Mapping[str, Any]], is_prepared: bool) -> None:
    """Refuse to be captured in a CUDA graph.

    Raises:
        RuntimeError: not all groups are capturable, or the step needs what has not been made before the capture.
    """
    if not all(group["capturable"] for group in groups):
        raise RuntimeError(
            "step() cannot be captured in a CUDA graph unless it was announced: build the optimizer with "
            "capturable=True, or capture forward and backward only"
        )
    if not is_prepared:
        raise RuntimeError(
            "step() can be captured in a CUDA graph only after one like it outside, which allocates what the graph "
            "uses: take a warm-up step with gradients for the same parameters and with the same options, on a side "
            "stream, before the capture"
        )


def _first_occurrences(params: Sequence[Tensor]) -> list[int]:
    """Return the index of each parameter; one that is listed twice steps once."""
    first: dict[int, int] = {}
    for i, param in enumerate(params):
        first.setdefault(id(param), i)
    return list(first.values())


def _storage_of(work: ParamWork, groups: Sequence[Mapping[str, Any]]) -> StorageOptions:
    return StorageOptions.from_group(groups[work.group])


def _check(works: Sequence[ParamWork], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what cannot be stepped, before anything is written."""
    by_group: dict[int, list[Tensor]] = defaultdict(list)
    for work in works:
        work.check()
        by_group[work.group].append(work.param)
    for group, params in by_group.items():  # whose options may have changed since they were checked
        check_implementation(groups[group])
        check_storage(groups[group], params)
        if groups[group]["capturable"] and any(param.is_cuda and not launch.can_launch(param) for param in params):
            raise RuntimeError("capturable=True needs Triton on a GPU; install triton, or use capturable=False")


def _is_ready(work: ParamWork, groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a parameter without a gradient can take part in the tables, to be stepped once it has one."""
    try:
        work.check()
        check_storage(groups[work.group], [work.param])
    except (RuntimeError, ValueError, TypeError):  # it is refused when it has a gradient
        return False
    return "step" in work.entries and _storage_of(work, groups).is_complete(
        work.param, work.entries, amsgrad=groups[work.group]["amsgrad"]
    )


def _set_turns(works: Sequence[ParamWork]) -> None:
    """Have parameters that share memory stepped one after the other: in one launch they would race."""
    extents = []
    for work in works:
        param = work.param
        if param.numel():
            span = 1 + sum((size - 1) * stride for size, stride in zip(param.shape, param.stride(), strict=True))
            extents.append((param.data_ptr(), param.data_ptr() + span * param.element_size(), work))
    extents.sort(key=lambda extent: extent[:2])
    reach, last = 0, None
    for start, end, work in extents:
        if start < reach and last is not None:
            last.turn, work.turn = 1 + last.index, 1 + work.index
        if end > reach:
            reach, last = end, work


def _without_gaps(members: Members, with_gaps: Sequence[int]) -> Members:
    """Return members whose gradients can be walked through memory: those with gaps are copied."""
    if not with_gaps:
        return members
    grads, addresses = list(members.grads), bytearray(members.grad_addresses)
    for i in with_gaps:
        grad = grads[i]
        if grad is not None:
            grads[i] = copy = grad.contiguous()
            struct.pack_into("=q", addresses, 8 * i, copy.data_ptr())
    return members._replace(grads=grads, grad_addresses=bytes(addresses))
