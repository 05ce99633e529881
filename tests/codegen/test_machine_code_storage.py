"""What the storage policies compile to: machine code without a GPU, as in test_machine_code.py."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from machine_code_checks import IS_COUNTED_VERSION, targets_and_kernels

from adamw_triton.storage.policies import BY_NAME, POLICIES
from bench.codegen.machine_code import IN_A_ROW
from bench.codegen.variants import KERNELS, TARGETS, Variant

# Per element on each of TARGETS, measured: the kernel for one tensor, by Triton 3.7.1.
INSTRUCTIONS = {
    "fp32-8bit": (56.0, 59.5, 46.8, 64.5),
    "fp32-8bit-stochastic": (91.2, 92.8, 74.8, 104.8),
    "bf16-master32": (46.0, 47.0, 39.5, 48.8),
    "bf16-master32-bf16": (44.5, 45.1, 37.5, 49.4),
    "bf16-master24-8bit": (53.7, 54.1, 43.8, 51.6),
    "bf16-master24-8bit-stochastic": (78.9, 79.2, 63.4, 78.9),
    "bf16-stochastic": (54.4, 55.0, 47.4, 50.8),
    "fp16-master32": (46.0, 47.0, 40.0, 44.0),
}
SLACK = 1
TABLE = {"sm_80": 25, "sm_90": 22, "sm_100": 22, "gfx942": 38}  # more of a thread of the table kernel
POLICY_OF = {
    Variant.of(target, kernel, policy): policy
    for i, policy in enumerate(policy for policy in POLICIES if not policy.is_plain)
    for target, kernel in targets_and_kernels(i)
}
VARIANTS = {target: [variant for variant in POLICY_OF if variant.target == target] for target in TARGETS}
for_each_target = pytest.mark.parametrize("variants", VARIANTS.values(), ids=VARIANTS)


@for_each_target
def test_no_calls_and_no_spills(variants, for_each):
    def check(variant, code):
        assert code.calls == code.spills == code.local_bytes == 0
        # 128 of them, where a thread has 16 elements: 4 programs, with 112 bytes of each thread in flight, share an SM.
        most = 64 * max(1, code.elements // 8)
        assert code.registers <= (most if variant.target.startswith("sm_") else most + 16)  # AMD has twice as many
        assert code.barriers == code.shared_bytes == 0
        # AMD hands values over 32 lanes by an instruction of its shared memory, without using that.
        assert code.shared_accesses == 0 or (variant.target == "gfx942" and variant.scales)

    for_each(variants, check)


@for_each_target
def test_each_byte_moves_once_in_wide_accesses(variants, for_each):
    def check(variant, code):
        in_a_row = min(code.elements, IN_A_ROW)
        for accesses, widths in ((code.loads, variant.read_widths), (code.stores, variant.written_widths)):
            expected = Counter([4] * variant.scales)
            for width in widths:  # as many bytes as these elements take, up to 128 bits at a time
                expected[min(width * in_a_row, 16)] += max(width * in_a_row // 16, 1)
            pieces = code.elements // in_a_row
            assert Counter(accesses) == Counter({size: pieces * count for size, count in expected.items()})
        if max(variant.read_widths) == 2:
            assert in_a_row == IN_A_ROW, "128 bits of what has 16, 64 of what has 8"

    for_each(variants, check)


@for_each_target
def test_instructions_per_element(variants, for_each):
    def check(variant, code):
        assert code.mufu / code.elements <= (4.5 if variant.scales else 2)
        if IS_COUNTED_VERSION:
            most = INSTRUCTIONS[POLICY_OF[variant].name][list(TARGETS).index(variant.target)] + SLACK
            most += TABLE[variant.target] / code.elements if variant.kernel == "table" else 0
            assert code.instructions_per_element <= most

    for_each(variants, check)


@pytest.mark.fast
@pytest.mark.parametrize(("name", "most"), [("bf16-master24-8bit", 56), ("bf16-master24-8bit-stochastic", 82)])
def test_the_smallest_policy_is_bound_by_memory(name, most, for_each):
    """An H100 can issue 105 instructions for each 12 bytes, an H200 75."""

    def check(variant, code):
        assert code.instructions_per_element <= (most if IS_COUNTED_VERSION else 105)
        assert code.mufu / code.elements <= 4.5

    for_each([Variant.of("sm_90", kernel, BY_NAME[name]) for kernel in KERNELS], check)


@pytest.mark.skipif(not IS_COUNTED_VERSION, reason="numbers of another version of Triton")
def test_stochastic_rounding_costs_at_most(examined):
    """16 instructions for bf16; for 8 bits, whose codes are not a matter of adding and truncating, 26."""
    most = {}
    for kernel in KERNELS:
        most[Variant.of("sm_90", kernel, BY_NAME["bf16-stochastic"])] = 16
        most[Variant.of("sm_90", kernel, BY_NAME["bf16-master24-8bit-stochastic"])] = 26
    nearest = {variant: replace(variant, stochastic=False) for variant in most}
    codes = examined([*nearest, *nearest.values()])
    for variant, plain in nearest.items():
        more = codes[variant].instructions_per_element - codes[plain].instructions_per_element
        assert more <= most[variant]


PARTS = ["bf16-master24-8bit-stochastic", "bf16-stochastic", "fp32-8bit-stochastic"]


def test_bits_of_parts_cost_little(examined):
    """Of a shard, whose elements are not those from the parameter's first on; most is for rows that are cut."""
    wholes = [Variant.of("sm_90", kernel, BY_NAME[name]) for kernel in KERNELS for name in PARTS]
    parts = {variant: replace(variant, part=True) for variant in wholes}
    codes = examined([*parts, *parts.values()])
    for whole, part in parts.items():
        assert codes[part].spills == codes[part].calls == 0
        # A thread of 16 elements makes the indices of two eighths, one of 4 that of half an eighth.
        more = codes[part].instructions_per_element - codes[whole].instructions_per_element
        assert 0 < more <= 130 / codes[part].elements or not IS_COUNTED_VERSION
        if whole.master is not None:
            assert codes[part].registers <= 128, "four programs on a multiprocessor"


