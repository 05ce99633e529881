"""What a plan steps, read anew at each step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from operator import is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Members(NamedTuple):
    """What a step reads anew of the parameters of a plan, in the plan's order.

    Attributes:
        listed: parameters as their groups have them.
        params: what of them lies on this rank.
        grads: likewise; None where there is none.
        entries: the optimizer's state of each.
        grad_addresses: int64 of each, packed; 0 where there is none.
        all_present: whether all have gradients.
    """

    listed: list[Tensor]
    params: list[Tensor]
    grads: list[Tensor | None]
    entries: list[dict[str, Any]]
    grad_addresses: bytes
    all_present: bool

    def part(self, span: slice) -> Members:
        if span == slice(0, len(self.params)):
            return self
        packed = self.grad_addresses[8 * span.start : 8 * span.stop]
        parts = (of_all[span] for of_all in (self.listed, self.params, self.grads, self.entries))
        return Members(*parts, packed, self.all_present)  # type: ignore[arg-type, call-arg]

    def written(self, first: int) -> list[Tensor]:
        """Return what of the first parameters a step has written to."""
        params = self.params[:first]
        if self.listed is not self.params:
            params = [*params, *compress(self.listed, map(is_not, self.listed, params))]
        if first < len(self.params) or not self.all_present:
            with_grad = [i for i in range(first) if self.grads[i] is not None]
            ids = {id(param) for i in with_grad for param in (self.listed[i], self.params[i])}
            params = [param for param in params if id(param) in ids]
        return params


def take_back(grads: Sequence[Tensor | None], all_entries: Sequence[dict[str, Any]], decision: Tensor | None) -> None:
    """Take back the counts of updates that were not launched."""
    for grad, entries in zip(grads, all_entries, strict=True):
        if grad is not None:
            entries["step"].sub_(1.0 if decision is None else (decision[1] == 0).to(torch.float32))
