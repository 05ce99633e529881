"""The attributes of AdamW that are about norms: options, and what the last step found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grad_control import GradDecision, GradNormOptions
from .plan import Plan


class NormOption:
    """An attribute of the optimizer: one of its `GradNormOptions`, checked when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else getattr(optimizer._norm_options, self._name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        options = optimizer._norm_options._replace(**{self._name: value})
        options.check()
        optimizer._norm_options = options


class NormAttributes:
    """What `AdamW` documents as attributes."""

    max_grad_norm = NormOption()
    skip_nonfinite = NormOption()
    skip_grad_norm_above = NormOption()
    param_groups: list[dict[str, Any]]
    statistics: bool
    _norm_options: GradNormOptions
    _plans: list[Plan]
    _decisions: dict[torch.device, GradDecision]

    @property
    def grad_norm(self) -> Tensor | None:
        return self._decision_on(self._home).values[2].clone() if self._norm_options.need_norm else None

    @property
    def skipped_steps(self) -> Tensor:
        return self._decision_on(self._home).skipped.clone()

    @property
    def update_norm(self) -> Tensor | None:
        return self._norm_of_statistics(0)

    @property
    def param_norm(self) -> Tensor | None:
        return self._norm_of_statistics(1)

    def _norm_of_statistics(self, index: int) -> Tensor | None:
        if not self.statistics:
            return None
        sums = [of_plan for plan in self._plans if (of_plan := plan.sums_of_squares(self._home)) is not None]
        return torch.stack(sums).sum(dim=0)[index].sqrt() if sums else None

    @property
    def _home(self) -> torch.device:
        """Device of the first parameter."""
        for group in self.param_groups:
            for param in group["params"]:
                return param.device
        return torch.device("cpu")

    def _decision_on(self, device: torch.device) -> GradDecision:
        if device not in self._decisions:
            with torch.inference_mode(False):
                self._decisions[device] = GradDecision(device)
        return self._decisions[device]
