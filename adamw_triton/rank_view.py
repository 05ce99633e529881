"""The tensors of a step as this rank has them."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dtensors
from .param_work import ParamWork
from .rank_sums import RankSums
from .sharding import LocalEntries, Sharding

_grad_of = attrgetter("grad")


class StepTensors(NamedTuple):
    """All parameters of a step, in the order of their groups, and their gradients.

    Attributes:
        listed: parameters as their groups have them.
        params: what of them lies on this rank; the same list if all are plain tensors.
        grads: what of their gradients lies on this rank; None where there is none.
    """

    listed: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor | None]


class RankView:
    """How the parameters of a plan are dealt out to ranks; noted anew when that changes.

    Attributes:
        sums: adds up over ranks.
    """

    def __init__(self) -> None:
        self.sums = RankSums([], None)
        self._specs: list[Any] = []  # of DTensors, if there are any
        self._shardings: list[Sharding | None] = []
        self._norm_group: Any = None

    def update(self, listed: Sequence[Tensor], norm_group: Any) -> bool:
        """Look at all parameters; return whether they are dealt out as they were."""
        specs = dtensors.specs_of(listed)
        unchanged = len(specs) == len(self._specs) and all(map(is_, specs, self._specs))
        if not unchanged:
            self._specs = specs
            self._shardings = [None if spec is None else Sharding(p) for p, spec in zip(listed, specs, strict=False)]
        if not unchanged or norm_group is not self._norm_group:
            self._norm_group = norm_group
            self.sums = RankSums(self._shardings, norm_group)
        return unchanged

    def read(self, listed: list[Tensor]) -> StepTensors:
        """Read what of parameters and gradients lies on this rank.

        Raises:
            RuntimeError: of `dtensors.local_grads`.
        """
        if not self._specs:
            return StepTensors(listed, listed, list(map(_grad_of, listed)))
        # To look for a __torch_function__ takes longer than all else that is read of a DTensor.
        with torch._C.DisableTorchFunctionSubclass():
            grads: list[Tensor | None] = list(map(_grad_of, listed))
        params = dtensors.locals_of(listed, self._specs)
        return StepTensors(listed, params, dtensors.local_grads(listed, grads, self._specs))

    def works(
        self,
        indices: Sequence[int],
        tensors: StepTensors,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
        first_index: int,
    ) -> list[ParamWork]:
        """Return the work of some of all parameters.

        Args:
            indices: of them.
            first_index: number of the first of all.
        """
        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        works = []
        for i in indices:
            entries: MutableMapping[str, Any] = state.get(tensors.listed[i], {})
            work = ParamWork(
                tensors.listed[i], tensors.params[i], tensors.grads[i], entries, group_of[i], first_index + i
            )
            sharding = self._shardings[i] if self._specs else None
            if sharding is not None:
                work.entries, work.sharding = LocalEntries(entries, sharding), sharding
            if self._specs:
                work.norm_class = self.sums.class_of[i]
            works.append(work)
        return works
