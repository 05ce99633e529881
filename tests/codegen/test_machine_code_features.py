"""What each feature adds to the compiled kernels, and the kernels of the gradient norm and of the scalars."""

from dataclasses import replace
from functools import partial

import pytest
import triton
from machine_code_checks import IS_COUNTED_VERSION

from adamw_triton.storage.policies import BY_NAME, DTYPES
from bench.codegen.devices import DEVICES
from bench.codegen.static import FEATURE_TARGETS, FEATURED, FEATURES, NORM_DTYPES
from bench.codegen.variants import NORM, SCALARS, TARGETS, Variant

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
# Instructions per element. Reducing over the lanes of a warp costs a thread of 4 elements as much as one of 8.
MOST = {"control": 3.0, "statistics": 6.5, "cautious": 3.0}
FOUR_ELEMENTS = {"statistics": 9.0}
TRITON_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))


def plain(target):
    """The policies that features are added to: all on sm_90, the smallest and the largest elsewhere."""
    names = FEATURED if target == "sm_90" else (FEATURED[0], FEATURED[-1])
    return [Variant.of(target, "table", BY_NAME[name]) for name in names]


@pytest.mark.parametrize("target", FEATURE_TARGETS)
def test_instructions_that_a_feature_adds(target, examined, for_each):
    codes = examined(plain(target))

    def check(feature, variant, with_it):
        without = codes[replace(variant, **{feature: False})]
        added = with_it.instructions_per_element - without.instructions_per_element
        most = FOUR_ELEMENTS.get(feature, MOST[feature]) if without.elements == 4 else MOST[feature]
        assert 0 < added <= most or not IS_COUNTED_VERSION
        assert with_it.mufu == without.mufu and with_it.spills == with_it.calls == 0
        assert with_it.barriers == without.barriers and with_it.shared_bytes == without.shared_bytes
        # Tensors are accessed as before; statistics are 16 bytes of one thread in eight.
        assert with_it.loads == without.loads or sorted(with_it.loads) == sorted(without.loads)
        assert sorted(with_it.stores) == sorted([*without.stores, *([16] if feature == "statistics" else [])])

    for feature in FEATURES:
        for_each([replace(variant, **{feature: True}) for variant in codes], partial(check, feature))


@pytest.mark.parametrize("target", FEATURE_TARGETS)
def test_all_features_together(target, examined, for_each):
    codes = examined(plain(target))

    def check(variant, code):
        without = codes[replace(variant, **dict.fromkeys(FEATURES, False))]
        # Triton 3.8 keeps one value of the fp32 table kernel in local memory on sm_90, in one access each way.
        assert code.spills <= (0 if TRITON_VERSION < (3, 8) else 2)
        assert code.calls == 0 and code.barriers == without.barriers
        most = without.instructions_per_element + sum(MOST.values()) + 3
        assert code.instructions_per_element <= most or not IS_COUNTED_VERSION

    for_each([replace(variant, **dict.fromkeys(FEATURES, True)) for variant in codes], check)


@pytest.mark.parametrize("target", NVIDIA)
def test_norm(target, for_each):
    def check(variant, code):
        width = DTYPES[variant.dtypes[1]].itemsize
        assert set(code.loads) == {16} and sum(code.loads) == code.elements * width
        assert code.stores == [8]  # the sum of the program's squares
        assert sorted(code.uniform_loads) == [4, 4, 8, 8]
        assert code.spills == code.local_bytes == 0
        # Half of what the narrowest device can issue while the bytes move.
        budgets = [device.instruction_budget(width) for device in DEVICES if device.target == variant.target]
        assert code.instructions_per_element <= 0.5 * min(budgets)

    dtypes = (*NORM_DTYPES, "fp64") if target == "sm_90" else NORM_DTYPES[:1]
    for_each([Variant(target, NORM, (dtype,) * 4, control=True) for dtype in dtypes], check)


@pytest.mark.parametrize("target", TARGETS)
def test_scalars(target, for_each):
    """With and without float64 rows, a decision that is read, and one that is made of what GradScaler leaves."""

    def check(variant, code):
        assert code.elements == 1, "a lane for each parameter"
        assert code.spills == code.local_bytes == code.barriers == code.shared_bytes == code.shared_accesses == 0
        assert code.registers <= 64
        count, rows = 4, 8 * 4 + (8 * 8 if "fp64" in variant.dtypes else 0)
        decision = 3 * 8 if variant.scaler else 0  # factor, flag, number of steps skipped
        assert sum(code.stores) == count + rows + decision

    decisions = ({}, {"control": True}, {"control": True, "scaler": True})
    cases = [("fp32", decisions[2]), ("fp64", decisions[0])]
    if target == "sm_90":
        cases = [(dtype, decided) for dtype in ("fp32", "fp64") for decided in decisions]
    for_each([Variant(target, SCALARS, (dtype,) * 4, **decided) for dtype, decided in cases], check)
