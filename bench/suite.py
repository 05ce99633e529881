"""All measurements that this machine can make, into one JSON."""

from __future__ import annotations

import re
import time
from pathlib import Path

import torch
from rich.console import Console

from . import common, module_of, records
from .records import Record

COMMANDS = ("static", "arithmetic", "host", "dist", "cpu", "throughput", "models")
# Of a command, measured after its default options.
MORE = {
    "static": [["--features"]],
    "models": [
        f"--model {model} --dtype {policy} --peer adamw_triton --with clip,amp,graph,release,clip+graph".split()
        for model in ("resnet-50", "llama-3.2-1b")
        for policy in ("fp32", "bf16")
    ],
}
NEEDS_GPU = ("throughput", "models")
DESCRIPTION = """\
Run static, arithmetic, host, dist, cpu, throughput and models with their default options, and models with what is
around the step, and write one JSON, by default bench/results/<device>/suite.json. Takes about 11 minutes with a GPU and
6 without one, where throughput and models are marked as not measured."""


def folder_of(device: torch.device) -> Path:
    name = common.device_name(device)
    return Path(__file__).parent / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def measure(command: str, device: torch.device, console: Console) -> list[Record]:
    if command in NEEDS_GPU and device.type != "cuda":
        return [{"command": command, "case": "all", "provider": "all", "error": "not measured: no GPU"}]
    module = module_of(command)
    parser = common.Parser(command, "")
    module.add_options(parser)
    start = time.perf_counter()
    found: list[Record] = []
    for argv in [[], *MORE.get(command, [])]:
        found += module.measure(parser.parse(argv))
    console.print(f"{command}: {len(found)} records in {time.perf_counter() - start:.0f} s")
    return found


def main(argv: list[str]) -> int:
    parser = common.Parser("suite", DESCRIPTION)
    parser.add_argument("--output", type=common.json_file, help="the JSON file, if another")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="some of the commands")
    options = parser.parse(argv)
    device = common.device("auto")
    path = options.output or folder_of(device) / "suite.json"
    console = Console()
    found: list[Record] = []
    for command in options.only:
        found += measure(command, device, console)
        records.write(path, "suite", argv, device, found)  # what there is so far, should the next one not end
    console.print(f"{path}; draw it with: python -m bench plot {path}")
    return 0
