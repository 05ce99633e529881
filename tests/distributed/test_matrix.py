"""Wrapper × storage × feature, pairwise: against torch's AdamW, one process, and a replay of the very gradients."""

import math
from collections import defaultdict

import pytest
from pairwise import one_of_each, pairwise
from training import BF16, FEATURES, SPOILS, STEPPED_BY_TORCH, STORAGES, TORCH_HAS_IT, compare

# A wrapper and the number of its ranks.
WRAPPERS = [
    *((name, 2) for name in ("ddp", "zero", "fsdp1", "fsdp1-flat")),
    *((name, 2) for name in ("fsdp2", "fsdp2-bf16", "fsdp2-offload", "tp", "tp-plain")),
    *((name, 4) for name in ("fsdp2", "hsdp", "several-meshes", "tp-fsdp2")),
]
FACTORS = {"wrapper": WRAPPERS, "storage": list(STORAGES), "feature": list(FEATURES), "foreach": [None, True, False]}


def allowed(wrapper, storage, feature, foreach):
    name, _ = wrapper
    if feature == "amsgrad" and "8-bit" in storage:
        return False  # a maximum of codes is not kept
    if name.startswith("fsdp1"):
        return feature in ("plain", "amsgrad", "maximize", "cautious")
    if name == "zero":
        return feature in ("plain", "amsgrad", "maximize", "cautious", "scaler")
    if name.startswith("tp") and feature.startswith("scaler"):
        return False  # torch's GradScaler takes no plain tensors next to DTensors, and no 2-D meshes
    return not (name == "ddp" and feature == "release")


CASES = pairwise(FACTORS, allowed)
# The interpreter is slow: only what has to do with ranks, where parts are others than in one process. Random bits and
# gradient release have tests of their own.
OF_RANKS = ("statistics", "max_grad_norm", "skip_nonfinite", "skip_grad_norm_above", "scaler-fused")
OF_PARTS = ("fsdp2", "hsdp", "several-meshes", "tp", "tp-plain", "tp-fsdp2")


def is_for_kernels(wrapper, storage, feature, foreach):
    return feature in OF_RANKS and wrapper[0] in OF_PARTS and not STORAGES[storage].is_stochastic


KERNEL_CASES = one_of_each([case for case in CASES if is_for_kernels(**case)], "wrapper", "feature")

# Against one process, where gradients are other sums of the same terms. fp32: the largest difference of a weight,
# some units of its rounding. Others: length of the difference to that of the way. A moment at the border between two
# stored values goes to either: 2**-8 of it in bfloat16, up to 1/127 of the largest of its group in 8 bits, for few
# elements. With bfloat16 parameters the gradients themselves are rounded to 2**-9, and a weight near 1 is rounded to
# 2**-8, a third of the way of these steps.
FP32 = 1e-6
BOUNDS = {"bf16-moments": 2e-4, "8-bit": 1e-3, "8-bit-nearest": 1e-3}
BF16_PARAMS, OTHER_RANDOM_BITS = 0.05, 0.25
# FSDP1 cuts groups of 8-bit moments where its flat shards end; ZeRO and FSDP1 number random bits by rank.
EIGHT_BITS_OF_FLAT_SHARDS = 2e-2


def bound_against_one(name, storage):
    if name == "fsdp2-bf16":
        return BF16_PARAMS
    if (name == "zero" or name.startswith("fsdp1")) and STORAGES[storage].is_stochastic:
        return OTHER_RANDOM_BITS if storage == "bf16-stochastic" else max(EIGHT_BITS_OF_FLAT_SHARDS, BF16_PARAMS)
    if name.startswith("fsdp1") and "8-bit" in storage:
        return EIGHT_BITS_OF_FLAT_SHARDS
    return BOUNDS.get(storage, BF16_PARAMS)


def check(world, wrapper, storage, feature, foreach):
    name, _ = wrapper
    case = {"wrapper": name, "storage": storage, "feature": feature, "foreach": foreach}
    results = world.run(compare, **case, alone=not world.kernels)
    found = results[0]
    skips = feature in SPOILS and feature != "scaler"  # which does not call the optimizer at all
    for result in results:
        assert result["skipped"] == int(skips)
        for key in ("norms", "statistics"):
            assert result[key] == found[key], f"{key} differ between ranks"
    if not world.kernels:
        check_against_one(found, name, storage)
    assert "torch" in found or not (storage == "fp32" and feature in TORCH_HAS_IT)
    if "torch" in found:
        assert found["torch"]["largest"] < FP32
    if feature == "release":
        assert found["without release"]["largest"] == 0.0
    elif not name.startswith("fsdp1") and not (name == "zero" and STORAGES[storage].is_stochastic):
        clips = "max_grad_norm" in FEATURES[feature]
        check_replay(found, storage, is_exact=not clips if world.kernels else storage not in STEPPED_BY_TORCH)


def check_against_one(found, name, storage):
    """Training on the whole batch in one process ends in the same place."""
    is_fp32 = storage == "fp32" and name != "fsdp2-bf16"
    assert found["one"]["largest"] < (FP32 if is_fp32 else math.inf)
    assert found["one"]["relative"] < bound_against_one(name, storage)
    assert_close(found["losses"], found["one"]["losses"], FP32 if is_fp32 else 2e-2)


def check_replay(found, storage, *, is_exact):
    """The same gradients give the same bits.

    But kernels add up squares in another order where a shard ends elsewhere, and clip by a factor with another last
    bit; and see STEPPED_BY_TORCH.
    """
    again = found["replay"]
    if is_exact:
        assert again["largest"] == 0.0
    elif STORAGES[storage].param != BF16:
        assert again["largest"] < FP32
    else:  # some elements at the border between two stored values
        assert again["relative"] < 0.02
    assert_close(found["norms"], again["norms"], 1e-6)
    assert_close(found["statistics"] or (), again["statistics"] or (), 1e-6)
    assert found["skipped"] == again["skipped"]


def assert_close(values, expected, relative):
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        assert value == wanted or math.isclose(value, wanted, rel_tol=relative), f"{values} are not {expected}"


def parametrized(cases, kernels):
    """Cases with the world that each is for."""
    params = []
    for case in cases:
        name, size = case["wrapper"]
        world = f"{'kernels' if kernels else 'world'}{size}"
        label = "-".join([f"{name}x{size}", case["storage"], case["feature"], f"foreach_{case['foreach']}"])
        params.append(pytest.param(world, case, id=label))
    return pytest.mark.parametrize(("world", "case"), params, indirect=["world"])


@parametrized(CASES, kernels=False)
def test_eager(world, case):
    check(world, **case)


@parametrized(KERNEL_CASES, kernels=True)
def test_kernels(world, case):
    check(world, **case)


def test_cases_are_pairwise():
    """Each wrapper with each storage and feature that it can have, and each feature with each storage."""
    met = defaultdict(set)
    for case in CASES:
        met[case["wrapper"]] |= {case["storage"], case["feature"]}
        met[case["feature"]].add(case["storage"])
    for wrapper in WRAPPERS:
        can = {feature for feature in FEATURES if allowed(wrapper, "fp32", feature, None)}
        assert met[wrapper] == {*STORAGES, *can}
    assert met["max_grad_norm"] == set(STORAGES)
    assert len(CASES) < 160
