"""Worlds of processes, one of each kind for the session."""

import pytest
from processes import World

WORLDS = {
    "world2": {"size": 2},
    "world4": {"size": 4},
    "kernels2": {"size": 2, "kernels": True},
    "kernels4": {"size": 4, "kernels": True},
}


def _fixture(name):
    @pytest.fixture(scope="session", name=name)
    def start():
        world = World(**WORLDS[name])
        yield world
        world.close()

    return start


world2, world4, kernels2, kernels4 = map(_fixture, WORLDS)


@pytest.fixture
def world(request):
    """The world that a test is parametrized with by name: `parametrize("world", ["world2"], indirect=True)`."""
    return request.getfixturevalue(request.param)


def pytest_collection_modifyitems(items):
    """Tests of one world go to one process of xdist, so that each world is started once."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for name in {*item.fixturenames, params.get("world")} & {*WORLDS, "own_world"}:
            item.add_marker(pytest.mark.xdist_group(name))
