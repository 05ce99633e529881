"""One training run. What a loop does around the step is folded into it, or done as torch does it, pass by pass."""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from adamw_triton import AdamW, param_groups_weight_decay, register_gradient_release
from adamw_triton.storage.policies import Policy

from . import common


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


BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
VALIDATION_BATCHES = 16
SPOILED_EVERY = 7  # steps, of which one has a NaN in a gradient, with --skip-nonfinite


class Contestant(NamedTuple):
    """An optimizer, and whether it does itself what is around the step."""

    label: str
    make: Callable[..., Optimizer]
    folded: bool = False


@dataclass
class Run:
    """One training run."""

    label: str
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    validation_loss: float = math.nan
    state_bytes: int = 0
    first_step_bytes: int | None = None


class Trainer:
    """A model and its optimizer; everything but the optimizer's class is the same in every one.

    Args:
        model: a GPT, or one that is wrapped or sharded.
        options: those of the command, with `features`.
    """

    def __init__(self, contestant: Contestant, model: nn.Module, options: Namespace) -> None:
        self.run = Run(contestant.label)
        self.model = model
        self.device: torch.device = options.device
        groups = param_groups_weight_decay(model, options.weight_decay)
        self.optimizer = contestant.make(groups, lr=options.lr, betas=BETAS, eps=1e-8)
        features: Features = options.features
        clip = None if features.clips_by_itself else MAX_GRAD_NORM
        self.loop = Loop(self.optimizer, model, features, self.device, folded=contestant.folded, clip=clip)
        if features.skip_nonfinite:
            self.spoil_gradients()
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(schedule, steps=options.steps))

    @property
    def spoiled(self) -> int | None:
        """Of which parameter the gradient is to be spoiled at this step."""
        step = len(self.run.losses)
        return step % len(self.loop.params) if step % SPOILED_EVERY == SPOILED_EVERY - 1 else None

    def spoil_gradients(self) -> None:
        """See to it that a gradient has a NaN where `spoiled` says so."""
        spoil(self.loop.params, lambda index: index == self.spoiled)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs.to(self.device)).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.to(self.device).flatten())

    def backward(self, loss: Tensor) -> None:
        self.loop.backward(loss)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        loss = self.loss(inputs, targets)
        self.backward(loss)
        ms, added = timed_step(self.loop, self.device)
        if not self.run.losses:
            self.run.first_step_bytes = added
        self.loop.zero_grad()
        self.scheduler.step()
        self.run.losses.append(loss.item())
        self.run.step_ms.append(ms)

    @torch.no_grad()
    def finish(self, held_out: list[tuple[Tensor, Tensor]]) -> Run:
        self.run.validation_loss = statistics.fmean(self.loss(*batch).item() for batch in held_out)
        self.run.weights = [param.detach() for param in self.model.parameters()]
        self.run.state_bytes = state_bytes(self.optimizer)
        return self.run


def timed_step(loop: Loop, device: torch.device) -> tuple[float, int | None]:
    """Milliseconds from gradients to new weights, and on a GPU the bytes that added at its peak."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    common.synchronize(device)
    start = time.perf_counter()
    loop.step()
    common.synchronize(device)
    ms = (time.perf_counter() - start) * 1e3
    return ms, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the state that is in this process."""
    optimizer = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's own
    tensors = [
        value.to_local() if hasattr(value, "to_local") else value  # of a DTensor
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def contestants_of(policy: Policy, features: Features, device: torch.device, ours: type[Optimizer]) -> list[Contestant]:
    """The reference, ours and the control. Only the second folds what is around the step into it."""
    if policy.is_plain and policy.param == policy.exp_avg == policy.exp_avg_sq:
        make = partial(torch.optim.AdamW, amsgrad=policy.amsgrad)
        loop = Contestant("torch.optim.AdamW foreach=False", partial(make, foreach=False))
        fused = Contestant("torch.optim.AdamW fused=True", partial(make, fused=True))
    else:  # torch stores nothing in this way: torch's passes around our step
        plain = partial(ours, **policy.options)
        loop = Contestant("adamw_triton.AdamW, torch's passes", partial(plain, foreach=False))
        fused = Contestant("adamw_triton.AdamW, torch's passes, one launch", partial(plain, foreach=True))
    reference, control = (fused, loop) if device.type == "cuda" else (loop, fused)
    label = ", ".join(["adamw_triton.AdamW", *features.names])
    options = {**policy.options, **features.options} if policy.name != "fp32" or features.names else {}
    return [reference, Contestant(label, partial(ours, **options), folded=True), control]
