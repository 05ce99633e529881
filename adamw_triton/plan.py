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
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dtensors, eager, launch
from .device_plan import DevicePlan, Members
from .global_norms import GlobalNorms, RankSums
from .grad_control import GradDecision, GradNormOptions, GradScalerInputs, move
from .hyperparams import Hyperparams
from .launch_group import GradLayout, ParamWork
from .sharding import LocalEntries, Sharding
from .signature import Signature
from .step_counts import place_steps
from .storage import StorageOptions
from .validation import check_decay_lr, check_hyperparams, check_implementation, check_no_fsdp1, check_storage

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


class Lists(NamedTuple):
    """All parameters of a step, in the order of their groups.

    Attributes:
        listed: as the groups have them.
        params: what of them lies on this rank; the same list if all are plain tensors.
        grads: likewise of gradients.
        shardings: None of a plain tensor.
        norm_classes: of `RankSums`.
    """

    listed: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor | None]
    shardings: Sequence[Sharding | None]
    norm_classes: Sequence[int]


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
        self._specs: list[Any] = []  # of DTensors, if there are any
        self._norm_group: Any = None
        self._shardings: list[Sharding | None] = []
        self._ranks = RankSums([], None)
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
        self._see_ranks(listed, inputs.norm_group)
        norms = GlobalNorms(self._ranks, inputs.home, inputs.decision_on, inputs.norm_options, inputs.scaler)
        # Other ranks wait in what this one leaves out.
        wanted = {"norm": inputs.norm_options.need_norm, "statistics": inputs.statistics}
        due = {what for what, is_due in wanted.items() if is_due and not self._ranks.is_local}
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
        lists = self._read_tensors(listed)
        hyperparams = self._read_hyperparams(groups)
        sizes = [len(group["params"]) for group in groups]
        options = (list(map(_options_of, groups)), sizes, inputs.norm_options.need_norm, inputs.statistics)
        _, params, grads, _, _ = lists
        members = None if self._signature is None else self._signature.read(options, listed, params, grads, state)
        if members is not None and any(grads[i] is not None and launch.can_launch(params[i]) for i in self._outside):
            members = None
        outside = self._outside if members is not None else _first_occurrences(listed)
        with_grad = [i for i in outside if grads[i] is not None]
        works = self._works(with_grad, lists, groups, state) if with_grad else []
        _check(works, groups, inputs)
        capturing = is_capturing()
        if capturing:
            _check_capture(groups, members is not None and not any(work.param.is_cuda for work in works))
        eager_works = [work for work in works if not launch.can_launch(work.param)]
        for work in works:
            state.setdefault(work.listed, work.stored_entries)
            amsgrad = groups[work.group]["amsgrad"]
            _storage_of(work, groups).complete(
                work.param, work.entries, amsgrad=amsgrad, allows_codes=work.allows_codes
            )
        eager.place_steps(eager_works)
        if members is None:
            members = self._build(works, options, lists, groups, state, inputs)
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

    def _see_ranks(self, listed: Sequence[Tensor], norm_group: Any) -> None:
        """Note how the parameters are dealt out to ranks."""
        specs = [getattr(p, "_spec", None) for p in listed] if dtensors.are_there(listed) else []
        unchanged = len(specs) == len(self._specs) and all(map(is_, specs, self._specs))
        if not unchanged:
            self._signature, self._devices = None, []
            self._specs = specs
            self._shardings = [None if spec is None else Sharding(p) for p, spec in zip(listed, specs, strict=True)]
        if not unchanged or norm_group is not self._norm_group:
            self._norm_group = norm_group
            self._ranks = RankSums(self._shardings, norm_group)

    def _read_tensors(self, listed: list[Tensor]) -> Lists:
        grads: list[Tensor | None] = list(map(_grad_of, listed))
        if not self._specs:
            return Lists(listed, listed, grads, repeat(None), repeat(0))
        params = dtensors.locals_of(listed)
        return Lists(listed, params, dtensors.local_grads(listed, grads), self._shardings, self._ranks.class_of)

    def forget_captures(self) -> None:
        """Free the tables of CUDA graphs, which must not be replayed any more."""
        self._captured.clear()

    def sums_of_squares(self, device: torch.device) -> Tensor | None:
        """Return those of the change of all parameters at the last step, and of these: float64 [2] on the device."""
        if not self._ranks.is_local:
            return None if self._sums_of_all_ranks is None else move(self._sums_of_all_ranks, device)
        sums = self._sums_by_class(device)
        return None if sums is None else sums.sum(dim=0)

    def _sums_by_class(self, device: torch.device) -> Tensor | None:
        """Return this rank's, float64 [n_classes, 2]."""
        tables = [move(table, device) for plan, _ in self._devices if (table := plan.statistics()) is not None]
        if self._eager_sums:
            by_class: list[list[Tensor]] = [[] for _ in range(self._ranks.n_classes)]
            for number, sums in self._eager_sums:
                by_class[number].append(move(sums, device))
            nothing = torch.zeros(2, dtype=torch.float64, device=device)
            tables.append(torch.stack([torch.stack(sums).sum(dim=0) if sums else nothing for sums in by_class]))
        return torch.stack(tables).sum(dim=0) if tables else None

    def _add_up_statistics(self, device: torch.device) -> None:
        """Add up the sums of all ranks, so that one may be asked for them alone."""
        sums = torch.zeros(self._ranks.n_classes + 1, 2, dtype=torch.float64, device=device)
        of_rank = self._sums_by_class(device)
        if of_rank is not None:
            sums[:-1] = of_rank
        self._sums_of_all_ranks = self._ranks.add_up(sums)[0]

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
        lists: Lists,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
    ) -> list[ParamWork]:
        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        works = []
        for i in indices:
            entries: MutableMapping[str, Any] = state.get(lists.listed[i], {})
            sharding, norm_class = (lists.shardings[i], lists.norm_classes[i]) if self._specs else (None, 0)
            if sharding is not None:
                entries = LocalEntries(entries, sharding)
            place = group_of[i], self._first_index + i
            works.append(
                ParamWork(lists.listed[i], lists.params[i], lists.grads[i], entries, *place, sharding, norm_class)
            )
        return works

    def _build(
        self,
        works: Sequence[ParamWork],
        options: Any,
        lists: Lists,
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
        listed = lists.listed
        without_grad = [i for i in _first_occurrences(listed) if i not in chosen and state.get(listed[i])]
        candidates = [*works, *self._works(without_grad, lists, groups, state)]
        by_device: dict[torch.device, list[ParamWork]] = defaultdict(list)
        for work in sorted(candidates, key=lambda work: work.index):
            if launch.can_launch(work.param) and (work.grad is not None or _is_ready(work, groups)):
                work.see_gradient(self._known_grads)
                by_device[work.param.device].append(work)
        in_order: list[ParamWork] = []
        for device, its_works in by_device.items():
            place_steps([work.entries for work in its_works], device)
            _set_turns(its_works)
            plan = DevicePlan(
                its_works,
                groups,
                need_norm=inputs.norm_options.need_norm,
                statistics=inputs.statistics,
                n_classes=self._ranks.n_classes,
            )
            self._devices.append((plan, slice(len(in_order), len(in_order) + len(its_works))))
            inputs.decision_on(device)  # which a capture could not make
            in_order += [its_works[i] for i in plan.order]
        self._known_grads = {id(work.listed): (work.grad_layout, work.is_aligned) for work in in_order}
        order = [work.index - self._first_index for work in in_order]
        self._outside = sorted(set(_first_occurrences(listed)) - set(order))
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
            [work.entries for work in in_order],
            [work.grad_layout for work in in_order],
            [is_aligned for plan, _ in self._devices for is_aligned in plan.aligned],
        )
        members = self._signature.read(options, listed, lists.params, lists.grads, state)
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
        decided = subject and norms.decide([plan for plan, _ in parts], eager_works)
        for plan, part in parts:
            decision = inputs.decision_on(plan.device) if subject else None
            plan.step(part, decision, scaler, decided=decided)
        decision_on = inputs.decision_on if subject else None
        sums = eager.step(eager_works, groups, hyperparams, decision_on, statistics=inputs.statistics)
        if sums is not None:
            self._eager_sums = list(zip((work.norm_class for work in eager_works), sums, strict=bool(sums)))
        if capturing:
            self._captured.append((self._devices, temporary))


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


def _check(works: Sequence[ParamWork], groups: Sequence[Mapping[str, Any]], inputs: StepInputs) -> None:
    """Refuse what cannot be stepped, before anything is written."""
    by_group: dict[int, list[Tensor]] = defaultdict(list)
    check_no_fsdp1([work.listed for work in works], inputs.norm_options, statistics=inputs.statistics)
    for work in works:
        work.check()
        if groups[work.group]["stochastic_rounding"] and not (work.sharding is None or work.sharding.has_indices):
            raise ValueError(
                f"stochastic rounding needs to know where in the whole parameter a rank's elements are; it cannot with "
                f"placements {work.sharding.placements} on {work.sharding.mesh}. Use stochastic_rounding=False"
            )
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
        work.param, work.entries, amsgrad=groups[work.group]["amsgrad"], allows_codes=work.allows_codes
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
