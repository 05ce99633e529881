"""The launches of a step on one device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from . import launch
from .device_table import DeviceTable
from .grad_control import NO_NORM, GradDecision, GradNormOptions, GradScalerInputs
from .hyperparams import Hyperparams
from .launch_group import LaunchGroup, group_works, n_programs
from .members import Members, take_back
from .param_work import ParamWork
from .step_counts import HYPER_WORDS, StepCounts, packed_hyperparams


class DevicePlan:
    """Launch groups of the parameters on one device, what they share, and the norm of their gradients.

    It holds numbers and tables on the device, and no parameter, gradient or state.

    Args:
        works: parameters with complete state, and step counts where the kernels can count them.
        groups: the optimizer's param groups.
        need_norm: whether steps need the norm of all gradients.
        statistics: whether to sum the squares of what is written, and of its change.
        n_classes: of `RankSums`.

    Attributes:
        device: of all parameters.
        order: indices among `works`, in the order in which they are stepped.
    """

    def __init__(
        self,
        works: Sequence[ParamWork],
        groups: Sequence[Mapping[str, Any]],
        *,
        need_norm: bool,
        statistics: bool,
        n_classes: int = 1,
    ) -> None:
        self.device = device = works[0].param.device
        launches = group_works(works, groups)
        in_order = [work for _, members in launches for work in members]
        places = {id(work): place for place, work in enumerate(works)}
        self.order = [places[id(work)] for work in in_order]
        self._counts = StepCounts(
            [work.entries["step"] for work in in_order],
            [work.group for work in in_order],
            need_double=any(work.param.dtype.to_real() == torch.float64 for work in in_order),
        )
        n_hyper_words = HYPER_WORDS * len(groups)
        capturable = any(group["capturable"] for group in groups)
        self._inputs = DeviceTable(n_hyper_words + len(in_order), device, capturable=capturable)
        self._hyperparams, self._grads = self._inputs.tensor[:n_hyper_words], self._inputs.tensor[n_hyper_words:]

        programs = [n_programs(key, members) for key, members in launches]
        totals = [sum(of_launch) for of_launch in programs]
        self._statistics = launch.statistics_like(sum(totals), device) if statistics else None
        shares = [None] * len(launches) if self._statistics is None else self._statistics.split(totals)
        self._programs = [
            slices_of([work.norm_class for work in members], of_launch, n_classes, first)
            for (_, members), of_launch, first in zip(launches, programs, accumulate(totals, initial=0), strict=False)
        ]
        self.groups: list[LaunchGroup] = []
        start = 0
        for (key, members), share in zip(launches, shares, strict=True):
            span = slice(start, start + len(members))
            is_double = key.formats.param.to_real() == torch.float64
            scalars = self._counts.scalars64 if is_double else self._counts.scalars
            assert scalars is not None
            self.groups.append(LaunchGroup(key, members, groups, span, scalars, self._grads, share))
            start = span.stop
        self._norms = (
            GradNorms(in_order, [key.aligned for key, members in launches for _ in members], n_classes)
            if need_norm
            else None
        )
        self._streams = {self._stream()}
        self._known_hyperparams: Sequence[Hyperparams] = ()
        self._packed_hyperparams = b""

    @property
    def aligned(self) -> list[bool]:
        """Whether each gradient must begin at a multiple of ALIGNMENT."""
        return [group.key.aligned for group in self.groups for _ in range(group.span.start, group.span.stop)]

    @property
    def tensors(self) -> list[Tensor]:
        """All that the plan holds on the device."""
        tensors = [
            self._inputs.tensor,
            *self._counts.tensors,
            *([] if self._statistics is None else [self._statistics]),
        ]
        tensors += [tensor for group in self.groups for tensor in group.tensors]
        return tensors + ([] if self._norms is None else self._norms.tensors)

    def write_inputs(self, members: Members, hyperparams: Sequence[Hyperparams], *, capturing: bool) -> list[Tensor]:
        """Tell the kernels where the gradients are, and the hyper-parameters of all groups.

        Returns:
            Tensors that must live until the step has been launched.
        """
        self._use_stream(capturing)
        copies: list[Tensor] = []
        if hyperparams is not self._known_hyperparams or capturing:
            rows = [packed_hyperparams(each, self.device, copies, capturing=capturing) for each in hyperparams]
            self._packed_hyperparams = b"".join(rows)
            self._known_hyperparams = hyperparams
        self._inputs.write(self._packed_hyperparams + members.grad_addresses, capturing=capturing)
        return copies

    def decide(self, decision: GradDecision, scaler: GradScalerInputs, options: GradNormOptions) -> None:
        """Decide over the gradients of this device as if they were all."""
        assert self._norms is not None
        self._norms.launch(self._grads, decision, scaler.to(self.device), options)

    def sums_of_squares(self, members: Members) -> Tensor:
        """Return those of the gradients that `write_inputs` has told: float64 [n_classes], on the device."""
        assert self._norms is not None
        self._norms.launch(self._grads, None, GradScalerInputs(), NO_NORM)
        return self._norms.sums

    def statistics(self) -> Tensor | None:
        """Return the sums of squares of the last step's changes, and of what they made: float64 [n_classes, 2]."""
        if self._statistics is None:
            return None
        table = self._statistics[..., :2]
        return torch.stack([_sum(table, of_class) for of_class in zip(*self._programs, strict=True)])

    def step(
        self,
        members: Members,
        decision: GradDecision | None,
        scaler: GradScalerInputs,
        *,
        decided: bool,
        sums: Tensor | None = None,
        options: GradNormOptions = NO_NORM,
    ) -> None:
        """Count, and launch everything.

        Args:
            members: of this device, whose gradients `write_inputs` has told.
            decision: what the step is subject to, on this device: `decided` already, or to be made from the others.
            sums: of `RankSums`, if there is to be decided by a norm over ranks; options: of it.
        """
        params, grads, all_entries = members.params, members.grads, members.entries
        how: dict[str, Any] = {"decided": decided, "sums": sums, "options": options}
        self._counts.advance(self._grads, self._hyperparams, decision, scaler.to(self.device), **how)
        values = None if decision is None else decision.values
        launched = 0
        try:
            for group in self.groups:
                first = group.span.start
                group.step(params[first], grads[first], all_entries[first], values)
                launched = group.span.stop
        finally:
            if launched < len(params):
                take_back(grads[launched:], all_entries[launched:], values)
            # Autograd does not see what a kernel writes.
            torch.autograd.graph.increment_version(members.written(launched))

    def _stream(self) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None

    def _use_stream(self, capturing: bool) -> None:
        """Keep the allocator from handing out the tables' memory while another stream than the first reads them."""
        stream = self._stream()
        if stream in self._streams or capturing or stream is None:
            return
        self._streams.add(stream)
        for tensor in self.tensors:
            tensor.record_stream(stream)


