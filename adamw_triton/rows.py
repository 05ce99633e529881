"""Step counts and hyper-parameters of the parameters on one device, turned into the scalars of each launch."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch
from .control import Control, Scaling, move
from .scalars import Hyper, Scalars, host_scalars, scalar_rows
from .upload import Upload


class Rows:
    """A row for each pair of a param group and a step count: what its parameters share.

    Args:
        device: of the parameters.
        groups: index of each parameter's group.
        steps: updates that each parameter has had.
        hypers: of each group.
        on_device: whether the device counts, as it must where only it knows whether a step is skipped.
        capturable: whether steps may be captured in CUDA graphs.

    Attributes:
        of_param: index of each parameter's row.
        counts: 0-d views of one tensor with the count of each parameter, so that one operation counts all.
    """

    def __init__(
        self,
        device: torch.device,
        groups: Sequence[int],
        steps: Sequence[float],
        hypers: Sequence[Hyper],
        *,
        on_device: bool,
        capturable: bool,
    ) -> None:
        self.device, self.on_device = device, on_device
        pairs = list(zip(groups, steps, strict=True))
        order = sorted(range(len(pairs)), key=pairs.__getitem__)
        rows = {pair: row for row, pair in enumerate(sorted(set(pairs)))}
        self.of_param = [rows[pair] for pair in pairs]
        self._groups = [group for group, _ in rows]
        self._row_counts = [step for _, step in rows]
        self.steps = torch.tensor(
            [pairs[i][1] for i in order], dtype=torch.float32, device=device if on_device else "cpu"
        )
        self.version = self.steps._version
        self.counts = [self.steps[0]] * len(pairs)
        for i, count in zip(order, self.steps.unbind(), strict=True):
            self.counts[i] = count
        self._hypers = hypers
        self._values: Tensor | None = None  # of all rows
        # Of this step, made when asked for.
        self._floats: dict[int, Scalars] = {}
        self._uploaded: Tensor | None = None
        if on_device:
            self._resolved = self._resolve(hypers)
            self._content = list(map(_content, self._resolved))
            sizes = torch.tensor(self.of_param).bincount(minlength=len(rows)).cumsum(0)
            self._bounds = torch.stack((torch.cat((torch.zeros_like(sizes[:1]), sizes[:-1])), sizes), dim=1)
            self._table = Upload(self._packed(), device, capturable=capturable)
            self._scalars = torch.zeros(len(rows), len(Scalars._fields), dtype=torch.float64, device=device)
            self._views = self._scalars.unbind()

    def advance(
        self, hypers: Sequence[Hyper], scaling: Scaling, control: Control | None, *, known: bool, capturing: bool
    ) -> None:
        """Count one update of every parameter; on the device, unless it is skipped.

        Args:
            hypers: of each group, now; another list if there are other values than the last time.
            scaling: of the gradients, on this device.
            control: what the update is subject to, if anything: `known` already, or to be written from `scaling`.
            capturing: whether a CUDA graph is being captured.
        """
        if not self.on_device:
            if hypers is not self._hypers:
                self._hypers, self._values = hypers, None
            self._floats = {}
            self._uploaded = None
            self.steps.add_(1)
            self._row_counts = [count + 1 for count in self._row_counts]
        else:
            always = capturing or self._table.replayed
            if always or hypers is not self._hypers:
                self._hypers, self._resolved = hypers, self._resolve(hypers)
                content = list(map(_content, self._resolved))
                if always or content != self._content:
                    self._content = content
                    self._table.write(self._packed(), capturing=capturing)
            if capturing and any(isinstance(v, Tensor) and v.device != self.device for h in hypers for v in h):
                warnings.warn(
                    f"a hyper-parameter that is a tensor, but not on {self.device}, is frozen into the CUDA graph; "
                    f"put it there",
                    stacklevel=2,
                )
            launch.launch_scalars(self._table.tensor, self.steps, self._scalars, control, scaling, known=known)
            if not capturing:
                self._table.prepare()
        self.version = self.steps._version

    @property
    def in_memory(self) -> list[Any]:
        """What the table has addresses of."""
        return [self._resolved, self._hypers] if self.on_device else []

    def hyper(self, row: int) -> tuple[Hyper, float]:
        """Hyper-parameters and count of a row that the host counts."""
        return self._hypers[self._groups[row]], self._row_counts[row]

    def scalars(self, row: int) -> Scalars | Tensor:
        """Of one row."""
        if self.on_device:
            return self._views[row]
        if row not in self._floats:
            self._floats[row] = host_scalars(*self.hyper(row))
        return self._floats[row]

    def table(self) -> Tensor:
        """Of all rows: float64 [n_rows, 8] on the device."""
        if self.on_device:
            return self._scalars
        if self._uploaded is None:
            self._uploaded = self._upload()
        return self._uploaded

    def _upload(self) -> Tensor:
        if len(self._groups) <= _FEW:
            table = torch.tensor([self.scalars(row) for row in range(len(self._groups))], dtype=torch.float64)
        else:
            if self._values is None:
                values = [tuple(map(float, self._hypers[group])) for group in self._groups]
                self._values = torch.tensor(values, dtype=torch.float64)
            table = scalar_rows(self._values, torch.tensor(self._row_counts, dtype=torch.float64))
        if self.device.type == "cuda":
            table = table.pin_memory()
        return table.to(self.device, non_blocking=True)

    def _resolve(self, hypers: Sequence[Hyper]) -> list[Hyper]:
        """With numbers, and tensors that the kernel can read whenever a step is replayed."""

        def resolve(value: Any) -> Any:
            if not isinstance(value, Tensor) or (value.device == self.device and value.dtype in _READABLE):
                return value
            if value.device.type == "cpu":
                return float(value)
            return move(value, self.device).double()

        return [Hyper(*map(resolve, hyper)) if any(isinstance(v, Tensor) for v in hyper) else hyper for hyper in hypers]

    def _packed(self) -> Tensor:
        """The rows as kernels/scalars.py reads them."""
        hypers = [self._resolved[group] for group in self._groups]
        numbers = [[0.0 if isinstance(value, Tensor) else value for value in hyper] for hyper in hypers]
        addresses = [list(map(_address, (h.lr, h.beta1, h.beta2, h.weight_decay))) for h in hypers]
        return torch.cat(
            (torch.tensor(numbers, dtype=torch.float64).view(torch.int64), torch.tensor(addresses), self._bounds), dim=1
        )


_READABLE = (torch.float32, torch.float64)
_FEW = 16  # rows that Python makes faster than twenty operations of torch


def _address(value: float | Tensor) -> int:
    return value.data_ptr() + (value.dtype == torch.float64) if isinstance(value, Tensor) else 0


def _content(hyper: Hyper) -> tuple[float, ...]:
    """What a row of the table says: numbers, and addresses for which there is no number."""
    return tuple(-_address(value) if isinstance(value, Tensor) else value for value in hyper)
