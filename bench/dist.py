"""Host time of `step()` on sharded parameters, as FSDP2 makes them, without other ranks."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import clip_grad_norm_
from torch.testing._internal.distributed.fake_pg import FakeStore

from adamw_triton import AdamW

from . import common, host, records, shapes
from .host import Provider
from .records import Record
from .shapes import Shape

WORLD = 8
WIDTH = 16  # of the models here: the CPU's own arithmetic must not count, in torch's optimizers either
MAX_GRAD_NORM = 1.0
AIM = 12  # times torch's step, which is this project's own bar
FUSED, CLIP_FUSED = "torch fused", "torch clip_grad_norm_ and fused"
FUSED_NEW = "torch fused, new gradients"
OURS, CLIP_OURS = "adamw_triton", "adamw_triton, max_grad_norm"
PLAIN = ", plain tensors"
MODELS: dict[str, Callable[[], list[Shape]]] = {"llama-3-8b": shapes.llama3_8b, "llama-3-70b": shapes.llama3_70b}
DESCRIPTION = f"""\
Time of step() on the host, on parameters that FSDP2 has sharded over {WORLD} ranks. There is one process: the process
group is torch's fake one, in which a collective returns at once, so that what is measured is Python and dispatch alone.
The lists are those of Llama 3, with every dimension divided until the model's width is {WIDTH}, so that a shard has a
few elements. Parameters come from fully_shard, and gradients are DTensors with the very spec of their parameter, as
FSDP2 makes them. "plain tensors" are the same shards, not wrapped as DTensors. "new gradients" gives every parameter a
new DTensor over other memory before each step, outside of what is timed, as a backward pass after zero_grad() does.
On a GPU launches are real. Without one, ours launch nothing at the one place that calls kernels, and torch's optimizers
do their arithmetic, on one thread.
All are compared with torch's fused step on DTensors; those with max_grad_norm with clip_grad_norm_ and that step, those
with new gradients with that step on new gradients. Each has a first step, not timed, which makes the state. Then
providers take turns. Each takes steps for 30 ms, four at least, before the one that counts; median and 20th and 80th
percentile, without Python's garbage collector. "cold" is the first step of a turn, after the others have used the
caches, as forward and backward do. All-reduces and launches of kernels are counted in one more step. Takes minutes:
torch's optimizers are slow on DTensors, and at their first step above all."""


class Shards(NamedTuple):
    """Parameters that have gradients."""

    params: list[nn.Parameter]
    renew: Callable[[], Any]  # give every parameter a new gradient


