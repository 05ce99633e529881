"""What a training loop does around the optimizer's step: folded into the step, or as torch does it, pass by pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamw_triton import AdamW, register_gradient_release


@dataclass(frozen=True)
class Features:
    """Which of these a training loop has."""

    max_grad_norm: float | None = None
    amp: bool = False  # torch.amp.GradScaler
    skip_nonfinite: bool = False
    release: bool = False  # step each parameter in the backward pass; norms are each parameter's own
    capturable: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of our AdamW that fold them into the step."""
        return {
            "max_grad_norm": self.max_grad_norm,
            "skip_nonfinite": self.skip_nonfinite,
            "fused": True if self.amp else None,
            "capturable": self.capturable,
        }

    @property
    def clips_by_itself(self) -> bool:
        """Whether there is no room for torch's clip_grad_norm_ between backward pass and step."""
        return self.max_grad_norm is not None or self.amp or self.release

    @property
    def names(self) -> list[str]:
        present = {
            "clip": self.max_grad_norm is not None,
            "amp": self.amp,
            "skip": self.skip_nonfinite,
            "release": self.release,
            "capturable": self.capturable,
        }
        return [name for name, there in present.items() if there]

    @property
    def refused(self) -> str | None:
        """Why they cannot be had together."""
        if self.release and self.max_grad_norm is not None:
            return "because gradient release steps before the norm of all gradients is known"
        if self.release and self.amp:
            return "because gradient release steps before GradScaler has looked at the gradients"
        return None


class Loop:
    """Backward pass, step and what belongs between them.

    Args:
        optimizer: ours with `Features.options`, if `folded`; else any.
        model: whose parameters it has.
        clip: largest gradient norm of torch's clip_grad_norm_, whatever the features.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: torch.nn.Module,
        features: Features,
        device: torch.device,
        *,
        folded: bool,
        clip: float | None = None,
        init_scale: float = 2.0**10,
    ) -> None:
        self.optimizer = optimizer
        self.params = list(model.parameters())
        self.features = features
        self.folded = folded
        self.clip = clip
        self.scaler = torch.amp.GradScaler(device.type, init_scale=init_scale) if features.amp else None
        if features.release and folded:
            assert isinstance(optimizer, AdamW)
            register_gradient_release(model, optimizer)

    def backward(self, loss: Tensor) -> None:
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def step(self) -> None:
        """From gradients to new weights; with gradient release there is nothing left to do."""
        if self.features.release and self.folded:
            return
        if not self.folded and not self._prepare():
            return
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.params, self.clip)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def zero_grad(self) -> None:
        if not (self.features.release and self.folded):
            self.optimizer.zero_grad()

    def _prepare(self) -> bool:
        """Torch's passes over the gradients; whether to go on."""
        features = self.features
        if self.scaler is not None and (features.max_grad_norm is not None or features.skip_nonfinite):
            self.scaler.unscale_(self.optimizer)  # else a part of its step
        if features.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(self.params, features.max_grad_norm)
        elif features.skip_nonfinite:
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if not features.skip_nonfinite:
            return True
        if features.release:
            for param in self.params:
                if param.grad is not None and not param.grad.isfinite().all():
                    param.grad = None
            return True
        go_on = bool(norm.isfinite())
        if not go_on and self.scaler is not None:
            self.scaler.update()
        return go_on


def spoil(params: Sequence[Tensor], should: Any) -> None:
    """From now on put a NaN into the gradient of a parameter for which `should(index)` is true."""
    for index, param in enumerate(params):

        def hook(grad: Tensor, index: int = index) -> Tensor | None:
            if not should(index):
                return None
            grad = grad.clone()
            grad.view(-1)[grad.numel() // 2] = torch.nan
            return grad

        param.register_hook(hook)


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over a tenth, then a cosine to a tenth."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))
