"""In the workers: sharded parameters with gradients made by hand, the same numbers as in one process."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from parts import Parts, indices_of_parts, local
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from training import STEPPED_BY_TORCH, STORAGES
from wrappers import mesh_of

from adamw_triton import AdamW, launch
from adamw_triton.storage import GROUP_SIZE

OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}


class Layers(nn.Module):
    """Shards begin at any index, odd ones too; rows of 128 and 256 elements have moments of 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.columns, self.rows = nn.Linear(5, 7), nn.Linear(7, 5)
        self.wide_columns, self.wide_rows = nn.Linear(128, 7), nn.Linear(256, 3)
        self.even = nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Uses one of them."""
        return self.even(x)


def _parallelize(model: Layers, mesh: Any) -> None:
    plan = {
        **dict.fromkeys(("columns", "wide_columns", "even"), ColwiseParallel()),
        **dict.fromkeys(("rows", "wide_rows"), RowwiseParallel()),
    }
    parallelize_module(model, mesh, plan)


def _plain(model: Layers) -> None:
    pass


def _fsdp2(model: Layers) -> None:
    fully_shard(model, mesh=mesh_of(dist.get_world_size(), names=("data",)))


def _fsdp2_columns(model: Layers) -> None:
    """Matrices whose columns can be dealt out evenly are split along them."""
    size = dist.get_world_size()

    def place(param: nn.Parameter) -> Shard | None:
        return Shard(1) if param.dim() == 2 and param.shape[1] % size == 0 else None

    fully_shard(model, mesh=mesh_of(size, names=("data",)), shard_placement_fn=place)


def _hsdp(model: Layers) -> None:
    fully_shard(model, mesh=mesh_of(2, 2, names=("replicas", "shards")))


def _several_meshes(model: Layers) -> None:
    """Two matrices on a mesh of 2 x 2, the others on one of 4."""
    for layer in (model.columns, model.wide_columns):
        fully_shard(layer, mesh=mesh_of(2, 2, names=("replicas", "shards")))
    fully_shard(model, mesh=mesh_of(4, names=("data",)))


def _tp(model: Layers) -> None:
    _parallelize(model, mesh_of(dist.get_world_size(), names=("tensor",)))


def _tp_fsdp2(model: Layers) -> None:
    mesh = mesh_of(2, 2, names=("data", "tensor"))
    _parallelize(model, mesh["tensor"])
    fully_shard(model, mesh=mesh["data"])


DEALS: dict[str, Callable[[Layers], None]] = {
    "plain": _plain,
    "fsdp2": _fsdp2,
    "fsdp2-columns": _fsdp2_columns,
    "hsdp": _hsdp,
    "several-meshes": _several_meshes,
    "tp": _tp,
    "tp-fsdp2": _tp_fsdp2,
}
# For each number of ranks: with the process groups that have different parts of a parameter.
SHARDED_GROUPS = {
    ("fsdp2", 2): 1,
    ("fsdp2-columns", 2): 1,
    ("tp", 2): 1,
    ("fsdp2", 4): 1,
    ("tp", 4): 1,
    ("hsdp", 4): 1,
    ("several-meshes", 4): 2,
    ("tp-fsdp2", 4): 2,
}


def names() -> list[str]:
    return [name for name, _ in Layers().named_parameters()]


def values(seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Random values for all parameters, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(param.shape, generator=generator).to(dtype) for param in Layers().parameters()]


def deal_out(deal: str, given: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters with these values, sharded."""
    model = Layers().to(given[0].dtype)
    for param, value in zip(model.parameters(), given, strict=True):
        param.data.copy_(value)
    DEALS[deal](model)
    return list(model.parameters())


@functools.cache
def indices(deal: str) -> Parts:
    """Where in the whole each of this rank's elements is, by parameter."""
    return indices_of_parts(Layers(), DEALS[deal])