class GradNorms:
    """Tables for the norm of all gradients of one device.

    Args:
        works: parameters in the order of their gradients' addresses.
        aligned: whether each gradient begins at a multiple of 16 bytes.
        n_classes: of `RankSums`.

    Attributes:
        partials: float64 [n + 1], sums of squares of spans; last that of all.
    """

    def __init__(self, works: Sequence[ParamWork], aligned: Sequence[bool], n_classes: int = 1) -> None:
        device = works[0].param.device
        classes = torch.tensor([work.norm_class for work in works], dtype=torch.int64, device="cpu")
        numels = [work.param.numel() * (2 if work.param.is_complex() else 1) for work in works]
        on_device = torch.tensor(numels, dtype=torch.int64, device="cpu").to(device)
        by_format: dict[tuple[torch.dtype, bool], list[int]] = defaultdict(list)
        for i, (work, is_aligned) in enumerate(zip(works, aligned, strict=True)):
            by_format[work.grad_layout.dtype.to_real(), is_aligned].append(i)
        self._tables: list[launch.NormTable] = []
        self._slices: list[list[slice]] = []  # of partials: for each table, of each class
        n_partials = 0
        for (dtype, is_aligned), members in by_format.items():
            members.sort(key=lambda i: works[i].norm_class)
            table = launch.NormTable.of(on_device, members, first=n_partials, dtype=dtype, aligned=is_aligned)
            self._tables.append(table)
            of_spans = classes[table.spans[:, 0].cpu().long()].tolist()
            self._slices.append(slices_of(of_spans, [1] * len(of_spans), n_classes, n_partials))
            n_partials += table.spans.shape[0]
        self.partials = torch.zeros(n_partials + 1, dtype=torch.float64, device=device)
        self._finished = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        tables = [tensor for table in self._tables for tensor in (table.numels, table.spans)]
        return [*tables, self.partials, self._finished]

    @property
    def sums(self) -> Tensor:
        """Those of each class, float64 [n_classes], of what was launched without a decision."""
        if len(self._slices[0]) == 1:
            return self.partials[-1:]
        return torch.stack([_sum(self.partials, of_class) for of_class in zip(*self._slices, strict=True)])

    def launch(
        self, grads: Tensor, decision: GradDecision | None, scaler: GradScalerInputs, options: GradNormOptions
    ) -> None:
        launch.launch_norms(self._tables, grads, self.partials, self._finished, decision, scaler, options)


def slices_of(classes: Sequence[int], sizes: Sequence[int], n_classes: int, first: int) -> list[slice]:
    """Return where each class is among parts that are sorted by class.

    Args:
        classes, sizes: of each part; sizes are its numbers of programs or partial sums.
        first: where the first part begins.
    """
    totals = [0] * n_classes
    for number, size in zip(classes, sizes, strict=True):
        totals[number] += size
    bounds = list(accumulate(totals, initial=first))
    return [slice(*of_class) for of_class in pairwise(bounds)]


def _sum(table: Tensor, slices: Sequence[slice]) -> Tensor:
    """Return the float64 sums of rows of a table [rows, ..., n] or [rows]."""
    dims = tuple(range(max(table.dim() - 1, 1)))
    return torch.stack([table[of_class].sum(dim=dims, dtype=torch.float64) for of_class in slices]).sum(dim=0)
