"""Parameters that one launch steps together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from . import launch
from .functional import step_tensor
from .param_work import ALIGNMENT, ParamWork
from .storage import Formats, StateTensors, entry_names
from .strides import is_dense, strides_agree


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
