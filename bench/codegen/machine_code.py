"""What a launch compiles to, read from the disassembly; no GPU is needed.

A `Variant` is compiled by making its launch through `adamw_triton.launch` with two things replaced: Triton's
driver, by one that only names the target, and `kernel[grid](...)`, by `kernel.warmup(...)`, which stops after
the compilation. So block size, warps and specialisation are those of a real launch.

*Full-block path.* A kernel has an unmasked branch for full blocks and a masked one for the tail. Its
instructions are followed from the entry, along every branch, to every exit; a call is stepped over. The
full-block path stores exactly the bytes of a full block, elements of a thread × width for each tensor that is
written, and none of its accesses to global memory is predicated. Of several such paths it is one with the fewest
accesses (AMD masks by address, so the tail is no more predicated), and of these the longest.

*Instructions* are all that one thread executes on that path: prologue and exit included, predicated or not.

*Loads* on that path are of a tensor if the address depends on the index of the thread, and uniform if not: the
table, the scalars, factor and flag. On AMD the latter are scalar loads, which are not listed.

Calls, barriers, shared memory and spills are counted in the whole kernel, its tail included. Of the kernel that makes
the scalars, one lane of one program for each parameter, everything is.

`python -m bench.codegen.machine_code` reads variants and writes results, as one line of JSON each.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from adamw_triton import launch
from adamw_triton.grad_control import GradDecision, GradNormOptions, GradScalerInputs
from adamw_triton.hyperparams import KernelScalars
from adamw_triton.storage import Formats, NoiseKey, StateTensors
from adamw_triton.storage.policies import DTYPES

from .listing import (
    Instruction,
    Listing,
    full_block_path,
    parse_amdgcn,
    parse_sass,
    shortest_path,
    split_accesses,
)
from .variants import NORM, SCALARS, TARGETS, Variant

IN_A_ROW = 8  # consecutive elements of a thread, at most; of each it has a scale for every 8-bit moment
_NORM_TABLES = 4 + 4 + 8 + 8  # bytes of span, number, address and length


@dataclass(frozen=True)
class MachineCode:
    """One compiled kernel, counted as the module's docstring says."""

    threads: int
    elements: int  # per thread
    # on the full-block path
    instructions: int
    mufu: int  # special functions: reciprocal square roots
    loads: list[int]  # bytes of each access to a tensor
    stores: list[int]
    uniform_loads: list[int]
    # in the whole kernel
    calls: int
    barriers: int
    shared_accesses: int
    spills: int  # accesses to local memory; on AMD, spilled registers
    registers: int
    shared_bytes: int
    local_bytes: int  # stack included

    @property
    def instructions_per_element(self) -> float:
        return self.instructions / self.elements


@dataclass(frozen=True)
class Failure:
    reason: str


# Compilation


class Compiled(NamedTuple):
    kernel: Any  # triton.compiler.CompiledKernel
    block_size: int


class _Driver:
    """As much of a Triton driver as a compilation needs."""

    def __init__(self, target: str):
        self.target = target

    def get_current_device(self) -> str:
        return self.target  # a key of the kernels' caches, no more

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*TARGETS[self.target])


class _Warmup:
    """Stands in for a kernel: `kernel[grid](...)` compiles."""

    def __init__(self, kernel: Any, compiled: list[Compiled]):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def warmup(*args: Any, **options: Any) -> None:
            named = dict(zip(inspect.signature(self.kernel.fn).parameters, args, strict=False)) | options
            self.compiled.append(Compiled(self.kernel.warmup(*args, grid=grid, **options), named["BLOCK_SIZE"]))

        return warmup


@contextmanager
def driver_for(target: str) -> Iterator[None]:
    """Within it, Triton compiles for `target`."""
    from triton.runtime import driver

    try:
        active = driver.active
    except RuntimeError:  # no GPU
        active = None
    driver.set_active(_Driver(target))
    try:
        yield
    finally:
        driver.set_active(active)


@contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """Within it, `adamw_triton.launch` compiles for `target` and does not launch; yields what it compiled."""
    if launch.INTERPRETED:
        raise RuntimeError("triton was imported with TRITON_INTERPRET set, so that there is nothing to compile")
    compiled: list[Compiled] = []
    with (
        driver_for(target),
        mock.patch.object(launch, "adamw_kernel", _Warmup(launch.adamw_kernel, compiled)),
        mock.patch.object(launch, "adamw_table_kernel", _Warmup(launch.adamw_table_kernel, compiled)),
        mock.patch.object(launch, "grad_norm_kernel", _Warmup(launch.grad_norm_kernel, compiled)),
        mock.patch.object(launch, "scalars_kernel", _Warmup(launch.scalars_kernel, compiled)),
        mock.patch.object(launch, "NUM_WARPS", 128 // TARGETS[target][2]),  # launch has that of torch's build
    ):
        yield compiled


def compile_variant(variant: Variant) -> Compiled:
    param, grad, exp_avg, exp_avg_sq = (DTYPES[name] for name in variant.dtypes)
    scalars_dtype = torch.float64 if param == torch.float64 else torch.float32
    scalars = torch.zeros(1, len(KernelScalars._fields), dtype=scalars_dtype)
    options: dict[str, Any] = {
        "maximize": variant.maximize,
        "cautious": variant.cautious,
        "decision": torch.zeros(3, dtype=torch.float64) if variant.control else None,
        "statistics": launch.statistics_like(1, torch.device("cpu")) if variant.statistics else None,
    }

    def tensor(dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(16, dtype=dtype)[0 if variant.aligned else 1 :]

    master = None if variant.master is None else DTYPES[variant.master]
    noise_key = NoiseKey(1, 0, *((8, 64, 256) if variant.part else ())) if variant.stochastic else None

    int64, int32 = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int32)
    decision = GradDecision(torch.device("cpu")) if variant.control else None
    scaler = GradScalerInputs(torch.ones(1), torch.zeros(1)) if variant.scaler else GradScalerInputs()

    with compiling(variant.target) as compiled:
        if variant.kernel == NORM:
            norm_table = launch.NormTable(int64, int32, first=0, dtype=grad, aligned=variant.aligned)
            partials = torch.zeros(2, dtype=torch.float64)
            launch.launch_norms(
                [norm_table], int64, partials, int32, decision, scaler, GradNormOptions(max_grad_norm=1.0)
            )
        elif variant.kernel == SCALARS:
            lines, single = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, len(KernelScalars._fields))
            double = scalars if param == torch.float64 else None
            launch.launch_scalars(
                lines, int64, int64, single, double, decision, scaler, decided=variant.control and not variant.scaler
            )
        elif variant.kernel == "table":
            formats = Formats(param, grad, exp_avg, exp_avg_sq, master, variant.stochastic)
            table = launch.Table(
                tensors=torch.zeros(1, 4, dtype=torch.int64),
                chunks=torch.zeros(1, 2, dtype=torch.int32),
                formats=formats,
                amsgrad=variant.amsgrad,
                aligned=variant.aligned,
                rounding=launch.rounding_of(None if noise_key is None else [noise_key]),
                seed=1,
                configuration=launch.configuration_of(*formats.dtypes),
            )
            launch.launch_table(table, int64, scalars, **options)
        else:
            state = StateTensors(
                tensor(exp_avg),
                tensor(exp_avg_sq),
                tensor(exp_avg_sq) if variant.amsgrad else None,
                None if master is None else tensor(master),
                tensor(torch.float32) if exp_avg == torch.int8 else None,
                tensor(torch.float32) if exp_avg_sq == torch.uint8 else None,
            )
            launch.launch_tensor(tensor(param), tensor(grad), state, scalars, noise_key=noise_key, **options)
    return compiled[0]


# Disassembly


def analyse(
    listing: Listing, *, threads: int, elements: int, stored_bytes: int, by_one: Sequence[int] = (), **resources: int
) -> MachineCode:
    """Count in a listing.

    Args:
        stored_bytes: per thread of a full block.
        by_one: bytes of what one thread of several stores on top.
        resources: `registers`, `shared_bytes`, `local_bytes`, `spills`.
    """
    path = full_block_path(listing, stored_bytes, by_one)
    return _counted(listing, path, threads=threads, elements=elements, **resources)


def _counted(
    listing: Listing, path: list[Instruction], *, threads: int, elements: int, **resources: int
) -> MachineCode:
    tensor, uniform = split_accesses(path)

    def count(instructions: list[Instruction], pattern: str) -> int:
        return sum(re.match(pattern, i.op) is not None for i in instructions)

    return MachineCode(
        threads=threads,
        elements=elements,
        instructions=len(path),
        mufu=count(path, r"MUFU|v_(rsq|rcp|sqrt|exp|log)_"),
        loads=[i.bytes for i in tensor if i.is_load],
        stores=[i.bytes for i in tensor if i.is_store],
        uniform_loads=[i.bytes for i in uniform],
        calls=count(listing.instructions, r"CALL|s_swappc|s_call"),
        barriers=count(listing.instructions, r"BAR\b|s_barrier"),
        shared_accesses=count(listing.instructions, r"LDS|STS|ATOMS|LDGSTS|ds_"),
        **resources,
    )


