"""`python -m bench static`: what the kernels compile to, and what follows for GPUs that need not be here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from adamw_triton.storage.policies import BY_NAME, DTYPES, POLICIES, Policy

from .. import common, records
from ..records import Record
from .devices import DEVICES, Device
from .machine_code import Failure, MachineCode, examine_all
from .variants import KERNELS, NORM, TARGETS, Variant

DESCRIPTION = """
What each storage policy and entry ("tensor": the kernel for one tensor, "table": for a table of tensors) compiles to;
no GPU is needed. Instructions and special functions (MUFU: reciprocal square roots) are all that one thread executes
on the path of a full block, from entry to exit, prologue included, predicated or not, over the elements of a thread;
access widths are of that path, registers, spills and shared memory of the whole kernel. Times per 1e9 parameters are
arithmetic, not measurements: the longest of bytes / nominal bandwidth, instructions / issue rate and special functions
/ their rate, at the rates and clocks of bench/codegen/devices.py. Budget: the instructions per element that the device
could issue while the bytes move. Scalars come from memory, tensors are aligned to 16 bytes, without maximize and AMP.
"""
PARAMETERS = 1e9
FEATURES = ("control", "statistics", "cautious")  # flags of variants.Variant
FEATURED = ("fp32", "bf16-param-grad", "bf16", "bf16-master24-8bit")  # the policies that they are compiled for
FEATURE_TARGETS = ("sm_90", "sm_100")
NORM_DTYPES = ("fp32", "bf16", "fp16")
WIDTH = 170  # of the tables, where there is no terminal


@dataclass(frozen=True)
class Prediction:
    """Milliseconds that each resource of a device needs for PARAMETERS elements."""

    memory: float
    issue: float
    special: float

    @classmethod
    def of(cls, device: Device, moved_bytes: float, instructions: float, special: float) -> Prediction:
        """Arguments are per element."""
        return cls(
            memory=1e3 * device.memory_seconds(moved_bytes * PARAMETERS),
            issue=1e3 * device.issue_seconds(instructions * PARAMETERS),
            special=1e3 * device.special_seconds(special * PARAMETERS),
        )

    @property
    def bound(self) -> str:
        return max(("memory", "issue", "special"), key=lambda name: getattr(self, name))

    @property
    def ms(self) -> float:
        return getattr(self, self.bound)


def record_of(target: str, policy: Policy, kernel: str, result: MachineCode | Failure) -> Record:
    record: Record = {
        "command": "static",
        "case": f"{policy.name} {kernel} {target}",
        "provider": "adamw_triton",
        "target": target,
        "policy": policy.name,
        "storage": policy.description,
        "kernel": kernel,
        "bytes_per_element": policy.bytes_per_element,
        "read_bytes": policy.read_bytes,
        "written_bytes": policy.written_bytes,
        "state_bytes": policy.state_bytes,
    }
    if isinstance(result, Failure):
        return record | {"error": _one_line(result.reason)}
    mufu = result.mufu / result.elements
    record |= {
        "registers": result.registers,
        "spills": result.spills,
        "local_bytes": result.local_bytes,
        "shared_bytes": result.shared_bytes,
        "calls": result.calls,
        "threads": result.threads,
        "elements_per_thread": result.elements,
        "access_bytes": ", ".join(map(str, sorted({*result.loads, *result.stores}))),
        "loads": len(result.loads),
        "stores": len(result.stores),
        "uniform_loads": len(result.uniform_loads),
        "instructions_per_element": result.instructions_per_element,
        "mufu_per_element": mufu,
    }
    for device in devices_of(target):
        moved = policy.bytes_per_element
        prediction = Prediction.of(device, moved, result.instructions_per_element, mufu)
        record |= {
            f"{device.key}_ms": prediction.ms,
            f"{device.key}_bound": prediction.bound,
            f"{device.key}_memory_ms": prediction.memory,
            f"{device.key}_issue_ms": prediction.issue,
            f"{device.key}_special_ms": prediction.special,
            f"{device.key}_instruction_budget": device.instruction_budget(moved),
        }
    return record


def measure_features(targets: Sequence[str]) -> list[Record]:
    """What each feature adds to the kernel of a table, and what the norm of the gradients takes."""
    found: list[Record] = []
    for target in targets:
        plain = [Variant.of(target, "table", BY_NAME[name]) for name in FEATURED]
        cases = [(variant, feature) for variant in plain for feature in ("", *FEATURES)]
        variants = [replace(variant, **_flags(feature)) for variant, feature in cases]
        norms = [Variant(target, NORM, (dtype,) * 4, control=True) for dtype in NORM_DTYPES]
        results = examine_all([*variants, *norms])
        without: dict[Variant, float] = {}
        for (variant, feature), result in zip(cases, results, strict=False):
            name = FEATURED[plain.index(variant)]
            record: Record = {
                "command": "static",
                "case": f"{name} table {target}" + (f" + {feature}" if feature else ""),
                "provider": "adamw_triton",
                "target": target,
                "policy": name,
                "kernel": "table",
                "feature": feature,
            }
            if isinstance(result, Failure):
                found.append(record | {"error": _one_line(result.reason)})
                continue
            instructions = result.instructions_per_element
            without.setdefault(variant, instructions)
            counts = {"instructions_per_element": instructions, "added_instructions": instructions - without[variant]}
            found.append(record | counts | {"registers": result.registers, "spills": result.spills})
        for variant, result in zip(norms, results[len(cases) :], strict=True):
            found.append(_norm_record(variant, result))
    return found


def _flags(feature: str) -> dict[str, Any]:
    return {feature: True} if feature else {}


def _norm_record(variant: Variant, result: MachineCode | Failure) -> Record:
    dtype = variant.dtypes[1]
    moved = DTYPES[dtype].itemsize
    record: Record = {
        "command": "static",
        "case": f"norm of {dtype} gradients {variant.target}",
        "provider": "adamw_triton",
        "target": variant.target,
        "kernel": NORM,
        "policy": dtype,
        "bytes_per_element": moved,
    }
    if isinstance(result, Failure):
        return record | {"error": _one_line(result.reason)}
    record |= {
        "instructions_per_element": result.instructions_per_element,
        "registers": result.registers,
        "spills": result.spills,
        "access_bytes": ", ".join(map(str, sorted(set(result.loads)))),
    }
    for device in devices_of(variant.target):
        record[f"{device.key}_instruction_budget"] = device.instruction_budget(moved)
    return record


def devices_of(target: str) -> list[Device]:
    return [device for device in DEVICES if device.target == target]


def _one_line(reason: str) -> str:
    lines = [line for line in reason.splitlines() if not line.startswith("Traceback")]
    return " ".join(" ".join(lines).split())[:300]


def add_options(parser: argparse.ArgumentParser) -> None:
    def repeatable(name: str, choices: Sequence[str], help: str) -> None:
        parser.add_argument(name, action="append", choices=choices, default=argparse.SUPPRESS, help=help)

    repeatable("--target", list(TARGETS), "architecture to compile for; repeatable (default: all)")
    repeatable("--policy", list(BY_NAME), "storage policy; repeatable (default: all)")
    help = f"instead: what each feature adds, and the norm of the gradients (default: {', '.join(FEATURE_TARGETS)})"
    parser.add_argument("--features", action="store_true", help=help)


def measure(options: argparse.Namespace) -> list[Record]:
    """Compile; a target or variant that cannot be compiled is a record with `error`."""
    found: list[Record] = []
    if getattr(options, "features", False):
        return measure_features(list(dict.fromkeys(getattr(options, "target", FEATURE_TARGETS))))
    for target in dict.fromkeys(getattr(options, "target", TARGETS)):
        names = dict.fromkeys(getattr(options, "policy", BY_NAME))
        cases = [(policy, kernel) for policy in POLICIES if policy.name in names for kernel in KERNELS]
        variants = [Variant.of(target, kernel, policy) for policy, kernel in cases]
        results: Sequence[MachineCode | Failure]
        try:
            results = examine_all(variants)
        except RuntimeError as error:  # a compiler took its process with it
            results = [Failure(str(error))] * len(variants)
        found += [record_of(target, *case, result) for case, result in zip(cases, results, strict=True)]
    return found


def show(console: Console, found: Sequence[Record]) -> None:
    """One table for each target."""
    for target in dict.fromkeys(record["target"] for record in found):
        columns = {
            "registers": "regs",
            "spills": "spills",
            "shared_bytes": "smem B",
            "access_bytes": "access B",
            "instructions_per_element": "instr/el",
            "added_instructions": "added",
            "mufu_per_element": "MUFU/el",
            "bytes_per_element": "B/el",
        }
        for device in devices_of(target):
            columns |= {
                f"{device.key}_ms": f"{device.name}\nms per 1e9",
                f"{device.key}_bound": "\nbound",
                f"{device.key}_instruction_budget": "budget\ninstr/el",
            }
        rows = [r | {"case": r["case"].removesuffix(f" {target}")} for r in found if r["target"] == target]
        console.print(records.table(target, rows, columns))


def main(argv: list[str]) -> int:
    parser = common.Parser("static", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    found = measure(options)
    show(Console(width=None if sys.stdout.isatty() else WIDTH), found)
    if options.json:
        records.write(options.json, "static", argv, torch.device("cpu"), found)
    return 0
