"""What one of several processes does of a training run; it imports nothing that draws."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .data import batches, corpus
from .gpt import GPT, Sizes
from .trainer import VALIDATION_BATCHES, Contestant, Run, Trainer
from .wrappers import WRAPPERS, Wrapper


class RankTrainer(Trainer):
    """A trainer in one of several processes."""

    def spoil_gradients(self) -> None:
        """Nothing: hooks of parameters are not called where gradients are sharded; see `backward`."""

    @torch.no_grad()
    def backward(self, loss: Tensor) -> None:
        """As of one process, but that a gradient is spoiled afterwards, on the ranks that hold its first rows."""
        with torch.enable_grad():
            super().backward(loss)
        if self.loop.features.skip_nonfinite and self.spoiled is not None:
            grad = self.loop.params[self.spoiled].grad
            if isinstance(grad, DTensor):
                at = grad.device_mesh.get_coordinate()
                assert at is not None
                elsewhere = [
                    i and not placement.is_replicate() for i, placement in zip(at, grad.placements, strict=True)
                ]
                grad = None if any(elsewhere) else grad.to_local()
            if grad is not None and grad.numel():
                grad.view(-1)[0] = torch.nan


def train_rank(
    rank: int, world: int, report: Callable[[Any], None], contestant: Contestant, options: Namespace
) -> Run | None:
    """Train in one of `world` processes; the run as rank 0 has it, with all weights, and None of the others."""
    wrapper: Wrapper | None = WRAPPERS[options.distributed] if world > 1 else None
    index, parts = wrapper.part(rank, world) if wrapper else (0, 1)
    device: torch.device = options.device if options.device.type == "cpu" else torch.device("cuda", rank)
    options = Namespace(**{**vars(options), "device": device})
    torch.manual_seed(options.seed)
    sizes = Sizes(options.layers, options.heads, options.width, options.context)
    gpt = GPT(sizes).to(device, options.policy.param)
    model: nn.Module = wrapper.wrap(gpt, device, world) if wrapper else gpt
    trainer = (RankTrainer if wrapper else Trainer)(contestant, model, options)

    def mine(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        return inputs.chunk(parts)[index], targets.chunk(parts)[index]

    training, validation = corpus()
    drawn = {"batch": options.batch, "context": options.context}
    # The only attention whose backward pass is deterministic on every GPU.
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches(training, **drawn, count=options.steps, seed=options.seed):
            trainer.step(*mine(batch))
            report(trainer.run.losses[-1])
        held_out = batches(validation, **drawn, count=VALIDATION_BATCHES, seed=options.seed + 1)
        run = trainer.finish([mine(batch) for batch in held_out])
    return joined(run, device, world) if world > 1 else run


def joined(run: Run, device: torch.device, world: int) -> Run | None:
    """A run of all ranks: mean losses, the largest state, whole weights."""
    losses = torch.tensor([*run.losses, run.validation_loss], dtype=torch.float64, device=device)
    dist.all_reduce(losses)
    *run.losses, run.validation_loss = (losses / world).tolist()
    largest = torch.tensor(run.state_bytes, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    run.state_bytes = int(largest)
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # slow, which is no matter here
    run.weights = [w.full_tensor() if isinstance(w, DTensor) else w for w in run.weights]
    return run if dist.get_rank() == 0 else None
