"""Launches and collectives of a step on sharded parameters."""

import pytest
from counting import Collectives, mocked_launches
from handmade import SHARDED_GROUPS, make, set_grads, values

NORMS = {"max_grad_norm": 1.0, "skip_nonfinite": True}


def collectives(deal, options):
    """Names of the collectives of the first step and a later one."""
    params, optimizer = make(deal, **options)
    found = []
    for step in range(2):
        set_grads(deal, params, values(1 + step, params[0].dtype))
        with Collectives() as seen:
            optimizer.step()
        found.append(seen.names)
    return found


def launches(deal, options):
    """Names of the kernels of the first step and a later one."""
    params, optimizer = make(deal, **options)
    found = []
    for step in range(2):
        set_grads(deal, params, values(1 + step, params[0].dtype))
        with mocked_launches() as names:
            optimizer.step()
        found.append(names)
    return found


def dealt(kind):
    return [pytest.param(f"{kind}{size}", deal, id=f"{deal}x{size}") for deal, size in SHARDED_GROUPS]


@pytest.mark.parametrize(("world", "deal"), dealt("world"), indirect=["world"])
def test_one_all_reduce_for_each_sharded_dimension_of_a_mesh(world, deal):
    """Of one that two meshes share, one; and none without a norm."""
    n_groups = SHARDED_GROUPS[deal, world.size]
    assert world.run(collectives, deal=deal, options=NORMS) == world.size * [2 * [n_groups * ["allreduce"]]]
    assert world.run(collectives, deal=deal, options={}) == world.size * [2 * [[]]]


@pytest.mark.parametrize(("world", "deal"), dealt("kernels"), indirect=["world"])
def test_as_many_launches_as_on_one_device(world, deal):
    for options in ({"foreach": True}, {}, {**NORMS, "statistics": True}):
        expected = world.run(launches, deal="plain", options=options)
        assert all("adamw_table_kernel" in names for names in expected[0])
        assert world.run(launches, deal=deal, options=options) == expected
