"""Whether another block size, number of warps or cache hint is faster than those of launch.configuration_of."""

from __future__ import annotations

import argparse
import itertools
import sys

import torch
from rich.console import Console
from torch import Tensor

from adamw_triton import launch
from adamw_triton.launch import Configuration
from adamw_triton.storage import NoiseKey, StateTensors
from adamw_triton.storage.policies import BY_NAME as POLICIES_BY_NAME
from adamw_triton.storage.policies import Policy

from .. import common, peers, records, timing
from ..records import Record
from ..throughput import FREE_SHARE, can_measure, free_bytes, needed_bytes, noise_key, size, size_name, step_scalars

DESCRIPTION = """\
Sweeps block size, warps (and with them elements per thread) and the hint to the caches, of both kernels on scratch
tensors, for every storage policy. Kernels are launched with each configuration, in turns; GB/s by the byte formula
from events, L2 flushed. "chosen" marks what adamw_triton.launch uses, for reasons that its source gives; this checks
them. It only prints: configurations stay fixed in the source."""

BLOCK_SIZES = (256, 512, 1024, 2048, 4096)
NUM_WARPS = (1, 2, 4, 8)
EVICTIONS = ("", "evict_first", "evict_last")
MAX_ELEMENTS_PER_THREAD = 32  # four tensors of more would not fit in a thread's registers
ENTRIES = ("tensor", "table")
WARP = 32 if torch.version.hip is None else 64

COLUMNS = {
    "gb_per_s": "GB/s",
    "of_best": "of best",
    "elements_per_thread": "elements a thread",
    "chosen": "chosen",
}


def elements_per_thread(one: Configuration) -> int:
    return one.block_size // (WARP * one.num_warps)


def name_of(one: Configuration) -> str:
    return f"block {one.block_size} warps {one.num_warps} {one.eviction or 'no hint'}"


def configuration_of(policy: Policy) -> Configuration:
    return launch.configuration_of(*policy.dtypes, *([policy.master] if policy.master else []))


def configurations() -> list[Configuration]:
    """Every configuration whose threads all have elements, and not too many."""
    every = [Configuration(*one) for one in itertools.product(BLOCK_SIZES, NUM_WARPS, EVICTIONS)]
    return [one for one in every if 1 <= elements_per_thread(one) <= MAX_ELEMENTS_PER_THREAD]


def calls(
    param: Tensor,
    grad: Tensor,
    state: StateTensors,
    entry: str,
    chosen: list[Configuration],
    key: NoiseKey | None = None,
) -> dict[str, timing.Call]:
    """A launch of each configuration on the same tensors."""
    scalars = step_scalars(param.device)
    grads = torch.tensor([grad.data_ptr()], dtype=torch.int64, device=param.device)

    def tensor_call(one: Configuration) -> timing.Call:
        return lambda: launch.launch_tensor(
            param, grad, state, scalars, maximize=False, noise_key=key, configuration=one
        )

    def table_call(one: Configuration) -> timing.Call:
        keys = None if key is None else [key]
        table = launch.Table.of([param], grad.dtype, [state], aligned=True, noise_keys=keys, configuration=one)
        return lambda: launch.launch_table(table, grads, scalars.unsqueeze(0), maximize=False)

    make = tensor_call if entry == "tensor" else table_call
    return {name_of(one): make(one) for one in chosen}


def rows(policy: Policy, entry: str, elements: int, samples: timing.Samples) -> list[Record]:
    """Records of one sweep, fastest first."""
    used = configuration_of(policy)
    moved = elements * policy.bytes_per_element
    speeds = {name: records.spread([moved / ms / 1e6 for ms in taken]) for name, taken in samples.items()}
    best = max(speed["median"] for speed in speeds.values())
    by_name = {name_of(one): one for one in configurations()}
    return [
        {
            "command": "tune",
            "case": f"{policy.name} {entry} {size_name(elements)} {name}",
            "provider": "adamw_triton",
            "policy": policy.name,
            "entry": entry,
            "elements": elements,
            **by_name[name]._asdict(),
            "elements_per_thread": elements_per_thread(by_name[name]),
            "gb_per_s": speed,
            "of_best": speed["median"] / best,
            "chosen": by_name[name] == used,
        }
        for name, speed in sorted(speeds.items(), key=lambda item: -item[1]["median"])
    ]


def measure(options: argparse.Namespace) -> list[Record]:
    device: torch.device = options.device
    failed = {"command": "tune", "case": "sweep", "provider": "adamw_triton"}
    if not can_measure(device):
        return [{**failed, "error": "no GPU: there is nothing to tune for"}]
    found: list[Record] = []
    with torch.cuda.device(device):
        flush = timing.Flush(device)
        for policy in [POLICIES_BY_NAME[name] for name in options.dtype or POLICIES_BY_NAME]:
            if needed_bytes(policy, options.size) > FREE_SHARE * free_bytes(device):
                found.append({**failed, "case": f"{policy.name} {size_name(options.size)}", "error": "does not fit"})
                continue
            try:
                shape = peers.single_shape(options.size, policy)
            except peers.Unavailable as error:
                found.append({**failed, "case": f"{policy.name} {size_name(options.size)}", "error": str(error)})
                continue
            (param,), (moments,) = peers.problem([shape], policy, device)
            assert param.grad is not None
            state = StateTensors.from_entries(moments, policy.amsgrad)
            for entry in options.entry or ENTRIES:
                made = calls(param.detach(), param.grad, state, entry, configurations(), noise_key(policy))
                samples = timing.device_ms(made, device, samples=options.samples, flush=flush)
                found += rows(policy, entry, options.size, samples)
            del param, moments, state, made
    return found


def add_options(parser: common.Parser) -> None:
    add = parser.add_argument
    add("--size", type=size, default=2**26, help="elements of the scratch tensor, like 2^26")
    add("--dtype", action="append", choices=POLICIES_BY_NAME, help="storage policy; may be repeated; without it all")
    add("--entry", action="append", choices=ENTRIES, help="kernel; may be repeated; without it both")
    add("--samples", type=common.positive_int, default=30, help="of each configuration")
    add("--device", type=common.device, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")


def main(argv: list[str]) -> int:
    parser = common.Parser("tune", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    found = measure(options)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(records.table(f"Configurations on {common.device_name(options.device)}", found, COLUMNS))
    if options.json:
        records.write(options.json, "tune", argv, options.device, found)
    return 0
