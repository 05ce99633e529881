"""Equal gradients give equal bits, on however many ranks and meshes, and in any form of launch."""

import pytest
from handmade import SHARDED_GROUPS, compare_bits
from training import STORAGES

DEALS = [pytest.param(f"world{size}", deal, id=f"{deal}x{size}") for deal, size in SHARDED_GROUPS]
KERNEL_DEALS = [
    pytest.param(f"kernels{size}", deal, id=f"{deal}x{size}")
    for deal, size in [("fsdp2", 2), ("tp", 2), ("fsdp2", 4), ("hsdp", 4), ("tp-fsdp2", 4)]
]
STOCHASTIC = [name for name, storage in STORAGES.items() if storage.is_stochastic]
# Of whose rows a rank has less than 128 elements: its moments are floats there, and 8 bits in one process.
NARROW = {("fsdp2-columns", 2): "wide_columns.weight", ("tp", 4): "wide_rows.weight"}


def check(world, deal, storages, foreach):
    narrow = NARROW.get((deal, world.size))
    for found in world.run(compare_bits, deal=deal, storages=storages, foreach=foreach):
        assert found.keys() == set(storages)
        for storage, names in found.items():
            if narrow and "8-bit" in storage:
                assert {f"{narrow}: exp_avg", f"{narrow}: exp_avg_codes"} <= set(names)
                names = [name for name in names if not name.startswith(narrow)]
            assert names == [], storage


@pytest.mark.parametrize(("world", "deal"), DEALS, indirect=["world"])
def test_eager(world, deal):
    check(world, deal, list(STORAGES), None)


@pytest.mark.parametrize(("world", "deal"), KERNEL_DEALS, indirect=["world"])
def test_table_kernel(world, deal):
    check(world, deal, ["master24-8-bit"], None)


@pytest.mark.parametrize(("world", "deal"), KERNEL_DEALS[:2], indirect=["world"])
def test_kernel_of_one_tensor(world, deal):
    check(world, deal, ["bf16-stochastic"], False)


def test_one_launch_for_all(kernels2):
    check(kernels2, "fsdp2", ["bf16-stochastic"], True)


def test_stochastic_roundings():
    assert STOCHASTIC == ["8-bit", "master24-8-bit", "bf16-stochastic"]
