"""One optimizer step on the parameter lists of real models, ours and every peer's."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from adamw_triton.storage.policies import BY_NAME as POLICIES_BY_NAME
from adamw_triton.storage.policies import Policy

from . import common, features, peers, records, shapes, timing
from .records import Record

DESCRIPTION = """\
One optimizer step on the parameter lists of real models. wall: from an idle device to an idle device, L2 flushed
before. host: until step() returns, a few steps at a time. kernels: GPU time of the kernels of a step, and how many
there are, by torch.profiler, without a flush. added: what a step allocates at its peak. All providers step the same
parameters and gradients, in turns; median and 20th and 80th percentile. Lists that do not fit in memory are divided
like shards, by "scale". Without a GPU only the models that are named are measured. --with measures, next to torch
fused with passes of its own, the step with clipping, GradScaler or a CUDA graph around it, and backward pass, step
and zero_grad with gradient release."""

FREE_SHARE = 0.85  # of the free memory that tensors may take; the rest is for the allocator and the flush
MANY_TENSORS = 1000  # above this the profiler sees one step instead of three: its events take seconds to read

# The gate: after STEPS steps with a rate that moves weights by about 3/10, they may be apart by so much of
# (1 + |weight|): one rounding of the parameter for each step and one for what else is stored in that dtype.
GATE_SHAPES = [(33, 65), (1024,), (7,), (4096, 3)]
GATE_STEPS = 3
GATE_HYPER: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 6 * 2.0**-11,
    torch.bfloat16: 6 * 2.0**-8,
    torch.int8: 0.03,  # 1/10 of what the weights move
    torch.uint8: 0.03,
}

COLUMNS = {
    "wall_ms": "wall, ms",
    "fused_over_this": "torch fused / this",
    "host_us": "host, µs",
    "kernel_ms": "kernels, ms",
    "launches": "launches",
    "gb_per_s": "GB/s",
    "added_bytes": "added, B",
    "scale": "scale",
}


def bytes_per_element(policy: Policy, chosen: Sequence[peers.Peer]) -> float:
    """Memory for parameters, gradients, shared moments, the state of all that do not share, and temporaries."""
    own = sum(peer.own_state(policy) for peer in chosen if peer.own_state)
    temporaries = 2 * policy.param.itemsize  # torch foreach: sqrt(v) and the denominator
    return policy.param.itemsize + policy.grad.itemsize + policy.state_bytes + own + temporaries


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def wrong(policy: Policy, peer: peers.Peer, device: torch.device) -> str | None:
    """In a sentence how far a peer is from torch's for-loop in float64 on a small list, if it is too far."""
    params, moments = peers.problem(GATE_SHAPES, policy, device)
    exact: list[Tensor] = []
    for param in params:
        assert param.grad is not None
        copy = param.detach().double().requires_grad_()
        copy.grad = param.grad.double()
        exact.append(copy)
    reference = torch.optim.AdamW(exact, **GATE_HYPER, amsgrad=policy.amsgrad, foreach=False)
    optimizer: Any = peer.factory(params, policy, moments)
    for group in optimizer.param_groups:
        group.update(GATE_HYPER)
    for _ in range(GATE_STEPS):
        reference.step()
        optimizer.step()
    tolerance = max(TOLERANCE[dtype] for dtype in policy.dtypes)
    pairs = zip(params, exact, strict=True)
    errors = [((p.detach().double() - e) / (1 + e.abs())).detach().abs().max() for p, e in pairs]
    worst = torch.stack(errors).max().item()
    if worst <= tolerance:
        return None
    return f"wrong result: {worst:.2g} from torch's float64, where {tolerance:.2g} is allowed"


def gate(found: list[Record], policy: Policy, peer: peers.Peer, device: torch.device) -> list[Record]:
    """The records, without the times of a provider whose results are wrong."""
    try:
        reason = wrong(policy, peer, device)
    except (RuntimeError, ValueError) as error:
        reason = f"wrong result: {error}"
    if reason is None:
        return found
    bad = {"policy": policy.name, "provider": peer.name}
    return [
        {**_record(row["model"], policy, peer), "error": reason} if bad.items() <= row.items() else row for row in found
    ]


def _record(name: str, policy: Policy, peer: peers.Peer) -> Record:
    return {
        "command": "models",
        "case": f"{name} {policy.name}",
        "provider": peer.name,
        "model": name,
        "policy": policy.name,
        "version": peer.version,
        "differs": peer.differs,
    }


def measure_list(
    name: str,
    listed: Sequence[tuple[int, ...]],
    scale: int,
    policy: Policy,
    chosen: Sequence[peers.Peer],
    options: argparse.Namespace,
    starter: peers.Starter,
) -> list[Record]:
    """One record for each provider on one list of shapes."""
    device: torch.device = options.device
    rows = {peer.name: _record(name, policy, peer) for peer in chosen}
    params, moments = peers.problem(listed, policy, device)
    steps, errors = starter.start(chosen, params, policy, moments)
    for provider, reason in errors.items():
        rows[provider]["error"] = reason
    time_all(rows, steps, listed, scale, policy, options)
    return list(rows.values())


