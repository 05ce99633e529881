"""Parameters that one launch steps together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .functional import step_tensor
from .sharding import LocalEntries, Sharding
from .storage import Formats, NoiseKey, StateTensors, entry_names
from .strides import is_dense, strides_agree
from .validation import check_entries, check_grad, check_param

ALIGNMENT = 16  # bytes of the widest access


class GradLayout(NamedTuple):
    """What a gradient's place in a launch depends on, but for its address."""

    type: type
    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    is_neg: bool

    @classmethod
    def of(cls, grad: Tensor) -> GradLayout:
        return cls(type(grad), grad.dtype, grad.device, grad.shape, grad.stride(), grad.is_neg())


@dataclass(eq=False)
class ParamWork:
    """One parameter that is to be stepped.

    Attributes:
        listed: the parameter as its group has it.
        param: what of it lies on this rank: the parameter itself, or a DTensor's local tensor; so of `grad`, `entries`.
        grad: None where it has none now, and had one before.
        group: index of its param group.
        index: in the list of all parameters, which tells its random bits apart.
        sharding: of a DTensor.
        norm_class: number of its class in `RankSums`.
        turn: 0, or a number that says when it is stepped: parameters that share memory cannot share a launch.
    """

    listed: Tensor
    param: Tensor
    grad: Tensor | None
    entries: MutableMapping[str, Any]
    group: int
    index: int
    sharding: Sharding | None = None
    norm_class: int = 0
    turn: int = 0

    @property
    def stored_entries(self) -> MutableMapping[str, Any]:
        """The entries as the optimizer's state has them."""
        return self.entries.entries if isinstance(self.entries, LocalEntries) else self.entries

    @property
    def allows_codes(self) -> bool:
        return self.sharding is None or self.sharding.allows_codes

    def check(self) -> None:
        """Refuse what cannot be stepped; see `validation` for what is raised."""
        if self.sharding is not None:
            self.sharding.check(self.stored_entries)
        check_param(self.param)
        if self.grad is not None:
            check_grad(self.param, self.grad)
        check_entries(self.param, self.entries)

    def see_gradient(self, known: Mapping[int, tuple[GradLayout, bool]]) -> None:
        """Note layout and alignment of the gradient that the tables are made for.

        Args:
            known: those of former gradients, by id of the parameter: of one that is missing, and of one that moves
                between aligned and unaligned addresses.
        """
        param = self.param
        layout, self.is_aligned = known.get(id(self.listed), (None, True))
        if self.grad is not None:
            layout = GradLayout.of(self.grad)
            self.is_aligned = self.is_aligned and self.grad.data_ptr() % ALIGNMENT == 0
        elif layout is None or layout.shape != param.shape:
            layout = GradLayout(Tensor, param.dtype, param.device, param.shape, param.stride(), False)
        self.grad_layout = layout

    def noise_key(self, seed: int, formats: Formats) -> NoiseKey | None:
        if not formats.stochastic:
            return None
        return (
            NoiseKey(seed, self.index) if self.sharding is None else NoiseKey(seed, self.index, *self.sharding.position)
        )


class LaunchKey(NamedTuple):
    """What the parameters of one launch have in common."""

    turn: int
    as_table: bool
    formats: Formats
    aligned: bool
    amsgrad: bool
    maximize: bool
    cautious: bool
    seed: int  # of stochastic rounding

    @classmethod
    def of(cls, work: ParamWork, group: Mapping[str, Any]) -> LaunchKey:
        param, layout = work.param, work.grad_layout
        state = StateTensors.from_entries(work.entries, group["amsgrad"])
        like_param = [param, *(tensor for tensor in state[:4] if tensor is not None)]
        fits_table = (
            work.turn == 0
            and is_dense(param)
            and strides_agree(param.shape, param.stride(), layout.stride)
            and not param.is_complex()
            and not layout.is_neg
            and (state.max_exp_avg_sq is None or state.max_exp_avg_sq.dtype == state.exp_avg_sq.dtype)
        )
        formats = Formats.of(param, layout.dtype, state, stochastic=group["stochastic_rounding"])
        return cls(
            turn=work.turn,
            as_table=fits_table and group["foreach"] is not False,
            formats=formats,
            aligned=work.is_aligned and all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in like_param),
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            cautious=group["cautious"],
            seed=group["seed"] if formats.stochastic else 0,
        )