def set_grads(deal: str, params: Sequence[nn.Parameter], given: Sequence[Tensor]) -> None:
    """Give every parameter its part of the gradient, with its own spec, as FSDP2 does."""
    for param, grad, at in zip(params, given, indices(deal), strict=True):
        part = grad.flatten()[at]
        param.grad = DTensor(part, param._spec, requires_grad=False) if isinstance(param, DTensor) else part


def make(
    deal: str, storage: str = "fp32", given: Sequence[Tensor] | None = None, **options: Any
) -> tuple[list[nn.Parameter], AdamW]:
    """Sharded parameters, of given values or random ones, and their optimizer."""
    params = deal_out(deal, values(0, STORAGES[storage].param) if given is None else given)
    return params, AdamW(params, **{**OPTIONS, **STORAGES[storage].options, **options})


def steps(deal: str, params: Sequence[nn.Parameter], optimizer: AdamW, first: int, last: int) -> None:
    """Take steps, each with gradients of its own."""
    for step in range(first, last):
        set_grads(deal, params, values(1 + step, params[0].dtype))
        optimizer.step()


@functools.cache
def stepped_alone(storage: str) -> dict[str, Tensor]:
    """What two steps leave in one process."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        params, optimizer = make("plain", storage)
        steps("plain", params, optimizer, 0, 2)
        found = [local_contents(params, optimizer)]
    dist.broadcast_object_list(found)
    return found[0]


def parts_of(deal: str, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what this rank should have of the contents of one process."""
    at = dict(zip(names(), indices(deal), strict=True))
    found = {}
    for label, value in whole.items():
        name, _, entry = label.partition(": ")
        if entry == "step":
            found[label] = value
        elif entry.endswith("_scale"):
            found[label] = value.flatten()[at[name][:, ::GROUP_SIZE] // GROUP_SIZE]
        elif value.dim() > at[name].dim():  # the two bytes of a remainder
            found[label] = value.flatten(0, -2)[at[name]]
        else:
            found[label] = value.flatten()[at[name]]
    return found


def refusal(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str | None:
    """Call a function. Returns the error that it raised, its type first; None if there was none."""
    try:
        function(*args, **kwargs)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def local_contents(params: Sequence[nn.Parameter], optimizer: AdamW) -> dict[str, Tensor]:
    """Copies of what this rank has of the parameters and their state."""
    found = {}
    for name, param in zip(names(), params, strict=True):
        found[name] = local(param.detach()).clone()
        for entry, value in optimizer.state.get(param, {}).items():
            found[f"{name}: {entry}"] = local(value).clone()
    return found


def changed(before: dict[str, Tensor], after: dict[str, Tensor], relative: float = 0.0) -> list[str]:
    """Names of what is new, gone or another value; further off than some part of it, if that is given."""
    found = before.keys() ^ after.keys()
    for name in before.keys() & after.keys():
        one, other = before[name], after[name]
        if relative and one.is_floating_point():
            same = torch.allclose(one.double(), other.double(), rtol=relative, atol=1e-12)
        else:
            same = torch.equal(one, other)
        if one.dtype != other.dtype or not same:
            found.add(name)
    return sorted(found)


def rounding(storage: str) -> float:
    """How far equal steps may be apart, relatively, in shards that begin elsewhere."""
    if launch.INTERPRETED or storage not in STEPPED_BY_TORCH:
        return 0.0
    return 2.0**-7 if storage == "bf16" else 2.0**-22  # at the border between two values of it; of the arithmetic


def compare_bits(deal: str, storages: Sequence[str], foreach: bool | None) -> dict[str, list[str]]:
    """Names of what differs from one process, in each storage."""
    found = {}
    for storage in storages:
        params, optimizer = make(deal, storage, foreach=foreach)
        steps(deal, params, optimizer, 0, 2)
        after = local_contents(params, optimizer)
        assert len(after) >= 4 * len(names()), "too little to compare"
        found[storage] = changed(after, parts_of(deal, stepped_alone(storage)), rounding(storage))
    return found
