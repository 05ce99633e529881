"""Tensors that one launch steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .checks import check_entries, check_grad, check_param
from .control import move
from .functional import step_tensor, step_tensor_reference
from .layout import is_dense, same_strides
from .rows import Rows
from .storage import Rounding, Storage, TensorState

ALIGNMENT = 16  # bytes of the widest access


class Key(NamedTuple):
    """What the tensors of one bucket have in common."""

    wave: int  # parameters that share memory are stepped one after the other
    form: str  # "table", "tensors" or "reference"
    storage: Storage
    aligned: bool
    amsgrad: bool
    maximize: bool
    cautious: bool
    seed: int  # of stochastic rounding


class Item:
    """One parameter with a gradient."""

    def __init__(self, param: Tensor, grad: Tensor, entries: dict[str, Any], group: int, number: int) -> None:
        self.param = param
        self.grad = grad
        self.entries = entries
        self.group = group
        self.number = number  # among all parameters: the stream of its random bits
        self.wave = 0
        self.row = 0

    def check(self) -> None:
        check_param(self.param)
        check_grad(self.param, self.grad)
        check_entries(self.param, self.entries)

    def key(self, group: Mapping[str, Any]) -> Key:
        state = TensorState.of(self.entries, group["amsgrad"])
        like_param = (self.param, self.grad, *(tensor for tensor in state[:4] if tensor is not None))
        walkable = (
            is_dense(self.param)
            and same_strides(self.param, self.grad)
            and not self.param.is_complex()
            and not self.grad.is_neg()
            and (state.max_exp_avg_sq is None or state.max_exp_avg_sq.dtype == state.exp_avg_sq.dtype)
        )
        if not launch.has_kernels(self.param.device):
            form = "reference"
        else:
            form = "table" if walkable and group["foreach"] is not False else "tensors"
        return Key(
            wave=self.wave,
            form=form,
            storage=Storage.of(self.param, self.grad, state, stochastic=group["stochastic_rounding"]),
            aligned=reduce(or_, (t.data_ptr() for t in like_param)) % ALIGNMENT == 0,
            amsgrad=group["amsgrad"],
            maximize=group["maximize"],
            cautious=group["cautious"],
            seed=group["seed"] if group["stochastic_rounding"] else 0,
        )


class Bucket:
    """Tensors of one device that one launch steps, or one each if the form says so.

    Args:
        addresses: of the gradients of a table, on the device.
        statistics: whether to sum the squares of what is written, and of its change.
    """

    def __init__(self, key: Key, items: Sequence[Item], addresses: Tensor | None, *, statistics: bool) -> None:
        self.key = key
        self.params = [item.param for item in items]
        self.states = [TensorState.of(item.entries, key.amsgrad) for item in items]
        self.roundings = [Rounding(key.seed, item.number) if key.storage.stochastic else None for item in items]
        self.rows = [item.row for item in items]
        self.one_row = self.rows[0] if len(set(self.rows)) == 1 else None
        self.table = None
        if key.form == "table":
            self.table = launch.Table.of(
                self.params,
                [item.grad for item in items],
                self.states,
                aligned=key.aligned,
                addresses=addresses,
                rows=self.rows if self.one_row is None else None,
                roundings=[r for r in self.roundings if r is not None] or None,
            )
        self.statistics: Tensor | None = None
        self._shares: list[Any] = [None] * len(items)  # of the statistics, for each tensor
        if statistics:
            self._make_statistics()

    def _make_statistics(self) -> None:
        device = self.device
        if self.key.form == "reference":
            self.statistics = torch.zeros(len(self.params), 2, dtype=torch.float64, device=device)
            self._shares = list(self.statistics.unbind())
            return
        configuration = launch.configuration_of(*(dtype.to_real() for dtype in self.key.storage.dtypes))
        numels = [p.numel() * (2 if p.is_complex() else 1) for p in self.params]
        programs = [launch.n_programs(n, configuration) for n in numels]
        self.statistics = launch.statistics_like(sum(programs), device)
        self._shares = list(self.statistics.split(programs))

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    def set_statistics(self, sums: Tensor) -> None:
        assert self.statistics is not None
        sums = move(sums, self.device)
        rows = self.statistics.flatten(0, -2)
        rows[0, :2] = sums
        if rows.dtype == torch.float32:
            rows[1, :2] = sums - rows[0, :2]  # what float32 has lost

    def step(self, grads: Sequence[Tensor], rows: Rows, control: Tensor | None) -> None:
        """Step all tensors.

        Args:
            grads: of each.
            rows: where this update has been counted.
            control: `Control.values`, if the step is subject to any.
        """
        options: dict[str, Any] = {"maximize": self.key.maximize, "cautious": self.key.cautious}
        if self.key.form == "reference":
            self._step_reference(grads, rows, control, options)
            return
        if self.table is not None:
            scalars = rows.table() if self.one_row is None else rows.scalars(self.one_row)
            launch.launch_table(self.table, scalars, control=control, statistics=self.statistics, **options)
        else:
            for i, param in enumerate(self.params):
                step_tensor(
                    param,
                    grads[i],
                    self.states[i],
                    rows.scalars(self.rows[i]),
                    control=control,
                    statistics=self._shares[i],
                    rounding=self.roundings[i],
                    **options,
                )
        # Autograd does not see what a kernel writes.
        torch.autograd.graph.increment_version(self.params)

    def _step_reference(
        self, grads: Sequence[Tensor], rows: Rows, control: Tensor | None, options: dict[str, Any]
    ) -> None:
        for i, param in enumerate(self.params):
            hyper, step = rows.hyper(self.rows[i])
            step_tensor_reference(
                param,
                grads[i],
                self.states[i],
                hyper,
                step,
                control=control,
                statistics=self._shares[i],
                rounding=self.roundings[i],
                **options,
            )


def set_statistics(buckets: Sequence[Bucket], sums: Tensor | None) -> None:
    """Make these the sums of all until the next step."""
    for bucket in buckets:
        if sums is not None and bucket.statistics is not None and bucket.statistics.numel():
            bucket.set_statistics(sums)
            return


def statistics_of(buckets: Sequence[Bucket], device: torch.device) -> Tensor | None:
    """Sums of squares of the change of all parameters, and of these: float64 [2] on the device."""
    sums = [
        move(bucket.statistics[..., :2].sum(dim=tuple(range(bucket.statistics.dim() - 1)), dtype=torch.float64), device)
        for bucket in buckets
        if bucket.statistics is not None
    ]
    return torch.stack(sums).sum(dim=0) if sums else None