def group_works(
    works: Sequence[ParamWork], groups: Sequence[Mapping[str, Any]]
) -> list[tuple[LaunchKey, list[ParamWork]]]:
    """Return the parameters of each launch, by class of `RankSums`, in the order in which they are launched."""
    by_key: dict[LaunchKey, list[ParamWork]] = defaultdict(list)
    for work in works:
        by_key[LaunchKey.of(work, groups[work.group])].append(work)
    launches: list[tuple[LaunchKey, list[ParamWork]]] = []
    for key, members in by_key.items():
        members.sort(key=attrgetter("norm_class"))
        # A table is for several tensors, unless it was asked for.
        if key.as_table and (len(members) > 1 or groups[members[0].group]["foreach"]):
            launches.append((key, members))
        else:
            launches += [(key._replace(as_table=False), [member]) for member in members]
    return sorted(launches, key=lambda launch: launch[0].turn)


class LaunchGroup:
    """One launch: of a table of parameters, or of one parameter of any layout.

    Args:
        key: of all.
        works: parameters with complete state.
        groups: all param groups.
        span: their place among the parameters of the device.
        scalars: of the device's parameters, [n_params, 8].
        grads: int64 [n_params], addresses of their gradients on the device.
        statistics: of the launch's programs, if they are wanted.
    """

    def __init__(
        self,
        key: LaunchKey,
        works: Sequence[ParamWork],
        groups: Sequence[Mapping[str, Any]],
        span: slice,
        scalars: Tensor,
        grads: Tensor,
        statistics: Tensor | None,
    ) -> None:
        self.key, self.span = key, span
        self.entry_names = entry_names(works[0].entries, key.amsgrad)
        self._noise_key = works[0].noise_key(key.seed, key.formats)
        self._scalars = scalars[span] if key.as_table else scalars[span.start]
        self._grads = grads[span]
        self._statistics = statistics
        self._options: dict[str, Any] = {"maximize": key.maximize, "cautious": key.cautious}
        self._table: launch.Table | None = None
        if key.as_table:
            noise_keys = [work.noise_key(key.seed, key.formats) for work in works]
            self._table = launch.Table.of(
                [work.param for work in works],
                key.formats.grad,
                [StateTensors.named(work.entries, self.entry_names) for work in works],
                aligned=key.aligned,
                noise_keys=[key for key in noise_keys if key is not None] or None,
            )

    @property
    def state_names(self) -> list[str]:
        """Names of the state entries of each parameter."""
        return ["step", *(name for name in self.entry_names if name is not None)]

    @property
    def tensors(self) -> list[Tensor]:
        return [] if self._table is None else [self._table.tensors, self._table.chunks]

    def step(self, param: Tensor, grad: Tensor | None, entries: Mapping[str, Any], decision: Tensor | None) -> None:
        """Launch.

        Args:
            param, grad, entries: of the first parameter, which is all if there is no table.
            decision: `GradDecision.values`, if the step is subject to one.
        """
        if self._table is not None:
            launch.launch_table(
                self._table, self._grads, self._scalars, decision=decision, statistics=self._statistics, **self._options
            )
        elif grad is not None:
            state = StateTensors.named(entries, self.entry_names)
            step_tensor(
                param,
                grad,
                state,
                self._scalars,
                decision=decision,
                statistics=self._statistics,
                noise_key=self._noise_key,
                **self._options,
            )
        elif self._statistics is not None:
            if decision is None:
                self._statistics.zero_()
            else:  # unless the step is skipped
                self._statistics.masked_fill_(decision[1] == 0, 0.0)


def n_programs(key: LaunchKey, works: Sequence[ParamWork]) -> list[int]:
    """Return the number of programs of each parameter of a launch."""
    configuration = launch.configuration_of(*(dtype.to_real() for dtype in key.formats.dtypes))
    numels = [work.param.numel() * (2 if work.param.is_complex() else 1) for work in works]
    return [launch.n_programs(numel, configuration) for numel in numels]
