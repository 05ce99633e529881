"""Time of a step of parameters on the CPU, as offloading trainers take it."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import nn

from adamw_triton import AdamW, launch
from adamw_triton.storage.policies import BY_NAME, Policy, dtype_name

from . import common, records, shapes, timing
from .records import Record
from .shapes import Shape

CPU = torch.device("cpu")
LISTS = ("llama-3.2-1b", "resnet-50")  # few large tensors, many small ones
# What takes turns: storages of one dtype of parameters and gradients, on a list so many times smaller.
ROUNDS: list[tuple[torch.dtype, tuple[str, ...], int]] = [
    (torch.float32, ("fp32",), 1),
    (torch.bfloat16, ("bf16",), 1),
    (torch.float32, ("fp32-8bit", "fp32-8bit-stochastic"), 16),
    (torch.bfloat16, ("bf16-master32", "bf16-stochastic", "bf16-master24-8bit-stochastic"), 16),
]
TORCH: dict[str, dict[str, Any]] = {
    "torch fused": {"fused": True},
    "torch foreach": {"foreach": True},
    "torch for-loop": {"foreach": False},
}
FUSED = "torch fused"
BAR = 1.2  # times torch's fused step, for storage that torch has too
DESCRIPTION = f"""\
Time of step() on parameters on the CPU, as trainers take it that keep parameters and state there (FSDP2's
CPUOffloadPolicy and others). All threads, real arithmetic; ours are the eager operations, never Triton's interpreter.
The lists are those of models, divided as shards are until they have at most so many elements. For every storage of ours
torch's implementations step parameters of the same dtype, with moments of that dtype: that is all torch has, so that
only "fp32" and "bf16" are compared with a step that does the same. The other storages, which are much slower here, are
measured on lists of a sixteenth, torch's beside them. Providers of a list take turns, after one step of each that makes
the state; all share the gradients, which no step writes. Median and 20th and 80th percentile. The aim is at most {BAR}
times torch's fused step, for fp32."""


def problem(listed: Sequence[Shape], dtype: torch.dtype, grads: Sequence[torch.Tensor]) -> list[nn.Parameter]:
    """Parameters of ordinary size, with gradients that others may have too."""
    params = [nn.Parameter(torch.full(shape, 0.02, dtype=dtype)) for shape in listed]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def providers(listed: Sequence[Shape], dtype: torch.dtype, names: Sequence[str]) -> dict[str, timing.Call]:
    """Ours with every storage, and torch's, each on parameters of its own."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.empty(shape, dtype=dtype).normal_(std=1e-3, generator=generator) for shape in listed]
    new = partial(problem, listed, dtype, grads)
    made: dict[str, timing.Call] = {}
    for name in names:
        policy: Policy = BY_NAME[name]
        made[f"adamw_triton {name}"] = AdamW(new(), **policy.options).step
    for name, options in TORCH.items():
        made[name] = torch.optim.AdamW(new(), **options).step
    return made


def measure_list(
    name: str, dtype: torch.dtype, names: Sequence[str], elements: int, options: Namespace
) -> list[Record]:
    """One record for each provider of one parameter dtype on one list of at most so many elements."""
    listed, scale = shapes.scaled(shapes.shapes(name), elements)
    with mock.patch.object(launch, "has_kernels", lambda device: False):
        calls = providers(listed, dtype, names)
        samples = timing.wall_ms(calls, CPU, samples=options.samples, warmup=1, seconds=options.seconds)
    times = {provider: records.spread(taken) for provider, taken in samples.items()}
    return [
        {
            "command": "cpu",
            "case": f"{name}, {shapes.elements(listed):,} elements, {dtype_name(dtype)}",
            "provider": provider,
            "tensors": len(listed),
            "elements": shapes.elements(listed),
            "scale": scale,
            "threads": torch.get_num_threads(),
            "wall_ms": spread,
            "this_over_torch_fused": spread["median"] / times[FUSED]["median"],
        }
        for provider, spread in times.items()
    ]


def measure(options: Namespace) -> list[Record]:
    """All lists and parameter dtypes."""
    found: list[Record] = []
    for name in options.model:
        for dtype, names, smaller in ROUNDS:
            chosen = [policy for policy in names if policy in options.policy]
            if chosen:
                found += measure_list(name, dtype, chosen, options.elements // smaller, options)
                gc.collect()  # gigabytes, before the next ones
    return found


def add_options(parser: common.Parser) -> None:
    add = parser.add_argument
    policies = [name for _, names, _ in ROUNDS for name in names]
    add("--model", nargs="+", choices=shapes.MODELS, default=list(LISTS), help="whose list of parameters")
    add("--policy", nargs="+", choices=policies, default=policies, help="storages of ours")
    add("--elements", type=common.positive_int, default=2**26, help="at most so many elements in a list")
    add("--samples", type=common.positive_int, default=15, help="of each provider, if there is time for them")
    add("--seconds", type=common.non_negative_float, default=5.0, help="for each provider, at least 3 samples")


COLUMNS = {
    "tensors": "tensors",
    "wall_ms": "step(), ms",
    "this_over_torch_fused": "this / torch fused",
}


def main(argv: list[str]) -> int:
    parser = common.Parser("cpu", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    divided = max(smaller for _, _, smaller in ROUNDS)
    for name in options.model:
        least = divided * shapes.elements((1, *rest) for _, *rest in shapes.shapes(name))
        if options.elements < least:
            parser.error(f"got --elements {options.elements}; allowed: {least} or more, for one row of each of {name}")
    found = measure(options)
    console = Console()
    title = f"Step of parameters on the CPU, {torch.get_num_threads()} threads, on {common.device_name(CPU)}"
    console.print(records.table(title, found, COLUMNS))
    for record in found:
        if record["provider"] == "adamw_triton fp32":
            ratio = record["this_over_torch_fused"]
            reached = "reached" if ratio <= BAR else "not reached"
            console.print(f"{record['case']}: {ratio:.2f} times torch fused; at most {BAR} is aimed at: {reached}")
    if options.json:
        records.write(options.json, "cpu", argv, CPU, found)
    return 0
