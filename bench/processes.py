"""Start local processes that are the ranks of a process group, and see to it that none outlives the call."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

GRACE_SECONDS = 5.0  # for a process to end by itself
SETTLE_SECONDS = 1.0  # in which the others' errors may come after that of the first


class ProcessError(RuntimeError):
    """A rank failed, died or did not end in time; the message says which and why."""


def run_ranks(
    work: Callable[..., Any],
    world: int,
    *args: Any,
    device_type: str,
    seconds: float,
    threads: int = 1,
    progress: Callable[[Any], object] = lambda value: None,
) -> Any:
    """Run `work(rank, world, report, *args)` in `world` processes, and return what rank 0 returns.

    The processes have a default process group (gloo, or nccl on GPUs), and end with this call, whatever happens.

    Args:
        work: a function of a module, and arguments that can be pickled.
        seconds: how long all of it may take.
        threads: of each process, for arithmetic on the CPU.
        progress: called here with what rank 0 gives to `report`.

    Raises:
        ProcessError: a rank raised an error, died, or did not end in time.
    """
    context = _context(work.__module__)
    with tempfile.TemporaryDirectory() as folder:
        ends: dict[Connection, int] = {}
        processes = []
        try:
            for rank in range(world):
                here, there = context.Pipe(duplex=False)
                ends[here] = rank
                process = context.Process(
                    target=_rank,
                    args=(work, rank, world, there, folder, device_type, seconds, threads, args),
                    daemon=True,
                )
                processes.append(process)
                process.start()
                there.close()
            _watch(ends, world, time.monotonic() + seconds, seconds, progress)
            for process in processes:
                process.join(GRACE_SECONDS)
            return torch.load(_result(folder), weights_only=False)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                if process.pid is not None:
                    process.join()
            for end in ends:
                end.close()


def _context(module: str) -> ForkServerContext | SpawnContext:
    """Processes that know nothing of this one; where there is a server to fork them, it has imported all they need."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    return context


def _watch(
    ends: dict[Connection, int], world: int, deadline: float, seconds: float, progress: Callable[[Any], object]
) -> None:
    """Return when every rank has finished; raise when one has failed."""
    running = dict(ends)
    failed: dict[int, str] = {}
    while running:
        ready = wait(list(running), timeout=max(0.0, deadline - time.monotonic()))
        if not ready and not failed:
            ranks = ", ".join(map(str, sorted(running.values())))
            raise ProcessError(f"rank {ranks} of {world} did not end within {seconds:g} s")
        if not ready:
            break
        for end in ready:
            assert isinstance(end, Connection)
            try:
                kind, value = end.recv()
            except EOFError:  # it was killed, or a library ended the process
                kind, value = "error", "the process died without a word"
            if kind == "progress":
                progress(value)
                continue
            rank = running.pop(end)
            if kind == "error":
                failed[rank] = value
                deadline = min(deadline, time.monotonic() + SETTLE_SECONDS)
    if failed:  # the first that failed; the others often say only that it is gone
        rank, reason = next(iter(failed.items()))
        raise ProcessError(f"rank {rank} of {world} failed: {reason.strip()}")


def _result(folder: str) -> Path:
    return Path(folder, "result.pt")


def _end_with(parent: BaseProcess) -> None:
    """End this process when its parent is gone, should that be killed."""
    parent.join()
    os._exit(1)


def _rank(
    work: Callable[..., Any],
    rank: int,
    world: int,
    end: Connection,
    folder: str,
    device_type: str,
    seconds: float,
    threads: int,
    args: tuple[Any, ...],
) -> None:
    """What a process does."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        torch.set_num_threads(threads)
        if device_type == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            init_method=Path(folder, "store").absolute().as_uri(),
            rank=rank,
            world_size=world,
            timeout=timedelta(seconds=seconds),
        )
        found = work(rank, world, lambda value: end.send(("progress", value)) if rank == 0 else None, *args)
        if rank == 0:
            torch.save(found, _result(folder))
        dist.barrier()
        end.send(("done", None))
    except BaseException:
        end.send(("error", traceback.format_exc()))
        end.close()
        os._exit(1)  # leaving a process group in good order waits for ranks that may be gone
    dist.destroy_process_group()
