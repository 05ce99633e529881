"""A tiny GPT, and the ways in which PyTorch spreads a model over ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from parts import full
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

VOCABULARY, WIDTH, HIDDEN, LENGTH, HEADS, BATCH = 13, 128, 9, 6, 2, 8


class Block(nn.Module):
    """Attention and MLP; 9 hidden units, so that shards are uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        # A bias of the keys would have a gradient of 0, and noise for an update.
        self.q, self.k, self.v = (nn.Linear(WIDTH, 8, bias=name != "k") for name in "qkv")
        self.proj = nn.Linear(8, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (-1, 4)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TinyGPT(nn.Module):
    """Rows of 128 elements and others, biases, norms, and a parameter of one element, which most ranks lack."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(LENGTH, WIDTH)
        self.block = Block()
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position(torch.arange(LENGTH))
        return self.head(self.norm(self.block(x))) * self.gain


def make_model(dtype: torch.dtype = torch.float32) -> TinyGPT:
    torch.manual_seed(1)
    return TinyGPT().to(dtype)


def batch(step: int) -> Tensor:
    """The global batch of a step, the same on all ranks: sequences that count up."""
    starts = torch.randint(VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(100 + step))
    return (starts + torch.arange(LENGTH)) % VOCABULARY


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean over all tokens of the cross-entropy of the next one."""
    return F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(-1, 1).flatten())


@functools.cache
def mesh_of(*sizes: int, names: tuple[str, ...]) -> DeviceMesh:
    """A mesh over all ranks; made once, since each makes new groups."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


@dataclass
class Wrapped:
    """A model on its ranks.

    Attributes:
        model: to be called.
        data_rank, data_ranks: which part of the batch this rank trains on, of how many.
    """

    model: nn.Module
    data_rank: int = 0
    data_ranks: int = 1

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def full_params(self) -> list[Tensor]:
        """Plain copies of the whole parameters on every rank, in the order of the model's."""
        if isinstance(self.model, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(self.model, writeback=False):
                return [full(param) for param in self.model.module.parameters()]
        return [full(param) for param in self.params]

    def index_of(self, name: str) -> int:
        """The number of a parameter."""
        return next(i for i, (its_name, _) in enumerate(self.model.named_parameters()) if its_name.endswith(name))

    def part_of(self, tokens: Tensor) -> Tensor:
        return tokens.chunk(self.data_ranks)[self.data_rank]


def _data_parallel(model: nn.Module) -> Wrapped:
    return Wrapped(model, dist.get_rank(), dist.get_world_size())


def _one(model: TinyGPT) -> Wrapped:
    return Wrapped(model)


def _ddp(model: TinyGPT) -> Wrapped:
    return _data_parallel(nn.parallel.DistributedDataParallel(model))


def _fsdp1(model: TinyGPT, use_orig_params: bool) -> Wrapped:
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    return _data_parallel(FullyShardedDataParallel(model, **options))


def _fsdp2(model: TinyGPT, **options) -> Wrapped:
    mesh = mesh_of(dist.get_world_size(), names=("data",))
    fully_shard(model.block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return _data_parallel(model)


def _fsdp2_bf16(model: TinyGPT) -> Wrapped:
    return _fsdp2(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))


def _fsdp2_offload(model: TinyGPT) -> Wrapped:
    return _fsdp2(model, offload_policy=CPUOffloadPolicy(pin_memory=False))


def _hsdp(model: TinyGPT) -> Wrapped:
    mesh = mesh_of(2, 2, names=("replicas", "shards"))
    fully_shard(model.block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _data_parallel(model)


def _several_meshes(model: TinyGPT) -> Wrapped:
    """The block on a mesh of 2 x 2, the rest on one of 4."""
    fully_shard(model.block, mesh=mesh_of(2, 2, names=("replicas", "shards")))
    fully_shard(model, mesh=mesh_of(4, names=("data",)))
    return _data_parallel(model)


def _parallelize(model: TinyGPT, mesh: DeviceMesh) -> None:
    """Tensor and sequence parallel: gradients of the norms are partial sums.

    DTensors between up and down: a local output of 5 or 4 units would lose how many there are.
    """
    plan = {
        "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "position": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "block.norm1": SequenceParallel(),
        "block.norm2": SequenceParallel(),
        "block.q": ColwiseParallel(input_layouts=Shard(1)),
        "block.k": ColwiseParallel(input_layouts=Shard(1)),
        "block.v": ColwiseParallel(input_layouts=Shard(1)),
        "block.proj": RowwiseParallel(output_layouts=Shard(1)),
        "block.up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "block.down": RowwiseParallel(output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


def _tp(model: TinyGPT) -> Wrapped:
    _parallelize(model, mesh_of(2, names=("tensor",)))
    return Wrapped(model)


def _tp_plain(model: TinyGPT) -> Wrapped:
    """Tensor parallel in the block; all else is plain."""
    plan = {
        **dict.fromkeys(("block.q", "block.k", "block.v"), ColwiseParallel()),
        "block.up": ColwiseParallel(use_local_output=False),
        **dict.fromkeys(("block.proj", "block.down"), RowwiseParallel()),
    }
    parallelize_module(model, mesh_of(2, names=("tensor",)), plan)
    return Wrapped(model)


def _tp_fsdp2(model: TinyGPT) -> Wrapped:
    """On a mesh of 2 x 2; what tensor parallel leaves alone is on its first dimension only."""
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    _parallelize(model, mesh["tensor"])
    fully_shard(model.block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return Wrapped(model, mesh["data"].get_local_rank(), 2)


WRAPPERS: dict[str, Callable[[TinyGPT], Wrapped]] = {
    "one": _one,
    "ddp": _ddp,
    "zero": _ddp,
    "fsdp1": functools.partial(_fsdp1, use_orig_params=True),
    "fsdp1-flat": functools.partial(_fsdp1, use_orig_params=False),
    "fsdp2": _fsdp2,
    "fsdp2-bf16": _fsdp2_bf16,
    "fsdp2-offload": _fsdp2_offload,
    "hsdp": _hsdp,
    "several-meshes": _several_meshes,
    "tp": _tp,
    "tp-plain": _tp_plain,
    "tp-fsdp2": _tp_fsdp2,
}


def wrap(name: str, dtype: torch.dtype = torch.float32) -> Wrapped:
    """The same model in any wrapper."""
    return WRAPPERS[name](make_model(dtype))
