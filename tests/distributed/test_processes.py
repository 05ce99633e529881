"""The worker processes themselves: what they return, how they fail, and that none is left behind."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from processes import RanksFailed, World, environment

from adamw_triton import launch


def who(**kwargs):
    return dist.get_rank(), dist.get_world_size(), os.getpid(), launch.INTERPRETED, kwargs


def fail_on(rank):
    if dist.get_rank() == rank:
        raise ValueError("no such luck")
    dist.all_reduce(torch.ones(1))


def hang_on(rank):
    if dist.get_rank() == rank:
        time.sleep(1000)


def die_on(rank):
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.all_reduce(torch.ones(1))


def warn():
    warnings.warn("take care", UserWarning, stacklevel=1)


def hang_in_file(folder):
    for pid in (os.getpid(), os.getppid()):
        Path(folder, str(pid)).touch()
    time.sleep(1000)


def are_gone(pids):
    """Whether all processes have ended; they have some seconds for that."""
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def own_world():
    world = World(2)
    yield world
    world.close()


@pytest.mark.parametrize("world", ["world2", "world4", "kernels2"], indirect=True)
def test_results_come_by_rank_from_the_same_processes(world):
    first, second = world.run(who, a=1), world.run(who, a=[2, "b"])
    for rank, (one, other) in enumerate(zip(first, second, strict=True)):
        assert one == (rank, world.size, world.pids[rank], world.kernels, {"a": 1})
        assert other == (*one[:4], {"a": [2, "b"]})


def test_failure_of_one_rank_ends_all(own_world):
    own_world.run(who)
    pids, start = own_world.pids, time.monotonic()
    with pytest.raises(RanksFailed) as failure:
        own_world.run(fail_on, rank=1)
    assert time.monotonic() - start < 30, "it waited for the time limit"
    at_0, at_1 = str(failure.value).split("rank 1 failed")
    assert "fail_on failed" in at_0 and "rank 0 did not end" in at_0 and "in all_reduce" in at_0
    assert "ValueError: no such luck" in at_1 and "in fail_on" in at_1
    assert are_gone(pids)
    assert [result[0] for result in own_world.run(who)] == [0, 1]


def test_time_limit_tells_where_each_rank_was(own_world):
    own_world.run(who)
    pids = own_world.pids
    with pytest.raises(RanksFailed) as failure:
        own_world.run(hang_on, rank=1, time_limit=1.0)
    at_0, at_1 = str(failure.value).split("rank 1 did not end")
    assert "more than 1.0 s" in at_0 and "rank 0 returned" in at_0
    assert "in hang_on" in at_1 and at_1.count("\n") < 50
    assert are_gone(pids)


def test_crash_and_warnings_are_failures(own_world):
    with pytest.raises(RanksFailed, match="UserWarning: take care"):
        own_world.run(warn)
    with pytest.raises(RanksFailed, match=f"rank 1 died with exit code {-signal.SIGSEGV}") as failure:
        own_world.run(die_on, rank=1)
    assert "Segmentation fault" in str(failure.value) and "in die_on" in str(failure.value)
    assert own_world.pids == []


def test_function_without_a_name_is_refused(own_world):
    with pytest.raises(ValueError, match="cannot be found by name"):
        own_world.run(lambda: None)


def test_killed_parent_leaves_no_process(tmp_path):
    program = "import sys; from processes import World; from test_processes import hang_in_file\n"
    program += "World(2).run(hang_in_file, folder=sys.argv[1])"
    parent = subprocess.Popen([sys.executable, "-c", program, tmp_path], env=environment(kernels=False))
    try:
        end = time.monotonic() + 180  # three processes import torch, on cores that others use
        while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    pids = [int(file.name) for file in tmp_path.iterdir()]
    assert len(pids) == 3 and are_gone(pids)