def examine(variant: Variant) -> MachineCode:
    """Compile and disassemble one variant, in this process."""
    kernel, block_size = compile_variant(variant)
    threads = kernel.metadata.num_warps * TARGETS[variant.target][2]
    if variant.kernel == NORM:
        return _examine_norm(kernel, threads, block_size * int(launch.SPAN_BLOCKS.value) // threads, variant)
    elements = block_size // threads
    listing, resources = disassemble(kernel)
    if variant.kernel == SCALARS:
        return _counted(listing, listing.instructions, threads=threads, elements=elements, **resources)
    stored_bytes = elements * sum(variant.written_widths)
    return analyse(
        listing,
        threads=threads,
        elements=elements,
        stored_bytes=stored_bytes,
        by_one=[4] * variant.scales * max(1, elements // IN_A_ROW) + [16] * variant.statistics,
        **resources,
    )


def _examine_norm(kernel: Any, threads: int, elements: int, variant: Variant) -> MachineCode:
    listing, resources = disassemble(kernel)
    # The shortest: a full span, whose squares neither under- nor overflow, of a program that is not the last to finish.
    path = shortest_path(listing, elements * DTYPES[variant.dtypes[1]].itemsize + _NORM_TABLES)
    return _counted(listing, path, threads=threads, elements=elements, **resources)


def disassemble(kernel: Any) -> tuple[Listing, dict[str, int]]:
    """Listing of a compiled Triton kernel, and `registers`, `shared_bytes`, `local_bytes` and `spills`."""
    return _amd(kernel.asm["amdgcn"]) if "amdgcn" in kernel.asm else _nvidia(kernel.asm["cubin"])


def _nvidia(cubin: bytes) -> tuple[Listing, dict[str, int]]:
    import triton

    def run(tool: str, *options: str) -> str:
        program = Path(triton.__file__).parent / "backends/nvidia/bin" / tool  # part of Triton's wheels
        return subprocess.run([program, *options, file.name], capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = parse_sass(run("nvdisasm", "-c", "-ndf"))
        usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", run("cuobjdump", "-res-usage")))
    return listing, {
        "registers": int(usage["REG"]),
        "shared_bytes": int(usage["SHARED"]),
        "local_bytes": int(usage["LOCAL"]) + int(usage["STACK"]),
        "spills": sum(i.op.startswith(("LDL", "STL")) for i in listing.instructions),
    }


def _amd(assembly: str) -> tuple[Listing, dict[str, int]]:
    usage = {name: int(value) for name, value in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    return parse_amdgcn(assembly), {
        "registers": usage["vgpr_count"],
        "shared_bytes": usage["group_segment_fixed_size"],
        "local_bytes": usage["private_segment_fixed_size"],
        "spills": usage["vgpr_spill_count"] + usage["sgpr_spill_count"],
    }


# Many at once


class Examiners:
    """Processes, one for each CPU, in which kernels compile even if this one interprets them."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "bench.codegen.machine_code"]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        self._processes = [
            subprocess.Popen(
                command,
                cwd=Path(__file__).parents[2],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(os.cpu_count() or 1)
        ]

    def close(self) -> None:
        for process in self._processes:
            process.communicate()  # the end of its input is that of the process

    def examine_all(self, variants: Sequence[Variant]) -> list[MachineCode | Failure]:
        count = len(self._processes)
        with ThreadPoolExecutor(count) as pool:
            shares = pool.map(self._examine, self._processes, (variants[i::count] for i in range(count)))
            results = [iter(share) for share in shares]
        return [next(results[i % count]) for i in range(len(variants))]

    def _examine(self, process: subprocess.Popen[str], variants: Sequence[Variant]) -> list[MachineCode | Failure]:
        return [self._examine_one(process, variant) for variant in variants]

    def _examine_one(self, process: subprocess.Popen[str], variant: Variant) -> MachineCode | Failure:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(asdict(variant)) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the process that examines kernels ended at {variant}; what it printed is above")
        fields = json.loads(line)
        return Failure(**fields) if "reason" in fields else MachineCode(**fields)


def examine_all(variants: Sequence[Variant]) -> list[MachineCode | Failure]:
    """Examine in new processes."""
    with closing(Examiners()) as examiners:
        return examiners.examine_all(variants)


def main() -> None:
    for line in sys.stdin:
        fields = json.loads(line)
        result: MachineCode | Failure
        try:
            result = examine(Variant(**fields | {"dtypes": tuple(fields["dtypes"])}))
        except Exception:
            result = Failure(traceback.format_exc(limit=0))
        print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()
