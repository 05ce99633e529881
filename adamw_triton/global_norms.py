"""The norm of all gradients, on all devices and ranks, and the decision that follows from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import eager
from .device_plan import DevicePlan, Members
from .grad_control import GradDecision, GradNormOptions, GradScalerInputs, decide, move
from .host_plan import HostPlan
from .param_work import ParamWork
from .rank_sums import RankSums


class Verdict(NamedTuple):
    """What has been decided over a step.

    Attributes:
        decided: whether it has been; if not, the kernel that counts is to decide.
        sums: of `RankSums`, by which it is to do so; None if by no norm.
    """

    decided: bool
    sums: Tensor | None = None


class GlobalNorms:
    """What a step decides by the norm of all gradients.

    Args:
        ranks: adds up over ranks.
        home: device of the optimizer's first parameter.
        decision_on: the optimizer's decision on a device.
        options: of the norm of all gradients.
        scaler: what GradScaler leaves to the step.
    """

    def __init__(
        self,
        ranks: RankSums,
        home: torch.device,
        decision_on: Callable[[torch.device], GradDecision],
        options: GradNormOptions,
        scaler: GradScalerInputs,
    ) -> None:
        self._ranks, self._home, self._decision_on = ranks, home, decision_on
        self._options, self._scaler = options, scaler

    def decide(
        self,
        parts: Sequence[tuple[DevicePlan | HostPlan, Members]],
        works: Sequence[ParamWork],
        *,
        refused: bool = False,
    ) -> Verdict:
        """Decide over the gradients of the whole model, or leave that to the kernel that counts.

        Args:
            parts: plans, and what they step.
            works: other parameters with gradients.
            refused: whether this rank takes part only so that others do not wait; none then takes the step.
        """
        need_norm = self._options.need_norm
        is_local = self._ranks.is_local or not need_norm
        plan = parts[0][0] if len(parts) == 1 and not works else None
        if isinstance(plan, DevicePlan) and plan.device == self._home:
            if not is_local:
                return Verdict(False, self._ranks.add_up(self._sums(parts, [], self._home)))
            if need_norm:
                plan.decide(self._decision_on(self._home), self._scaler, self._options)
            return Verdict(need_norm)
        devices = [*(plan.device for plan, _ in parts), *(work.param.device for work in works)]
        is_meta = self._home.type == "meta"
        at = next((d for d in devices if d.type != "meta"), self._home) if is_meta else self._home
        total, refusals = None, None
        if need_norm:
            sums = self._sums(parts, [w for w in works if w.param.device.type != "meta" or at.type == "meta"], at)
            sums[-1] += refused
            total, refusals = (sums[:-1].sum(), None) if is_local else self._ranks.add_up(sums).unbind()
        values = decide(total, self._scaler.to(at), self._options)
        if refusals is not None:
            values[1] = torch.maximum(values[1], (refusals > 0).double())
        self._decision_on(self._home).set(values)
        for device in set(devices) - {self._home}:
            self._decision_on(device).values.copy_(move(values, device))
        return Verdict(True)

    def _sums(
        self, parts: Sequence[tuple[DevicePlan | HostPlan, Members]], works: Sequence[ParamWork], at: torch.device
    ) -> Tensor:
        sums = torch.zeros(self._ranks.n_classes + 1, dtype=torch.float64, device=at)
        for plan, members in parts:
            sums[:-1] += move(plan.sums_of_squares(members), at)
        by_class: list[list[Tensor]] = [[] for _ in range(self._ranks.n_classes)]
        for work in works:
            by_class[work.norm_class].append(move(eager.sum_of_squares(work), at))
        for number, of_works in enumerate(by_class):
            if of_works:
                sums[number] += torch.stack(of_works).sum()
        return sums
