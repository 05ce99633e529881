"""What each feature adds to the compiled kernels, and the kernel of the gradient norm."""

from dataclasses import replace

import pytest
import triton
from helpers import compiled_or_skipped

from bench.codegen.devices import DEVICES
from bench.codegen.machine_code import MachineCode, examine_all
from bench.codegen.static import FEATURE_TARGETS, FEATURED, FEATURES, NORM_DTYPES
from bench.codegen.variants import NORM, TARGETS, Variant
from bench.policies import BY_NAME, DTYPES

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
PLAIN = [Variant.of(target, "table", BY_NAME[name]) for target in FEATURE_TARGETS for name in FEATURED]
WITH = [replace(variant, **{feature: True}) for variant in PLAIN for feature in FEATURES]
EVERYTHING = [replace(variant, **dict.fromkeys(FEATURES, True)) for variant in PLAIN]
NORMS = [Variant(target, NORM, (dtype,) * 4, control=True) for target in NVIDIA for dtype in (*NORM_DTYPES, "fp64")]
# Instructions per element. Reducing over the lanes of a warp costs a thread of 4 elements as much as one of 8.
MOST = {"control": 3.0, "statistics": 6.0, "cautious": 3.0, "rows": 4.0}
FOUR_ELEMENTS = {"statistics": 9.0}
# Of other versions of Triton than these numbers are of.
SLACK = 0.0 if triton.__version__.startswith("3.7.") else 1.5


@pytest.fixture(scope="module")
def codes():
    variants = [*PLAIN, *WITH, *EVERYTHING, *NORMS]
    return dict(zip(variants, examine_all(variants), strict=True))


@pytest.fixture
def machine_code(codes):
    return lambda variant: compiled_or_skipped(variant, codes[variant])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("plain", PLAIN, ids=str)
def test_instructions_that_a_feature_adds(plain, feature, machine_code):
    without, with_it = machine_code(plain), machine_code(replace(plain, **{feature: True}))
    added = with_it.instructions_per_element - without.instructions_per_element
    most = FOUR_ELEMENTS.get(feature, MOST[feature]) if without.elements == 4 else MOST[feature]
    assert -SLACK < added <= most + SLACK
    assert with_it.mufu == without.mufu and with_it.spills == with_it.calls == 0
    assert with_it.barriers == without.barriers and with_it.shared_bytes == without.shared_bytes
    # Tensors are accessed as before; statistics are 16 bytes of one thread in eight.
    assert with_it.loads == without.loads or sorted(with_it.loads) == sorted(without.loads)
    assert sorted(with_it.stores) == sorted([*without.stores, *([16] if feature == "statistics" else [])])


@pytest.mark.parametrize("variant", EVERYTHING, ids=str)
def test_all_features_together(variant, machine_code):
    plain = replace(variant, **dict.fromkeys(FEATURES, False))
    code, without = machine_code(variant), machine_code(plain)
    assert code.spills == code.calls == 0 and code.barriers == without.barriers
    assert code.instructions_per_element <= without.instructions_per_element + sum(MOST.values()) + 3


@pytest.mark.parametrize("variant", NORMS, ids=str)
def test_norm(variant, machine_code):
    code: MachineCode = machine_code(variant)
    width = DTYPES[variant.dtypes[1]].itemsize
    assert set(code.loads) == {16} and sum(code.loads) == code.elements * width
    assert code.stores == [8]  # the sum of the program's squares
    assert sorted(code.uniform_loads) == [4, 4, 8, 8]
    assert code.spills == code.local_bytes == 0
    # Half of what the narrowest device can issue while the bytes move.
    budgets = [device.instruction_budget(width) for device in DEVICES if device.target == variant.target]
    assert code.instructions_per_element <= 0.5 * min(budgets)
