"""Sums of squares over all parameters, on all devices and ranks, and the decision that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import eager
from .device_plan import DevicePlan
from .grad_control import GradDecision, GradNormOptions, GradScalerInputs, decide, move
from .launch_group import ParamWork
from .sharding import Sharding


class RankSums:
    """Adds up, over ranks, sums that each has of its own parts of the parameters.

    Parameters of which the same ranks have different parts make up a class. There is one vector, of a sum for each
    class, and one all-reduce for each process group of a sharded mesh dimension, of the classes that are sharded over
    it. What a rank has whole, or as others have it too, counts once. All this follows from meshes and placements, which
    all ranks see alike, so that all take part whatever gradients they have.

    Args:
        shardings: of all parameters, None of a plain one.
        norm_group: a process group whose ranks have other parameters of the model.

    Attributes:
        class_of: number of each parameter's class.
        n_classes: how many there are.
    """

    def __init__(self, shardings: Sequence[Sharding | None], norm_group: Any) -> None:
        groups: dict[str, Any] = {}
        classes: dict[tuple[str, ...], int] = {(): 0} if not any(shardings) else {}
        self.class_of: list[int] = []
        for sharding in shardings:
            its_groups = [] if sharding is None else sharding.groups
            groups.update({group.group_name: group for group in its_groups})
            key = tuple(group.group_name for group in its_groups)
            self.class_of.append(classes.setdefault(key, len(classes)))
        self.n_classes = max(len(classes), 1)
        # The last number of the vector is of all groups.
        self._steps = [
            (group, [*(number for key, number in classes.items() if name in key), self.n_classes])
            for name, group in groups.items()
        ]
        self._norm_group = norm_group
        self._rows: dict[torch.device, list[Tensor]] = {}

    @property
    def is_local(self) -> bool:
        """Whether there is nothing to add up over ranks."""
        return not self._steps and self._norm_group is None

    def add_up(self, sums: Tensor) -> Tensor:
        """Return the sums over all ranks and classes, and how many ranks refused the step.

        Args:
            sums: float64 [n_classes + 1, ...] of this rank; last whether it refuses the step.

        Returns:
            float64 [2, ...].
        """
        for (group, rows), index in zip(self._steps, self._rows_on(sums.device), strict=True):
            if len(rows) == len(sums):
                torch.distributed.all_reduce(sums, group=group)
            else:
                part = sums[index]
                torch.distributed.all_reduce(part, group=group)
                sums[index] = part
        total = torch.stack((sums[:-1].sum(dim=0), sums[-1]))
        if self._norm_group is not None:
            torch.distributed.all_reduce(total, group=self._norm_group)
        return total

    def _rows_on(self, device: torch.device) -> list[Tensor]:
        if device not in self._rows:
            self._rows[device] = [
                torch.tensor(rows, dtype=torch.int64, device="cpu").to(device) for _, rows in self._steps
            ]
        return self._rows[device]


class GlobalNorms:
    """What a step decides and tells by norms of all gradients, updates and parameters.

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

    def decide(self, plans: Sequence[DevicePlan], works: Sequence[ParamWork], *, refused: bool = False) -> bool:
        """Decide over the gradients of the whole model; return False where that is left to the kernel that counts.

        Args:
            plans: of the parameters on devices with kernels, which know where the gradients are.
            works: other parameters with gradients.
            refused: whether this rank takes part only so that others do not wait; none then takes the step.
        """
        need_norm = self._options.need_norm
        is_local = self._ranks.is_local or not need_norm
        if is_local and len(plans) == 1 and not works and plans[0].device == self._home:
            if need_norm:
                plans[0].decide(self._decision_on(self._home), self._scaler, self._options)
            return need_norm
        devices = [*(plan.device for plan in plans), *(work.param.device for work in works)]
        is_meta = self._home.type == "meta"
        at = next((d for d in devices if d.type != "meta"), self._home) if is_meta else self._home
        total, refusals = None, None
        if need_norm:
            sums = self._sums(plans, [w for w in works if w.param.device.type != "meta" or at.type == "meta"], at)
            sums[-1] += refused
            total, refusals = (sums[:-1].sum(), None) if is_local else self._ranks.add_up(sums).unbind()
        values = decide(total, self._scaler.to(at), self._options)
        if refusals is not None:
            values[1] = torch.maximum(values[1], (refusals > 0).double())
        self._decision_on(self._home).set(values)
        for device in set(devices) - {self._home}:
            self._decision_on(device).values.copy_(move(values, device))
        return True

    def _sums(self, plans: Sequence[DevicePlan], works: Sequence[ParamWork], at: torch.device) -> Tensor:
        sums = torch.zeros(self._ranks.n_classes + 1, dtype=torch.float64, device=at)
        for plan in plans:
            sums[:-1] += move(plan.sums_of_squares(), at)
        by_class: list[list[Tensor]] = [[] for _ in range(self._ranks.n_classes)]
        for work in works:
            by_class[work.norm_class].append(move(eager.sum_of_squares(work), at))
        for number, of_works in enumerate(by_class):
            if of_works:
                sums[number] += torch.stack(of_works).sum()
        return sums
