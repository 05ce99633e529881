"""Step counts and hyper-parameters of the parameters on one device, turned into the scalars of each launch.

Every parameter counts for itself, on the device: only there is known whether a step is skipped, and a gradient that
comes and goes changes nothing but its own count.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import launch
from .grad_control import GradDecision, GradNormOptions, GradScalerInputs, move
from .hyperparams import Hyperparams, KernelScalars

HYPER_WORDS = 10  # of each param group, as kernels/scalars.py reads them
_READABLE = (torch.float32, torch.float64)


class StepCounts:
    """Where the parameters of one device have their counts and hyper-parameters, and the scalars made of these.

    Args:
        steps: count of each parameter: a float32 of its own on the device.
        groups: index of each parameter's param group.
        need_double: whether some parameters are float64.

    Attributes:
        scalars: float32 [n_params, 8], those of the last step.
        scalars64: float64 [n_params, 8], if needed.
    """

    def __init__(self, steps: Sequence[Tensor], groups: Sequence[int], *, need_double: bool) -> None:
        device = steps[0].device
        lines = [[step.data_ptr(), group] for step, group in zip(steps, groups, strict=True)]
        self._params = torch.tensor(lines, dtype=torch.int64, device="cpu").to(device)
        size = (len(steps), len(KernelScalars._fields))
        self.scalars = torch.zeros(size, dtype=torch.float32, device=device)
        self.scalars64 = torch.zeros(size, dtype=torch.float64, device=device) if need_double else None

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in (self._params, self.scalars, self.scalars64) if t is not None]

    def advance(
        self,
        grads: Tensor,
        hyperparams: Tensor,
        decision: GradDecision | None,
        scaler: GradScalerInputs,
        *,
        decided: bool,
        sums: Tensor | None,
        options: GradNormOptions,
    ) -> None:
        """Count one update of every parameter that has a gradient, unless the step is skipped.

        Args:
            grads: int64 [n_params], addresses of the gradients, 0 where there is none.
            hyperparams: int64 [n_groups * HYPER_WORDS], of `packed_hyperparams`.
            decision: what the step is subject to, if anything: `decided` already, or to be made from the others.
            scaler: on the device.
            sums: of `RankSums`, if there is to be decided by a norm over ranks; options: of it.
        """
        where = self._params, grads, hyperparams, self.scalars, self.scalars64
        launch.launch_scalars(*where, decision, scaler, decided=decided, sums=sums, options=options)


def packed_hyperparams(
    hyperparams: Hyperparams, device: torch.device, copies: list[Tensor], *, capturing: bool
) -> bytes:
    """Return a param group's row of the table: numbers, and addresses of tensors that the kernel can read.

    Args:
        copies: to which tensors are added that must live until the kernel has run.
        capturing: whether a CUDA graph is being captured, whose replays read the tensors anew.
    """
    numbers: list[float] = []
    addresses: list[int] = []
    for value in hyperparams:
        address = 0
        if isinstance(value, Tensor):
            if value.device != device and capturing:
                warnings.warn(
                    f"a hyper-parameter that is a tensor on {value.device}, and not on {device}, is frozen into the "
                    f"CUDA graph; put it there",
                    stacklevel=2,
                )
            if value.device.type == "cpu" and device.type != "cpu":
                value = float(value)
            else:
                if value.device != device or value.dtype not in _READABLE:
                    value = move(value, device).double()
                    copies.append(value)
                address = value.data_ptr() + (value.dtype == torch.float64)
                value = 0.0
        numbers.append(value)
        addresses.append(address)
    lr, beta1, beta2, _, weight_decay, _ = addresses
    return struct.pack("=6d4q", *numbers, lr, beta1, beta2, weight_decay)


def place_steps(all_entries: Sequence[MutableMapping[str, Any]], device: torch.device) -> None:
    """Give each parameter's state a step count that the kernels can count: a float32 of its own on the device.

    A count that is one stays where it is, so that others who share it see it.
    """
    taken: set[int] = set()
    on_host, elsewhere = [], []
    for entries in all_entries:
        step = entries["step"]
        if not isinstance(step, Tensor) or (step.device.type == "cpu" and device.type != "cpu"):
            on_host.append(entries)
        elif step.device != device or step.dtype != torch.float32 or step.data_ptr() in taken:
            elsewhere.append(entries)
        else:
            taken.add(step.data_ptr())
            entries["step"] = step if step.dim() == 0 else step.reshape(())
    counts = torch.tensor([float(entries["step"]) for entries in on_host], dtype=torch.float32, device="cpu")
    for entries, count in zip(on_host, counts.to(device).unbind(), strict=True):
        entries["step"] = count
    for entries in elsewhere:
        entries["step"] = entries["step"].to(device, torch.float32, copy=True).reshape(())
