"""The kernels' machine code for GPUs that need not be here: access widths, spills, instructions, recompiles."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from machine_code_checks import (
    IS_COUNTED_VERSION,
    assert_each_byte_once,
    assert_nothing_but_global_memory,
    assert_wide,
    targets_and_kernels,
)
from pairwise import pairwise

from bench.codegen.variants import KERNELS, TARGETS, Variant

# Instructions per element that an H200 has time for while it moves 12 bytes, the least that is planned.
LIMIT = 75
# Per element on each of TARGETS, measured: the kernel for one tensor, by Triton 3.7.1.
INSTRUCTIONS = {
    "fp32": (32.8, 33.3, 28.3, 30.5),
    "bf16": (39.4, 40.2, 32.9, 50.8),
    "fp16": (37.9, 38.2, 30.9, 37.5),
    "bf16 p, g": (40.5, 41.3, 36.3, 44.5),
    "bf16 g": (38.8, 39.8, 34.8, 38.0),
    "bf16 m, v": (41.0, 41.8, 34.8, 50.3),
    "amsgrad": (35.0, 35.7, 31.2, 34.9),
    "maximize": (32.8, 33.3, 28.3, 31.5),
    "control": (35.4, 35.3, 29.8, 31.8),
    "unaligned": (39.2, 39.7, 32.0, 43.9),
}
SLACK = 2
# What a thread of the table kernel executes more, for its 7 or 8 loads.
TABLE = {"sm_80": 22, "sm_90": 21, "sm_100": 21, "gfx942": 30}
# Per element of the table kernel on sm_90, by number of fp16 tensors; of 1 to 3 a thread has half the elements.
MIXES = {1: 45.0, 2: 46.0, 3: 48.0, 4: 40.8}
BF16 = 0.5  # more for each tensor that is bf16

FP32 = ("fp32",) * 4
POLICIES = {
    "fp32": {"dtypes": FP32},
    "bf16": {"dtypes": ("bf16",) * 4},
    "fp16": {"dtypes": ("fp16",) * 4},
    "fp64": {"dtypes": ("fp64",) * 4},
    "bf16 p, g": {"dtypes": ("bf16", "bf16", "fp32", "fp32")},
    "bf16 g": {"dtypes": ("fp32", "bf16", "fp32", "fp32")},
    "bf16 m, v": {"dtypes": ("fp32", "fp32", "bf16", "bf16")},
    "amsgrad": {"dtypes": FP32, "amsgrad": True},
    "maximize": {"dtypes": FP32, "maximize": True},
    "control": {"dtypes": FP32, "control": True},
    "unaligned": {"dtypes": FP32, "aligned": False},
}
NAMES = {Variant(*tk, **POLICIES[name]): name for i, name in enumerate(POLICIES) for tk in targets_and_kernels(i)}
VARIANTS = {target: [variant for variant in NAMES if variant.target == target] for target in TARGETS}
VARIANTS["mixes"] = [
    Variant("sm_90", "table", tuple(dtypes.values()))
    for dtypes in pairwise(dict.fromkeys(("param", "grad", "m", "v"), ("fp32", "bf16", "fp16")), lambda **case: True)
]
for_each_group = pytest.mark.parametrize("variants", VARIANTS.values(), ids=VARIANTS)


# What holds for each compiled kernel


@for_each_group
def test_no_spill_call_barrier_or_shared_memory(variants, for_each):
    # ptxas makes subroutines of the slow paths of float64's square root and division, which IEEE 754 wants.
    for_each(variants, lambda variant, code: assert_nothing_but_global_memory(code, "fp64" in variant.dtypes))


@for_each_group
def test_registers_leave_room_for_1024_threads_per_multiprocessor(variants, for_each):
    # As launch.configuration_of counts on.
    def check(variant, code):
        assert code.registers <= 64

    for_each(variants, check)


@for_each_group
def test_full_blocks_move_each_byte_once_in_wide_accesses(variants, for_each):
    def check(variant, code):
        assert_each_byte_once(variant, code)
        if variant.aligned:
            assert_wide(variant, code)

    for_each(variants, check)


def most_instructions(variant, code):
    if not IS_COUNTED_VERSION:
        return LIMIT
    if variant in NAMES:
        most = INSTRUCTIONS[NAMES[variant]][list(TARGETS).index(variant.target)]
        most += TABLE[variant.target] / code.elements if variant.kernel == "table" else 0
    else:
        counts = Counter(variant.dtypes)
        most = MIXES[counts["fp16"] + counts["bf16"]] + BF16 * counts["bf16"]
    return most + SLACK


@for_each_group
def test_instructions_per_element(variants, for_each):
    def check(variant, code):
        assert code.instructions_per_element <= most_instructions(variant, code)
        # One reciprocal square root for the square root, one for the division.
        assert code.mufu == 2 * code.elements

    for_each([variant for variant in variants if "fp64" not in variant.dtypes], check)


@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_what_is_the_same_for_all_threads_is_loaded_once_and_only_if_it_is_there(target, examined):
    for kernel in KERNELS:
        plain, double = Variant(target, kernel, FP32), Variant(target, kernel, ("fp64",) * 4)
        features = {name: replace(plain, **{name: True}) for name in ("control", "amsgrad")}
        codes = examined([plain, double, *features.values()])
        # chunk; n_elements and 4 addresses
        table = [4] * 2 + [8] * 5 if kernel == "table" else []
        scalars = 7  # the eighth is the number of the step, for stochastic rounding
        assert sorted(codes[plain].uniform_loads) == sorted([4] * scalars + table)
        assert sorted(codes[double].uniform_loads) == sorted([8] * scalars + table)
        assert sorted(codes[features["control"]].uniform_loads) == sorted([8, 8, *[4] * scalars, *table])
        for variant in features.values():
            assert codes[variant].instructions > codes[plain].instructions


# Recompiles


# Run where kernels are not interpreted. Compiled kernels are distinct objects if their specialisations differ.
LAUNCHES = """
import json
from unittest import mock

