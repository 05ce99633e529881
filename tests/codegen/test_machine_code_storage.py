"""What the storage policies compile to: machine code without a GPU, as in test_machine_code.py."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import compiled_or_skipped

from bench.codegen.machine_code import examine_all
from bench.codegen.variants import KERNELS, TARGETS, Variant
from bench.policies import BY_NAME, POLICIES

TRITON_VERSION = tuple(map(int, pytest.importorskip("triton").__version__.split(".")[:2]))

# Per element on each of TARGETS, measured: the kernel for one tensor, by the worse of Triton 3.7.1 and 3.9.0.
INSTRUCTIONS = {
    "fp32-8bit": (60.2, 63.2, 50.8, 74.0),
    "bf16-master32": (44.0, 46.2, 42.8, 48.8),
    "bf16-master32-bf16": (43.9, 44.6, 37.0, 52.8),
    "bf16-master24-8bit": (60.0, 60.5, 49.9, 60.8),
    "bf16-stochastic": (53.6, 54.6, 47.5, 51.9),
    "fp16-master32": (37.2, 39.0, 33.8, 40.2),
}
SLACK = 1
TABLE = {"sm_80": 20, "sm_90": 20, "sm_100": 20, "gfx942": 48}  # more of a thread of the table kernel
CODED = [policy for policy in POLICIES if not policy.is_plain]
CASES = [(policy, kernel, target) for policy in CODED for kernel in KERNELS for target in TARGETS]
SR_24 = replace(Variant.of("sm_90", "tensor", BY_NAME["bf16-master24-8bit"]), stochastic=True)
PLAIN = [Variant.of("sm_90", kernel, BY_NAME["bf16"]) for kernel in KERNELS]
VARIANTS = [*(Variant.of(target, kernel, policy) for policy, kernel, target in CASES), SR_24, *PLAIN]


@pytest.fixture(scope="module")
def results():
    return dict(zip(VARIANTS, examine_all(VARIANTS), strict=True))


@pytest.fixture
def machine_code(results):
    return lambda variant: compiled_or_skipped(variant, results[variant])


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].name}-{case[1]}-{case[2]}")
def case(request, machine_code):
    policy, kernel, target = request.param
    return policy, kernel, target, machine_code(Variant.of(target, kernel, policy))


def test_no_calls_and_no_spills(case):
    policy, _, target, code = case
    assert code.calls == code.spills == code.local_bytes == 0
    assert code.registers <= (64 if target.startswith("sm_") else 80)  # AMD has twice as many
    if policy.exp_avg.is_floating_point:
        # Only the scales of 8-bit moments go from the threads that reduce them to those that store them.
        assert code.barriers == code.shared_bytes == code.shared_accesses == 0


def test_each_byte_moves_once_in_wide_accesses(case):
    policy, kernel, target, code = case
    variant = Variant.of(target, kernel, policy)
    for accesses, widths in ((code.loads, variant.read_widths), (code.stores, variant.written_widths)):
        expected = Counter([4] * variant.scales)
        for width in widths:  # as many bytes as a thread's elements take, up to 128 bits at a time
            of_thread = width * code.elements
            expected[min(of_thread, 16)] += max(of_thread // 16, 1)
        assert Counter(accesses) == expected
    if max(variant.read_widths) == 2:
        assert code.elements == 8, "128 bits of what has 16, 64 of what has 8"


def test_instructions_per_element(case):
    policy, kernel, target, code = case
    special = code.mufu / code.elements
    assert special <= (4.5 if policy.exp_avg.itemsize == 1 else 2)
    if TRITON_VERSION >= (3, 7):
        bound = INSTRUCTIONS[policy.name][list(TARGETS).index(target)] + SLACK
        bound += TABLE[target] / code.elements if kernel == "table" else 0
        assert code.instructions_per_element <= bound


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_smallest_policy_is_bound_by_memory(kernel, machine_code):
    code = machine_code(Variant.of("sm_90", kernel, BY_NAME["bf16-master24-8bit"]))
    assert code.instructions_per_element <= 64 and code.mufu / code.elements <= 4.5


def test_stochastic_rounding_costs_at_most_16_instructions(machine_code):
    for kernel, plain in zip(KERNELS, PLAIN, strict=True):
        rounded = machine_code(Variant.of("sm_90", kernel, BY_NAME["bf16-stochastic"]))
        assert rounded.instructions_per_element - machine_code(plain).instructions_per_element <= 16
    smallest = machine_code(replace(SR_24, stochastic=False))
    assert machine_code(SR_24).instructions_per_element - smallest.instructions_per_element <= 16


# Run where kernels are not interpreted. Compiled kernels are distinct objects if their specialisations differ.
LAUNCHES = """
import torch
from adamw_triton import launch
from adamw_triton.scalars import Scalars
from adamw_triton.storage import Rounding, Storage, TensorState
from bench.codegen.machine_code import compiling

def state(n):
    codes = [torch.zeros(n, dtype=dtype) for dtype in (torch.int8, torch.uint8, torch.int8)]
    return TensorState(codes[0], codes[1], None, codes[2], torch.zeros(-(-n // 128)), torch.zeros(-(-n // 128)))

with compiling("sm_90") as compiled:
    numbers = ((0, 0, 0, 16), (1, 1, 8, 128), (16, 16, 1024, 1000), (2**62 + 1, 2**31 - 1, 2**40, 4096))
    for seed, stream, offset, n in numbers:
        param = torch.zeros(n, dtype=torch.bfloat16)
        scalars = Scalars(*[float(seed)] * 8)
        launch.launch_tensor(param, param, state(n), scalars, maximize=False, rounding=Rounding(seed, stream, offset))
tensors = len({id(one.kernel) for one in compiled})
with compiling("sm_90") as compiled:
    for seed in (0, 1, 16, 2**62 + 1):
        param = torch.zeros(64, dtype=torch.bfloat16)
        table = launch.Table.of([param], [param], [state(64)], aligned=True, roundings=[Rounding(seed, seed % 7)])
        launch.launch_table(table, Scalars(*[float(seed)] * 8), maximize=False)
print(tensors, len({id(one.kernel) for one in compiled}))
"""


def test_no_seed_stream_offset_or_size_recompiles():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", LAUNCHES], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["1", "1"], ran.stderr
