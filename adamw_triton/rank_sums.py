"""Sums over ranks of what each has of its own parts of the parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sharding import Sharding


class RankSums:
    """Adds up such sums.

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