# Run where kernels are not interpreted. Compiled kernels are distinct objects if their specialisations differ.
LAUNCHES = """
import torch
from adamw_triton import launch
from adamw_triton.storage import NoiseKey, StateTensors
from bench.codegen.machine_code import compiling

def state(n):
    codes = [torch.zeros(n, dtype=dtype) for dtype in (torch.int8, torch.uint8, torch.int8)]
    return StateTensors(codes[0], codes[1], None, codes[2], torch.zeros(-(-n // 128)), torch.zeros(-(-n // 128)))

wholes = ((0, 0, 16), (1, 1, 128), (16, 16, 1000), (2**62 + 1, 2**31 - 1, 4096))
parts = ((8, 0, 0), (1024, 16, 48), (2**40, 2**33, 2**36))
def distinct(wheres):
    with compiling("sm_90") as compiled:
        for seed, stream, n in wholes:
            param = torch.zeros(n, dtype=torch.bfloat16)
            for where in wheres:
                key = NoiseKey(seed, stream, *where)
                launch.launch_tensor(param, param, state(n), torch.zeros(8), maximize=False, noise_key=key)
    return len({id(one.kernel) for one in compiled})
with compiling("sm_90") as compiled:
    for seed in (0, 1, 16, 2**62 + 1):
        param = torch.zeros(64, dtype=torch.bfloat16)
        keys = [NoiseKey(seed, seed % 7)]
        table = launch.Table.of([param], param.dtype, [state(64)], aligned=True, noise_keys=keys)
        launch.launch_table(table, torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8), maximize=False)
print(distinct([(0, 0, 0)]), distinct(parts), len({id(one.kernel) for one in compiled}))
"""


def test_no_seed_stream_offset_or_size_recompiles():
    """One kernel for whole tensors, one for parts, one for tables."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-c", LAUNCHES], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert ran.stdout.split() == ["1", "1", "1"], ran.stderr
