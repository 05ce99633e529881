"""Processes die while they train or save: the last checkpoint stays, and training ends where it would have ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import resuming_script
import torch
from dying import failing, kill_me, no_space
from processes import HERE, RanksFailed, World, environment
from resuming_script import STEPS, train, whole_checkpoints
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

pytestmark = pytest.mark.xdist_group("crashes")
LAST = [f"step-{STEPS - 2}", f"step-{STEPS}"]  # what a training leaves


@pytest.fixture(scope="module")
def own_world():
    world = World(2)
    yield world
    world.close()


def train_in(folder):
    return train(Path(folder))


def everything(folder):
    """The content of a folder's last checkpoint, by name."""
    checkpoint = whole_checkpoints(Path(folder))[-1]
    file = Path(folder, "everything.pt")
    dcp_to_torch_save(checkpoint, file)
    content = torch.load(file, weights_only=True)
    found = dict(content["model"])
    for name, entries in content["optim"]["state"].items():
        found.update({f"{name}: {entry}": value for entry, value in entries.items()})
    return found


@pytest.fixture(scope="module")
def undisturbed(own_world, tmp_path_factory):
    """What is in the checkpoint at the end of a training without incidents."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert own_world.run(train_in, folder=str(folder)) == [0, 0]
    found = everything(folder)
    assert {"0.weight", "0.weight: exp_avg_codes", "0.weight: exp_avg_sq_scale"} <= found.keys()
    return found


def assert_ended_as(undisturbed, folder):
    assert [path.name for path in whole_checkpoints(Path(folder))] == LAST
    found = everything(folder)
    assert found.keys() == undisturbed.keys()
    assert [name for name, value in found.items() if not torch.equal(value, undisturbed[name])] == []


def die(folder, place, rank):
    """Train, until a rank is killed in the second save."""

    def after_step(step):
        if step == 3:
            context.__enter__()

    context = failing(place, rank, kill_me)
    train(Path(folder), after_step)


@pytest.mark.parametrize(("place", "rank"), [("in a file", 1), ("before the metadata", 0), ("before the new name", 0)])
def test_killed_while_it_saves(own_world, undisturbed, place, rank, tmp_path):
    with pytest.raises(RanksFailed, match=f"rank {rank} died with exit code {-signal.SIGKILL}"):
        own_world.run(die, folder=str(tmp_path), place=place, rank=rank)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-2", "step-4.part"]
    assert own_world.run(train_in, folder=str(tmp_path)) == [2, 2]
    assert_ended_as(undisturbed, tmp_path)


def fail_and_try_again(folder):
    """Train; one rank cannot write the second checkpoint at first. Returns the errors that this rank was told."""
    errors, save = [], resuming_script.save

    def save_patiently(folder, step, *args):
        if step == 4:
            try:
                with failing("in a file", 1, no_space):
                    save(folder, step, *args)
            except CheckpointException as error:
                errors.append(str(error))
        save(folder, step, *args)

    with mock.patch.object(resuming_script, "save", save_patiently):
        train(Path(folder))
    return errors


def test_failure_of_a_writer_is_told_to_all_ranks(own_world, undisturbed, tmp_path):
    for errors in own_world.run(fail_and_try_again, folder=str(tmp_path)):
        assert len(errors) == 1 and "no space left on device" in errors[0]
    assert_ended_as(undisturbed, tmp_path)


def run_torchrun(script, folder, *options, time_limit=240.0):
    """Run a script on two ranks, which write down their process ids. Returns its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    process = subprocess.Popen(
        [*command, str(HERE / script), str(folder)],
        env={**environment(kernels=False), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=time_limit)
    finally:
        process.kill()
        process.wait()
        left = [pid for pid in pids_in(folder) if script in command_of(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert process.returncode == 0 and left == [], output
    return output


def pids_in(folder):
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def command_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""  # it has ended


def test_restarted_by_torchrun(undisturbed, tmp_path):
    output = run_torchrun("dying.py", tmp_path, "--max-restarts", "1")
    assert len(pids_in(tmp_path)) == 4, "two attempts of two ranks"
    assert "rank 0 has trained from step 2" in output
    assert_ended_as(undisturbed, tmp_path)
