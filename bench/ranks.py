"""How a GPT is spread over processes as PyTorch does it, and what each of them does of a training run.

What of PyTorch is slow to import is imported where it is used. Nothing here draws.
"""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from .gpt import GPT, Sizes, batches, corpus
from .trainer import VALIDATION_BATCHES, Contestant, Features, Run, Trainer

STEPS = 40  # by default: fewer than of the job on one process, since four processes share what cores there are
TP = 2  # processes that share a matrix, where there is data parallelism too


@dataclass(frozen=True)
class Wrapper:
    """One way of spreading a model over processes.

    Attributes:
        wrap: the model, its device and the number of processes; what trains in each of these.
        processes: how many processes it is shown with.
        multiple: of what the number of processes has to be.
        copies: processes that see the same data, of so many processes.
    """

    description: str
    wrap: Callable[[GPT, torch.device, int], nn.Module]
    processes: tuple[int, ...] = (2, 4)
    multiple: int = 1
    copies: Callable[[int], int] = lambda world: 1

    def part(self, rank: int, world: int) -> tuple[int, int]:
        """Which part of a batch a rank trains on, and of how many."""
        copies = self.copies(world)
        return rank // copies, world // copies


def _mesh(device: torch.device, **sizes: int) -> DeviceMesh:
    return init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def ddp(model: GPT, device: torch.device, world: int) -> nn.Module:
    """A copy in each process; gradients are averaged."""
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def shard(model: GPT, mesh: DeviceMesh) -> nn.Module:
    """Each block by itself, then what is left: the embeddings and the last norm."""
    from torch.distributed.fsdp import fully_shard

    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fsdp2(model: GPT, device: torch.device, world: int) -> nn.Module:
    """Parameters are sharded over all processes."""
    return shard(model, _mesh(device, shards=world))


def hsdp(model: GPT, device: torch.device, world: int) -> nn.Module:
    """Two groups of processes; parameters are sharded within each, and gradients averaged between them."""
    return shard(model, _mesh(device, replicas=2, shards=world // 2))


def split_matrices(model: GPT, mesh: DeviceMesh) -> nn.Module:
    """Matrices of the blocks, by rows or columns; norms and embeddings stay ordinary parameters.

    Every process computes all heads: queries, keys and values lie in one matrix, whose rows are not the heads'.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    for block in model.blocks:
        plan = {
            "attention.qkv": ColwiseParallel(output_layouts=Replicate()),
            "attention.out": RowwiseParallel(input_layouts=Replicate()),
            "up": ColwiseParallel(),
            "down": RowwiseParallel(),
        }
        parallelize_module(block, mesh, plan)
    return model


def tp(model: GPT, device: torch.device, world: int) -> nn.Module:
    """Matrices are split over all processes, which see the same data."""
    return split_matrices(model, _mesh(device, tp=world))


def tp_fsdp2(model: GPT, device: torch.device, world: int) -> nn.Module:
    """Matrices are split over pairs of processes; all parameters are then sharded over the pairs."""
    mesh = _mesh(device, shards=world // TP, tp=TP)
    split_matrices(model, mesh["tp"])
    return shard(model, mesh["shards"])


def zero_redundancy(params: Any, **options: Any) -> Optimizer:
    """A ZeroRedundancyOptimizer, whose `optimizer_class` is among the options."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, **options)


WRAPPERS = {
    "ddp": Wrapper("DistributedDataParallel", ddp),
    "zero1": Wrapper("DistributedDataParallel and ZeroRedundancyOptimizer: state is sharded", ddp),
    "fsdp2": Wrapper("fully_shard", fsdp2),
    "hsdp": Wrapper("fully_shard in two groups, which have a copy each", hsdp, processes=(4,), multiple=2),
    "tp": Wrapper("matrices are split; all see the same data", tp, copies=lambda world: world),
    "tp-fsdp2": Wrapper(
        f"matrices are split in {TP}, then fully_shard", tp_fsdp2, processes=(4,), multiple=TP, copies=lambda world: TP
    ),
}


def refused(options: Namespace) -> str | None:
    """Why the options of the job cannot be had together: what was given, and what is allowed."""
    name: str | None = options.distributed
    if name is None:
        return "got --processes without --distributed; allowed: both" if options.processes else None
    wrapper, features = WRAPPERS[name], options.features
    processes: Sequence[int] = options.processes or wrapper.processes
    for world in processes:
        _, parts = wrapper.part(0, world)
        if world == 1 or world % wrapper.multiple:
            least = max(2, wrapper.multiple)
            return f"got {world} processes for {name}; allowed: {least} or more, multiples of {wrapper.multiple}"
        if options.batch % parts:
            return f"got --batch {options.batch} for {parts} parts of a batch; allowed: a multiple of {parts}"
        if options.width % wrapper.copies(world):
            return (
                f"got --width {options.width}; allowed: a multiple of {wrapper.copies(world)}, into which {name} splits"
            )
    if options.device.type == "cuda":
        if options.device.index is not None:
            return f"got --device {options.device}; allowed: cpu, or cuda, where rank N takes cuda:N"
        if torch.cuda.device_count() < max(processes):
            found = torch.cuda.device_count()
            return f"got {max(processes)} processes and {found} GPUs; allowed: as many GPUs, or --device cpu"
    return _refused_features(name, features)


def _refused_features(name: str, features: Features) -> str | None:
    """Why a wrapper cannot have some features."""
    if features.release and name in ("ddp", "zero1"):
        return f"got --release with {name}; allowed: without, because gradients are averaged after their hooks have run"
    if features.release and features.skip_nonfinite:
        return (
            "got --release with --skip-nonfinite; allowed: one of them, a sharded gradient is not there to be spoiled"
        )
    if name == "zero1" and (features.max_grad_norm is not None or features.skip_nonfinite):
        return (
            "got --max-grad-norm or --skip-nonfinite with zero1; allowed: neither, because each process steps a part "
            "of the parameters and would see the norm of that; torch's clip_grad_norm_ clips here, before the step"
        )
    if features.amp and name in ("tp", "tp-fsdp2"):
        return f"got --amp with {name}; allowed: without, because GradScaler does not take parameters of several meshes"
    return None


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