import torch

from adamw_triton import AdamW, adamw_, launch
from adamw_triton.grad_control import GradDecision, GradNormOptions, GradScalerInputs
from adamw_triton.storage import Formats, StateTensors
from bench.codegen.machine_code import compiling

HYPER = ((1e-3, (0.9, 0.999), 1e-8, 0.01), (1, (0, 0), 1, 1), (0, (0.5, 0.0), 0, 16))
long = {"dtype": torch.int64}
# number of tensors, param groups, and parameters in front of them
TABLES = ((1, 1, 0), (2, 3, 1), (16, 2, 2), (17, 1, 15), (128, 16, 16), (1000, 1, 129))

def tensor(size=3, offset=0, row=0):
    tensors = [torch.zeros(64)[offset : offset + 1].expand(size) for _ in range(4)]
    scalars = torch.zeros(row + 1, 8)[row]
    launch.launch_tensor(*tensors[:2], StateTensors(*tensors[2:]), scalars, maximize=False)

def words(size, groups, first):
    made = torch.zeros(10 * groups + first + size, **long)
    return made[: 10 * groups], made[10 * groups :]

def table(size, groups, first):
    formats = Formats(*(torch.float32,) * 4)
    tables = torch.zeros(size, 4, **long), torch.zeros(size, 2, dtype=torch.int32)
    table = launch.Table(*tables, formats, False, True, "nearest", 0, launch.configuration_of(*formats.dtypes))
    scalars = torch.zeros(first + size, 8)[first:]
    launch.launch_table(table, words(size, groups, first)[1][first:], scalars, maximize=False)

def count(size, groups, first):
    hyperparams, grads = words(size, groups, first)
    params, scalars = torch.zeros(first + size, 2, **long), torch.zeros(first + size, 8)
    launch.launch_scalars(params, grads, hyperparams, scalars, None, None, GradScalerInputs(), decided=False)

def norm(size, groups, first):
    grads = words(size, groups, first)[1]
    numels = torch.full((first + size,), 4096 * size, **long)
    members = list(range(first, first + size))
    norm_table = launch.NormTable.of(numels, members, first=first, dtype=torch.float32, aligned=True)
    partials = torch.zeros(first + size + 1, dtype=torch.float64)
    options = GradNormOptions(max_grad_norm=float(size))
    decision = GradDecision(torch.device("cpu"))
    finished = torch.zeros(1, dtype=torch.int32)
    launch.launch_norms([norm_table], grads, partials, finished, decision, GradScalerInputs(), options)

def step(size, groups, first):
    formats = [torch.bfloat16] * first + [torch.float32] * size
    params = [torch.nn.Parameter(torch.zeros(5, dtype=dtype)) for dtype in formats]
    optimizer = AdamW([{"params": params[i::groups]} for i in range(min(groups, len(params)))], foreach=True)
    for number in range(2):
        for i, param in enumerate(params):
            param.grad = torch.zeros_like(param) if i % 2 or not number else None
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5

with compiling("sm_90") as aligned:
    for size in (1, 15, 16, 17, 1024, 2**31 - 1, 2**31 + 5):
        tensor(size)
    for offset in (4, 8, 16):
        tensor(offset=offset)
    for row in (1, 2, 3):
        tensor(row=row)
    with mock.patch.object(launch, "has_kernels", lambda device: True):
        for number in (1, 2, 16, 1000):
            for lr, betas, eps, decay in HYPER:
                tensors = [torch.zeros(3) for _ in range(4)]
                adamw_(*tensors, step=number, lr=lr, betas=betas, eps=eps, weight_decay=decay)
found = {"tensor": aligned}
with compiling("sm_90") as found["unaligned"]:
    for offset in (1, 2, 3, 5):
        tensor(offset=offset)
for launched in (table, count, norm, step):
    with compiling("sm_90") as found[launched.__name__], mock.patch.object(launch, "has_kernels", lambda device: True):
        for sizes in TABLES:
            launched(*sizes)
for name, compiled in found.items():
    kernel = compiled[0].kernel
    distinct = len({id(kernel) for kernel, _ in compiled})
    print(json.dumps([name, len(compiled), distinct, dict(kernel.src.signature)]))
"""


@pytest.fixture(scope="module")
def launches():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-c", LAUNCHES],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return {name: found for name, *found in map(json.loads, process.stdout.splitlines())}


def test_no_hyper_parameter_step_size_or_address_recompiles(launches):
    # All but whether tensors are aligned to 16 bytes. A step is a launch that counts, and one for each of two dtypes.
    counts = {name: (count, kernels) for name, (count, kernels, _) in launches.items()}
    assert counts == {
        "tensor": (25, 1), "unaligned": (4, 1), "table": (6, 1), "count": (6, 1), "norm": (6, 1), "step": (32, 3),
    }  # fmt: skip


def test_sizes_are_int64_and_what_is_absent_has_no_pointer(launches):
    for name in ("tensor", "unaligned", "table"):
        types = launches[name][2]
        assert types["scalars_ptr"] == "*fp32"
        assert {types[pointer] for pointer in ("control_ptr", "statistics_ptr")} == {"constexpr"}
    assert launches["tensor"][2]["n_elements"] == launches["unaligned"][2]["n_elements"] == "i64"


# The parser, on listings small enough to read
