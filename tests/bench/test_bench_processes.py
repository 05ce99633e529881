"""Ranks that a command starts: they answer, their failures are told, and none of them stays."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from bench.processes import ProcessError, run_ranks

ROOT = Path(__file__).parents[2]
SECONDS = 180.0  # on a machine that is busy


def work(rank, world, report, folder, kind):
    """What the ranks of these tests do."""
    Path(folder, f"{rank}.pid").write_text(str(os.getpid()))
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    report(("progress of", rank))
    if kind == "error" and rank == 1:
        raise ValueError("this rank does not want to")
    if kind == "dies" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "hangs" and rank == 1:
        time.sleep(1000)
    if kind != "fine":
        dist.all_reduce(total)  # waits for the other for ever
    return total, torch.get_num_threads(), rank


def run(folder, kind, seconds=SECONDS, **options):
    return run_ranks(work, 2, str(folder), kind, device_type="cpu", seconds=seconds, **options)


def pids(folder):
    return [int(path.read_text()) for path in folder.glob("*.pid")]


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")  # dead, and not yet collected


def nobody_stays(folder, seconds=SECONDS):
    end = time.monotonic() + seconds
    while any(map(is_there, pids(folder))):
        assert time.monotonic() < end, "a process is still there"
        time.sleep(0.05)


def test_rank_0_answers(tmp_path):
    seen = []
    total, threads, rank = run(tmp_path, "fine", threads=3, progress=seen.append)
    assert total.item() == 3.0 and threads == 3 and rank == 0
    assert seen == [("progress of", 0)] and len(pids(tmp_path)) == 2
    nobody_stays(tmp_path, 5)


@pytest.mark.parametrize(
    ("kind", "seconds", "message"),
    [
        ("error", SECONDS, "rank 1 of 2 failed: .*ValueError: this rank does not want to"),
        ("dies", SECONDS, "rank 1 of 2 failed: the process died without a word"),
        ("hangs", 5.0, "rank 0, 1 of 2 did not end within 5 s|rank 0 of 2 failed"),  # gloo has the same limit
    ],
)
def test_a_failure_is_told_and_ends_all(kind, seconds, message, tmp_path):
    start = time.monotonic()
    with pytest.raises(ProcessError, match="(?s)" + message):
        run(tmp_path, kind, seconds)
    assert time.monotonic() - start < seconds + 10
    nobody_stays(tmp_path, 5)


def test_ranks_end_with_a_parent_that_is_killed(tmp_path):
    code = f"""
import sys
sys.path[:0] = {[str(ROOT), str(Path(__file__).parent)]}
import test_bench_processes as tests
if __name__ == "__main__":
    tests.run({str(tmp_path)!r}, "hangs")
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, str(script)], cwd=ROOT)
    try:
        end = time.monotonic() + SECONDS
        while len(pids(tmp_path)) < 2 or not all(path.read_text() for path in tmp_path.glob("*.pid")):
            assert time.monotonic() < end and parent.poll() is None
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    nobody_stays(tmp_path)