def small(listed: Sequence[Shape], width: int = WIDTH, world: int = WORLD) -> list[Shape]:
    """Shapes of a model, every dimension divided by one factor, so that the model's width is `width`.

    The first dimension is rounded up to a multiple of `world`: each rank has as many rows, as in the model itself.
    """
    factor = listed[0][-1] // width
    return [(-(-rows // (factor * world)) * world, *(-(-size // factor) for size in rest)) for rows, *rest in listed]


@contextmanager
def fake_mesh(device: torch.device) -> Iterator[DeviceMesh]:
    """A mesh of WORLD ranks, of which this process is the first, and the only one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    try:
        yield init_device_mesh(device.type, (WORLD,))
    finally:
        dist.destroy_process_group()


def sharded(listed: Iterable[Shape], mesh: DeviceMesh, device: torch.device) -> Shards:
    """Parameters sharded by FSDP2; gradients are DTensors with their parameter's own spec."""
    model = nn.Module()
    model.weights = nn.ParameterList([nn.Parameter(torch.zeros(shape, device=device)) for shape in listed])
    fully_shard(model, mesh=mesh)
    params = list(model.parameters())
    pairs = [[torch.zeros_like(_local(param)) for param in params] for _ in range(2)]

    def renew() -> None:
        pairs.reverse()
        for param, local in zip(params, pairs[0], strict=True):
            param.grad = DTensor(local, param._spec, requires_grad=False)  # type: ignore[attr-defined]

    renew()
    return Shards(params, renew)


def plain(listed: Iterable[Shape], device: torch.device) -> Shards:
    """The shards of the first rank as ordinary parameters."""
    params = [nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes.shard(listed, WORLD)]
    for param in params:
        param.grad = torch.zeros_like(param)
    return Shards(params, lambda: None)


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor._local_tensor


def providers(listed: Sequence[Shape], mesh: DeviceMesh, device: torch.device) -> dict[str, Provider]:
    """Each optimizer on tensors of its own."""

    def clip_and_step(params: list[nn.Parameter], step: Callable[[], Any]) -> None:
        clip_grad_norm_(params, MAX_GRAD_NORM)
        step()

    torch_adamw: Callable[..., torch.optim.AdamW] = torch.optim.AdamW
    made: dict[str, Provider] = {}
    for suffix, make in (("", partial(sharded, mesh=mesh)), (PLAIN, plain)):

        def new(make: Callable[..., Shards] = make) -> Shards:
            return make(listed, device=device)

        clipped = new()
        made[OURS + suffix] = Provider(AdamW(new().params).step)
        made[CLIP_OURS + suffix] = Provider(AdamW(new().params, max_grad_norm=MAX_GRAD_NORM).step, against=CLIP_FUSED)
        made[FUSED + suffix] = Provider(torch_adamw(new().params, fused=True).step)
        made[CLIP_FUSED + suffix] = Provider(
            partial(clip_and_step, clipped.params, torch_adamw(clipped.params, fused=True).step), against=CLIP_FUSED
        )
        made["torch foreach" + suffix] = Provider(torch_adamw(new().params, foreach=True).step)
        made["torch for-loop" + suffix] = Provider(torch_adamw(new().params, foreach=False).step)
        if make is not plain:
            ours, fused = new(), new()
            made[f"{OURS}, new gradients"] = Provider(AdamW(ours.params).step, before=ours.renew, against=FUSED_NEW)
            made[FUSED_NEW] = Provider(
                torch_adamw(fused.params, fused=True).step, before=fused.renew, against=FUSED_NEW
            )
    return made


def counts(provider: Provider, device: torch.device) -> dict[str, int]:
    """All-reduces and launches of one step, which is not the first."""
    with host.counted_launches(device) as launched, CommDebugMode() as collectives:
        provider.step()
    found = {str(name): count for name, count in collectives.get_comm_counts().items()}
    other = sorted(name for name in found if "all_reduce" not in name and "allreduce" not in name)
    if other:
        raise RuntimeError(f"a step took collectives that are no all-reduces: {', '.join(other)}")
    return {"all_reduces": sum(found.values()), "launches": len(launched)}


def measure_model(name: str, options: Namespace) -> list[Record]:
    """One record for each provider on the parameters of one model."""
    listed = small(MODELS[name]())
    with fake_mesh(options.device) as mesh:
        with host.launches(options.device):
            taking_turns = providers(listed, mesh, options.device)
            samples = host.sample(taking_turns, options.device, options.seconds)
        # Of torch's only that which has one: the dispatch of thousands of operations is slow where it is watched.
        watched = {name: each for name, each in taking_turns.items() if name.startswith((OURS, CLIP_FUSED))}
        counted = {name: counts(each, options.device) for name, each in watched.items()}
    found: list[Record] = []
    for provider, quantities in host.compared(taking_turns, samples).items():
        record = {"command": "dist", "case": name, "provider": provider, "tensors": len(listed), **quantities}
        record |= counted.get(provider, {})
        if not provider.startswith(OURS):
            record.pop("launches", None)  # torch's kernels are not seen
        found.append(record)
    return found


def measure(options: Namespace) -> list[Record]:
    """All models."""
    return [record for name in options.model for record in measure_model(name, options)]


def add_options(parser: common.Parser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", choices=MODELS, default=list(MODELS), help="whose list of parameters")
    add("--seconds", type=common.non_negative_float, default=8.0, help="for each model, at least 3 samples")
    add("--device", type=common.device, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")


COLUMNS = {
    "host_us": "step(), µs",
    "times_torch_fused": "torch on DTensors / this",
    "cold_us": "cold, µs",
    "times_torch_fused_cold": "cold: torch / this",
    "all_reduces": "all-reduces",
    "launches": "launches",
}


def main(argv: list[str]) -> int:
    parser = common.Parser("dist", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    found = measure(options)
    console = Console()
    title = f"Host time of step() on shards of FSDP2, one of {WORLD} ranks, on {common.device_name(options.device)}"
    console.print(records.table(title, found, COLUMNS))
    for record in found:
        if record["provider"] in (OURS, CLIP_OURS):
            ratio = record["times_torch_fused"]
            reached = "reached" if ratio >= AIM else "not reached"
            console.print(f"{record['case']}, {record['provider']}: {ratio:.1f} times; {AIM} are aimed at: {reached}")
    if options.json:
        records.write(options.json, "dist", argv, options.device, found)
    return 0