def time_all(
    rows: dict[str, Record],
    steps: dict[str, timing.Call],
    listed: Sequence[tuple[int, ...]],
    scale: int,
    policy: Policy,
    options: argparse.Namespace,
) -> None:
    """Add to the row of each provider what its calls take."""
    device: torch.device = options.device
    limits = {"samples": options.steps, "seconds": options.seconds}
    wall = timing.wall_ms(steps, device, **limits)
    host = timing.host_us(steps, device, **limits)
    elements = shapes.elements(listed)
    for provider, step in steps.items():
        found: dict[str, Any] = {
            "tensors": len(listed),
            "elements": elements,
            "bytes_per_element": policy.bytes_per_element,
            "scale": scale,
            "wall_ms": records.spread(wall[provider]),
            "host_us": records.spread(host[provider]),
            **timing.kernels(step, device, steps=1 if len(listed) > MANY_TENSORS else 3),
            "added_bytes": timing.added_bytes(step, device),
        }
        if found["kernel_ms"] is not None:
            found["gb_per_s"] = elements * policy.bytes_per_element / found["kernel_ms"] / 1e6
        if peers.FUSED in wall:
            fused = records.spread(wall[peers.FUSED])["median"]
            found["fused_over_this"] = fused / found["wall_ms"]["median"]
        rows[provider].update({key: value for key, value in found.items() if value is not None})


def measure_features(name: str, names: Sequence[str], policy: Policy, options: argparse.Namespace) -> list[Record]:
    """The step with what is around it: ours has that in the step, torch's in passes of its own."""
    label = "+".join(names)

    def row(provider: str) -> Record:
        record = _record(name, policy, peers.BY_NAME.get(provider, peers.BY_NAME[peers.OURS]))
        return {
            **record,
            "case": f"{name} {policy.name} {label}",
            "provider": provider,
            "features": label,
            "differs": "",
        }

    try:
        # What no policy has on top, and gradients that torch's passes double for a moment.
        room = int(FREE_SHARE * free_bytes(options.device) / (bytes_per_element(policy, []) + 8))
        listed, scale = shapes.scaled(shapes.shapes(name), min(room, options.max_elements))
        params, moments = peers.problem(listed, policy, options.device)
        calls, errors = features.start_all(names, params, policy, moments, options.device)
        rows = {provider: row(provider) for provider in [*calls, *errors]}
        for provider, reason in errors.items():
            rows[provider]["error"] = reason
        if calls:
            time_all(rows, calls, listed, scale, policy, options)
        found = list(rows.values())
    except (RuntimeError, ValueError, peers.Unavailable) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        found = [{**row(provider), "error": lines[0]} for provider in (peers.OURS, peers.FUSED)]
    gc.collect()
    return found


def measure_model(
    name: str, policy: Policy, chosen: Sequence[peers.Peer], options: argparse.Namespace, starter: peers.Starter
) -> list[Record]:
    """The same for a model, divided until it fits; what goes wrong as a whole is the error of every row."""
    room = int(FREE_SHARE * free_bytes(options.device) / bytes_per_element(policy, chosen))
    try:
        listed, scale = shapes.scaled(shapes.shapes(name), min(room, options.max_elements))
        found = measure_list(name, listed, scale, policy, chosen, options, starter)
    except (RuntimeError, ValueError, peers.Unavailable) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        found = [{**_record(name, policy, peer), "error": reason[0]} for peer in chosen]
    gc.collect()  # optimizers and their compiled steps refer to each other
    return found


def measure(options: argparse.Namespace) -> list[Record]:
    device: torch.device = options.device
    chosen = [peer for peer in peers.PEERS if not options.peer or peer.name in options.peer]
    policies = [POLICIES_BY_NAME[name] for name in options.dtype or ["fp32"]]
    found: list[Record] = []
    if device.type != "cuda" and not options.model:
        reason = "no GPU; name models with --model to measure them on the CPU"
        for policy in policies:
            for name in shapes.MODELS:
                found += [{**_record(name, policy, peer), "error": reason} for peer in chosen]
        return found

    starter = peers.Starter(options.compile_seconds)
    for policy in policies:
        for name in options.model or shapes.MODELS:
            found += measure_model(name, policy, chosen, options, starter)
            for names in getattr(options, "with"):
                found += measure_features(name, names, policy, options)
    for policy in policies:
        for peer in chosen:
            if peer.package == "adamw-triton":
                found = gate(found, policy, peer, device)
    return found


def add_options(parser: common.Parser) -> None:
    add = parser.add_argument
    add("--model", action="append", choices=shapes.MODELS, help="may be repeated; without it, all on a GPU")
    add("--peer", action="append", choices=peers.BY_NAME, help="may be repeated; without it, all")
    add("--dtype", action="append", choices=POLICIES_BY_NAME, help="storage policy; may be repeated; without it fp32")
    add(
        "--with",
        type=features.combinations,
        default=[],
        help="also with what is around the step, one after the other: clip,amp,graph,release; clip+amp is both at once",
    )
    add("--steps", type=common.positive_int, default=50, help="samples of each provider and quantity")
    add("--seconds", type=common.non_negative_float, default=0.5, help="of samples of one, at least 3 samples")
    add(
        "--compile-seconds",
        type=common.non_negative_float,
        default=120.0,
        help="after that, peers that compile are left out",
    )
    add("--max-elements", type=common.positive_int, default=2**40, help="divide longer lists, whatever fits")
    add("--device", type=common.device, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")


def main(argv: list[str]) -> int:
    parser = common.Parser("models", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    found = measure(options)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(records.table(f"Optimizer steps on {common.device_name(options.device)}", found, COLUMNS))
    for name, differs in {row["provider"]: row["differs"] for row in found if row["differs"]}.items():
        console.print(f"{name}: {differs}")
    if options.json:
        records.write(options.json, "models", argv, options.device, found)
    return 1 if any(row.get("error", "").startswith("wrong result") for row in found) else 0
