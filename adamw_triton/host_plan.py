"""The step of parameters on the CPU: torch's fused step where that does the same, else the reference in eager torch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .functional import flat_views, host_piece, is_skipped, step_joined_eager, step_tensor_eager
from .grad_control import GradDecision, GradScalerInputs
from .hyperparams import Hyperparams
from .members import Members
from .param_work import ParamWork
from .storage import Formats, StateTensors, entry_names
from .strides import flat, is_dense, real_view, strides_agree


class HostKey(NamedTuple):
    """What the parameters that are stepped together have in common."""

    turn: int
    group: int
    is_fused: bool
    is_flat: bool
    joins: bool
    formats: Formats
    entry_names: tuple[str | None, ...]

    @classmethod
    def of(cls, work: ParamWork, group: Mapping[str, Any], *, statistics: bool) -> HostKey:
        param, layout = work.param, work.grad_layout
        names = entry_names(work.entries, group["amsgrad"])
        state = StateTensors.named(work.entries, names)
        formats = Formats.of(param, layout.dtype, state, stochastic=group["stochastic_rounding"])
        is_flat = (
            work.turn == 0
            and is_dense(param)
            and strides_agree(param.shape, param.stride(), layout.stride)
            and not param.is_complex()
            and not layout.is_neg
        )
        is_torchs = state.is_plain and {layout.dtype, *state.dtypes} == {param.dtype} and not formats.stochastic
        is_fused = (
            is_torchs and not (group["cautious"] or statistics) and not group["amsgrad"]  # torch's maximum drops a NaN
        )
        joins = is_flat and group["foreach"] is not False and not is_torchs  # whose bits are to be torch's
        return cls(work.turn, work.group, is_fused, is_flat, joins, formats, names)


class HostGroup:
    """Parameters of one param group that are stepped together.

    Args:
        key: of all.
        works: parameters with complete state.
        group: their param group.
        span: their place among the parameters of the plan.
        sums: float64 [n, 2] of them, written, with statistics.
    """

    def __init__(
        self, key: HostKey, works: Sequence[ParamWork], group: Mapping[str, Any], span: slice, sums: Tensor | None
    ) -> None:
        self.key, self.span = key, span
        self._how = {"maximize": group["maximize"], "cautious": group["cautious"]}
        self._noise_keys = [work.noise_key(group["seed"], key.formats) for work in works]
        self._sums = sums
        self._is_small = [key.joins and sums is None and 0 < work.param.numel() <= host_piece() for work in works]

    @property
    def state_names(self) -> list[str]:
        """Names of the state entries of each parameter."""
        return ["step", *(name for name in self.key.entry_names if name is not None)]

    def step(self, members: Members, hyperparams: Hyperparams, decision: Tensor | None) -> None:
        """Step those that have gradients and count them; the step is not skipped."""
        params, grads, all_entries = members.params, members.grads, members.entries
        left = {i: grad for i, grad in enumerate(grads) if grad is not None}  # what is still to be stepped
        if self._sums is not None:
            self._sums.zero_()
        states = {i: StateTensors.named(all_entries[i], self.key.entry_names) for i in left}
        counts = {i: all_entries[i]["step"] for i in left}
        if counts:
            torch._foreach_add_(list(counts.values()), 1.0)
        factor = None if decision is None or decision[0] == 1.0 else decision[0].item()
        try:
            # A gradient of 16 bits times a factor is not rounded to them again.
            if self.key.is_fused and (factor is None or self.key.formats.param.itemsize > 2):
                self._step_fused(
                    [(params[i], grad, states[i], counts[i]) for i, grad in left.items()], hyperparams, factor
                )
                left = {}
            by_count: dict[float, list[int]] = defaultdict(list)
            for i in left:
                by_count[counts[i].item()].append(i)
            for count, its_members in by_count.items():
                small = [i for i in its_members if self._is_small[i]]
                for joined in _at_most(small, [params[i].numel() for i in small], host_piece()):
                    some = [(params[i], grads[i], states[i]) for i in joined]
                    keys = [self._noise_keys[i] for i in joined]
                    step_joined_eager(some, keys, hyperparams, count, decision=decision, **self._how)
                    for i in joined:
                        del left[i]
                for i in its_members:
                    if not self._is_small[i]:
                        self._step_one(i, params[i], grads[i], states[i], hyperparams, count, decision)
                        del left[i]
        except BaseException:
            for i in left:
                counts[i].sub_(1.0)
            raise

    def _step_fused(self, tensors: Sequence[tuple[Any, ...]], hyperparams: Hyperparams, factor: float | None) -> None:
        lr, beta1, beta2, eps, weight_decay, decay_lr = hyperparams.numbers()
        options: dict[str, Any] = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
        options |= {"weight_decay": weight_decay / decay_lr, "amsgrad": False, "maximize": self._how["maximize"]}
        if not self.key.is_flat:
            for param, grad, state, count in tensors:
                with flat_views(param, grad, state) as (work, work_grad, work_state):
                    self._call_fused([(flat(work), flat(work_grad), work_state.map(flat), count)], options, factor)
            return
        self._call_fused(tensors, options, factor)

    @staticmethod
    def _call_fused(tensors: Sequence[tuple[Any, ...]], options: Mapping[str, Any], factor: float | None) -> None:
        # Torch's would write what it makes of gradients with a factor to these.
        if factor is not None:
            for param, grad, exp_avg, exp_avg_sq, count in _pieces(tensors):
                torch._fused_adamw_([param], [grad * factor], [exp_avg], [exp_avg_sq], [], [count], **options)
            return
        rows = [(param, grad, state[0], state[1], count) for param, grad, state, count in tensors if param.numel()]
        if rows:
            params, grads, exp_avgs, exp_avg_sqs, counts = map(list, zip(*rows, strict=True))
            torch._fused_adamw_(params, grads, exp_avgs, exp_avg_sqs, [], counts, **options)

    def _step_one(
        self,
        i: int,
        param: Tensor,
        grad: Any,
        state: StateTensors,
        hyperparams: Hyperparams,
        count: float,
        decision: Tensor | None,
    ) -> None:
        step_tensor_eager(
            param,
            grad,
            state,
            hyperparams,
            count,
            decision=decision,
            statistics=None if self._sums is None else self._sums[i],
            noise_key=self._noise_keys[i],
            **self._how,
        )


class HostPlan:
    """All steps of the parameters on the CPU; numbers only, and no parameter, gradient or state.

    Args:
        works: parameters with complete state, and step counts of their own.
        groups: the optimizer's param groups.
        statistics: whether to sum the squares of what is written, and of its change.
        n_classes: of `RankSums`.

    Attributes:
        device: the CPU.
        order: indices among `works`, in the order in which they are stepped.
    """

    def __init__(
        self, works: Sequence[ParamWork], groups: Sequence[Mapping[str, Any]], *, statistics: bool, n_classes: int
    ) -> None:
        self.device = works[0].param.device
        by_key: dict[HostKey, list[int]] = defaultdict(list)
        for i, work in enumerate(works):
            by_key[HostKey.of(work, groups[work.group], statistics=statistics)].append(i)
        in_turn = sorted(by_key.items(), key=lambda item: item[0].turn)
        self.order = [i for _, its_works in in_turn for i in its_works]
        self._classes = [works[i].norm_class for i in self.order]
        self._n_classes = n_classes
        nothing = torch.full((len(works), 2), math.nan, dtype=torch.float64, device=self.device)
        self._sums = nothing if statistics else None
        self.groups: list[HostGroup] = []
        start = 0
        for key, its_works in in_turn:
            span = slice(start, start + len(its_works))
            sums = None if self._sums is None else self._sums[span]
            self.groups.append(HostGroup(key, [works[i] for i in its_works], groups[key.group], span, sums))
            start = span.stop
        self._hyperparams: Sequence[Hyperparams] = ()

    @property
    def aligned(self) -> list[bool]:
        """Whether each gradient must begin at a multiple of ALIGNMENT."""
        return [False] * len(self.order)

    def write_inputs(self, members: Members, hyperparams: Sequence[Hyperparams], *, capturing: bool) -> list[Tensor]:
        """Take the hyper-parameters of all groups for the step to come."""
        self._hyperparams = hyperparams
        return []

    def sums_of_squares(self, members: Members) -> Tensor:
        """Return those of the gradients: float64 [n_classes]."""
        sums = torch.zeros(self._n_classes, dtype=torch.float64, device=self.device)
        for number, grad in zip(self._classes, members.grads, strict=True):
            if grad is not None:
                for piece in _flat_pieces(real_view(grad.resolve_conj().resolve_neg())):
                    sums[number] += piece.double().square().sum()  # pairwise, as a dot product is not
        return sums

    def statistics(self) -> Tensor | None:
        """Return the sums of squares of the last step's changes, and of what they made: float64 [n_classes, 2]."""
        if self._sums is None:
            return None
        by_class = [[i for i, number in enumerate(self._classes) if number == c] for c in range(self._n_classes)]
        return torch.stack([self._sums[members].sum(dim=0) for members in by_class])

    def step(self, members: Members, decision: GradDecision | None, scaler: GradScalerInputs, **how: Any) -> None:
        """Step all parameters that have gradients, and count, unless the step is skipped.

        Args:
            members: of the plan.
            decision: what the step is subject to, decided.
        """
        values = None if decision is None else decision.values
        if values is not None and is_skipped(values):
            return
        for group in self.groups:
            group.step(members.part(group.span), self._hyperparams[group.key.group], values)
        # Autograd does not see what torch's fused step writes, nor what is written to a local tensor.
        torch.autograd.graph.increment_version(members.written(len(members.params)))


def _flat_pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements of a tensor, in any order, as 1-D views that stay in the caches."""
    values = flat(tensor) if is_dense(tensor) else tensor.reshape(-1)
    yield from values.split(host_piece())


def _pieces(tensors: Sequence[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Yield parameters in such pieces: parameter, gradient, moments, count."""
    for param, grad, state, count in tensors:
        for piece in zip(*map(_flat_pieces, (param, grad, state[0], state[1])), strict=True):
            yield (*piece, count)


def _at_most(indices: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Yield runs of indices whose sizes add up to at most a limit."""
    run: list[int] = []
    total = 0
    for index, size in zip(indices, sizes, strict=True):
        if run and total + size > limit:
            yield run
            run, total = [], 0
        run.append(index)
        total += size
    if run:
        yield run
