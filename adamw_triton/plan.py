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

Of a DTensor all this is about what lies on this rank, read anew as well: FSDP2 replaces local tensors.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager, launch
from .device_plan import DevicePlan
from .global_norms import GlobalNorms
from .grad_control import GradDecision, GradNormOptions, GradScalerInputs, move
from .host_plan import HostPlan
from .hyperparams import Hyperparams
from .members import Members
from .param_work import GradLayout, ParamWork, check_works, complete, first_occurrences, is_ready, set_turns
from .rank_checks import check_no_fsdp1
from .rank_view import RankView, StepTensors
from .signature import Signature
from .step_counts import place_steps
from .storage import StorageOptions
from .validation import check_decay_lr, check_hyperparams, is_simulated

_options_of = itemgetter(
    "foreach", "amsgrad", "maximize", "capturable", "differentiable", "cautious", *StorageOptions._fields
)
_values_of = itemgetter("lr", "betas", "eps", "weight_decay", "decouple_lr", "decay_lr")
_params_of = itemgetter("params")


class StepInputs(NamedTuple):
    """What a step is taken with, besides param groups and state.

    Attributes:
        norm_options: of the norm of all gradients.
        scaler: what GradScaler leaves to the step.
        statistics: whether norms of update and parameters are wanted.
        norm_group: process group of ranks with other parameters of the model, or None.
        home: device of the optimizer's first parameter.
        decision_on: the optimizer's decision on a device.
    """

    norm_options: GradNormOptions
    scaler: GradScalerInputs
    statistics: bool
    norm_group: Any
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
        self._devices: list[tuple[DevicePlan | HostPlan, slice]] = []  # with their parameters' place in the signature
        self._outside: list[int] = []  # indices of parameters that are not in it
        self._values: list[Any] | None = None
        self._hyperparams: list[Hyperparams] = []
        self._known_grads: dict[int, tuple[GradLayout, bool]] = {}  # by id of the parameter: layout, alignment
        self._view = RankView()
        self._eager_sums: list[tuple[int, Tensor]] = []  # class, sums of squares
        self._sums_of_all_ranks: Tensor | None = None
        self._captured: list[Any] = []  # whose tables CUDA graphs read

    def step(self, groups: Sequence[Mapping[str, Any]], state: MutableMapping[Any, Any], inputs: StepInputs) -> bool:
        """Step every parameter that has a gradient.

        Args:
            groups: param groups with all their options.
            state: of the optimizer, filled in for parameters at their first update.

        Returns:
            Whether there was a gradient.

        Raises:
            RuntimeError, ValueError, TypeError: of `validation`; nothing has been written then.
        """
        listed = list(chain.from_iterable(map(_params_of, groups)))
        if not self._view.update(listed, inputs.norm_group):
            self._signature, self._devices = None, []
        ranks = self._view.sums
        norms = GlobalNorms(ranks, inputs.home, inputs.decision_on, inputs.norm_options, inputs.scaler)
        # Other ranks wait in what this one leaves out.
        wanted = {"norm": inputs.norm_options.need_norm, "statistics": inputs.statistics}
        due = {what for what, is_wanted in wanted.items() if is_wanted and not ranks.is_local}
        try:
            return self._step(listed, groups, state, inputs, norms, due)
        except Exception:
            if "norm" in due:
                norms.decide([], [], refused=True)
            if "statistics" in due:
                self._add_up_statistics(inputs.home)
            raise

    def _step(
        self,
        listed: list[Tensor],
        groups: Sequence[Mapping[str, Any]],
        state: MutableMapping[Any, Any],
        inputs: StepInputs,
        norms: GlobalNorms,
        due: set[str],
    ) -> bool:
        tensors = self._view.read(listed)
        _, params, grads = tensors
        hyperparams = self._read_hyperparams(groups)
        sizes = [len(group["params"]) for group in groups]
        options = (list(map(_options_of, groups)), sizes, inputs.norm_options.need_norm, inputs.statistics)
        members = None if self._signature is None else self._signature.read(options, listed, params, grads, state)
        if members is not None and any(grads[i] is not None and _has_plan(params[i]) for i in self._outside):
            members = None
        outside = self._outside if members is not None else first_occurrences(listed)
        with_grad = [i for i in outside if grads[i] is not None]
        works = self._view.works(with_grad, tensors, groups, state, self._first_index) if with_grad else []
        check_no_fsdp1((work.listed for work in works), inputs.norm_options, statistics=inputs.statistics)
        check_works(works, groups)
        capturing = is_capturing()
        if capturing:
            _check_capture(groups, members is not None and not any(work.param.is_cuda for work in works))
        eager_works = [work for work in works if not _has_plan(work.param)]
        for work in works:
            state.setdefault(work.listed, work.stored_entries)
        complete(works, groups)
        eager.place_steps(eager_works)
        if members is None:
            members = self._build(works, options, tensors, groups, state, inputs)
        has_grads = bool(eager_works) or any(grad is not None for grad in members.grads)
        if has_grads:
            self._launch(members, eager_works, groups, hyperparams, inputs, norms, due, capturing)
        elif "norm" in due:
            due.remove("norm")
            norms.decide([], [])
        if "statistics" in due:
            due.remove("statistics")
            self._add_up_statistics(inputs.home)
        return has_grads

    def forget_captures(self) -> None:
        """Free the tables of CUDA graphs, which must not be replayed any more."""
        self._captured.clear()

    def sums_of_squares(self, device: torch.device) -> Tensor | None:
        """Return those of the change of all parameters at the last step, and of these: float64 [2] on the device."""
        if not self._view.sums.is_local:
            return None if self._sums_of_all_ranks is None else move(self._sums_of_all_ranks, device)
        sums = self._sums_by_class(device)
        return None if sums is None else sums.sum(dim=0)

    def _sums_by_class(self, device: torch.device) -> Tensor | None:
        """Return this rank's, float64 [n_classes, 2]."""
        tables = [move(table, device) for plan, _ in self._devices if (table := plan.statistics()) is not None]
        if self._eager_sums:
            by_class: list[list[Tensor]] = [[] for _ in range(self._view.sums.n_classes)]
            for number, sums in self._eager_sums:
                by_class[number].append(move(sums, device))
            nothing = torch.zeros(2, dtype=torch.float64, device=device)
            tables.append(torch.stack([torch.stack(sums).sum(dim=0) if sums else nothing for sums in by_class]))
        return torch.stack(tables).sum(dim=0) if tables else None

    def _add_up_statistics(self, device: torch.device) -> None:
        """Add up the sums of all ranks, so that one may be asked for them alone."""
        sums = torch.zeros(self._view.sums.n_classes + 1, 2, dtype=torch.float64, device=device)
        of_rank = self._sums_by_class(device)
        if of_rank is not None:
            sums[:-1] = of_rank
        self._sums_of_all_ranks = self._view.sums.add_up(sums)[0]

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

    def _build(
        self,
        works: Sequence[ParamWork],
        options: Any,
        tensors: StepTensors,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
        inputs: StepInputs,
    ) -> Members:
        """Make the plans of all parameters that go through kernels or are on the CPU, and have a gradient or had one.

        Args:
            works: of the parameters with gradients, checked and complete.
        """
        self._signature, self._devices = None, []
        chosen = {work.index - self._first_index for work in works}
        listed = tensors.listed
        without_grad = [i for i in first_occurrences(listed) if i not in chosen and state.get(listed[i])]
        candidates = [*works, *self._view.works(without_grad, tensors, groups, state, self._first_index)]
        by_device: dict[torch.device, list[ParamWork]] = defaultdict(list)
        for work in sorted(candidates, key=lambda work: work.index):
            if _has_plan(work.param) and (work.grad is not None or is_ready(work, groups)):
                work.see_gradient(self._known_grads)
                by_device[work.param.device].append(work)
        in_order: list[ParamWork] = []
        for device, its_works in by_device.items():
            place_steps([work.entries for work in its_works], device)
            set_turns(its_works)
            how: dict[str, Any] = {"statistics": inputs.statistics, "n_classes": self._view.sums.n_classes}
            plan: DevicePlan | HostPlan
            if launch.has_kernels(device):
                plan = DevicePlan(its_works, groups, need_norm=inputs.norm_options.need_norm, **how)
            else:
                plan = HostPlan(its_works, groups, **how)
            self._devices.append((plan, slice(len(in_order), len(in_order) + len(its_works))))
            inputs.decision_on(device)  # which a capture could not make
            in_order += [its_works[i] for i in plan.order]
        self._known_grads = {id(work.listed): (work.grad_layout, work.is_aligned) for work in in_order}
        order = [work.index - self._first_index for work in in_order]
        self._outside = sorted(set(first_occurrences(listed)) - set(order))
        if not in_order:
            return Members([], [], [], [], b"", True)
        self._signature = Signature(
            options,
            len(listed),
            order,
            [
                (slice(span.start + group.span.start, span.start + group.span.stop), group.state_names)
                for plan, span in self._devices
                for group in plan.groups
            ],
            [work.param for work in in_order],
            [work.stored_entries for work in in_order],
            [work.grad_layout for work in in_order],
            [is_aligned for plan, _ in self._devices for is_aligned in plan.aligned],
        )
        members = self._signature.read(options, *tensors, state)
        assert members is not None, "a plan fits what it was just built from"
        return members

    def _launch(
        self,
        members: Members,
        eager_works: Sequence[ParamWork],
        groups: Sequence[Mapping[str, Any]],
        hyperparams: Sequence[Hyperparams],
        inputs: StepInputs,
        norms: GlobalNorms,
        due: set[str],
        capturing: bool,
    ) -> None:
        """Decide, and step all; everything has been checked."""
        norm_options, scaler = inputs.norm_options, inputs.scaler
        if norm_options.need_norm and self._signature is not None:
            members = _without_gaps(members, self._signature.with_gaps)
        parts = [(plan, members.part(span)) for plan, span in self._devices]
        temporary = [plan.write_inputs(part, hyperparams, capturing=capturing) for plan, part in parts]
        subject = norm_options.need_norm or scaler.present
        due.discard("norm")
        decided, sums = norms.decide(parts, eager_works) if subject else (False, None)
        for plan, part in parts:
            decision = inputs.decision_on(plan.device) if subject else None
            plan.step(part, decision, scaler, decided=decided, sums=sums, options=norm_options)
        decision_on = inputs.decision_on if subject else None
        of_eager = eager.step(eager_works, groups, hyperparams, decision_on, statistics=inputs.statistics)
        if of_eager is not None:
            self._eager_sums = list(zip((w.norm_class for w in eager_works), of_eager, strict=bool(of_eager)))
        if capturing:
            self._captured.append((self._devices, temporary))


def _has_plan(param: Tensor) -> bool:
    """Whether a parameter is stepped by a plan, and not one by one."""
    return not is_simulated(param) and (param.device.type == "cpu" or launch.has_kernels(param.device))


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
