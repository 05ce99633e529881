"""Worker processes that run a function on every rank: started once, used by many tests.

    World, here        size ranks, each with a connection
        |  job: a function by name and its arguments; its result or a traceback comes back
    worker.py          one rank, forked by
    template.py        a process that has imported torch and this package; one with and one without kernels

No process outlives pytest: each ends when the other end of its connection is gone.
"""

from __future__ import annotations

import functools
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

HERE = Path(__file__).parent
START_LIMIT = 120.0
# Once a rank has failed, the others have this long to fail too: most then wait for it in a collective, for ever.
GRACE = 3.0
LINES_SHOWN = 40  # of each rank


class RanksFailed(Exception):
    """A function failed, died or did not come to its end on some rank; says where each rank was."""


class World:
    """Processes of one gloo group, on the CPU; started at the first `run`, and anew after a failure.

    Args:
        size: number of ranks.
        kernels: whether the package runs its kernels, in Triton's interpreter; its eager path otherwise.
    """

    def __init__(self, size: int, *, kernels: bool = False) -> None:
        self.size, self.kernels = size, kernels
        self._store: TCPStore | None = None
        self._workers: list[_Worker] = []

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def run(self, function: Callable[..., Any], *, time_limit: float = 90.0, **kwargs: Any) -> list[Any]:
        """Run a function on every rank.

        Args:
            function: of the top level of a file; it is imported anew in the workers, whose ranks are torch's.
            time_limit: in seconds.
            kwargs: its arguments, the same on every rank.

        Returns:
            What it returned, by rank. Both ways are by pickle: no DTensors, no groups.

        Raises:
            RanksFailed: it did not return on every rank. All processes have been killed then.
        """
        if function.__qualname__ != function.__name__ or function.__name__ == "<lambda>":
            raise ValueError(f"{function.__qualname__} cannot be found by name in another process")
        job = pickle.dumps((function.__code__.co_filename, function.__name__, kwargs))
        try:
            if not self._workers:
                self._start()
            for worker in self._workers:
                worker.send(job)
            return self._results(time_limit, function.__name__)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill all processes, and what they have started."""
        for worker in self._workers:
            worker.kill()
        self._workers, self._store = [], None

    def _start(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        template = _template(self.kernels)
        for rank in range(self.size):
            self._workers.append(_Worker(template, rank, self.size, self._store.port))
        self._results(START_LIMIT, "the start")

    def _results(self, time_limit: float, what: str) -> list[Any]:
        """Receive one answer from every worker."""
        waiting = {worker.connection: worker for worker in self._workers}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        end = time.monotonic() + time_limit
        while waiting:
            ready = wait(list(waiting), max(0.0, end - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                worker = waiting.pop(connection)
                try:
                    succeeded, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    succeeded, value = False, worker.last_words()
                (results if succeeded else failures)[worker.rank] = value
            if failures:
                end = min(end, time.monotonic() + GRACE)
        if not failures and not waiting:
            return [results[rank] for rank in range(self.size)]
        reason = f"took more than {time_limit} s"
        if failures:
            reason = f"failed: {failures[min(failures)].strip().splitlines()[-1]}"
        for worker in waiting.values():
            failures[worker.rank] = f"did not end; it was here:\n{worker.where()}"
        failures.update(dict.fromkeys(results, "returned"))
        ranks_of: dict[str, list[str]] = {}
        for rank in sorted(failures):
            ranks_of.setdefault(failures[rank], []).append(f"rank {rank}")
        raise RanksFailed("\n".join([f"{what} {reason}", *(f"{', '.join(r)} {text}" for text, r in ranks_of.items())]))


class _Worker:
    """A process, the connection to it, and what it has written."""

    def __init__(self, template: _Template, rank: int, size: int, port: int) -> None:
        self.rank = rank
        self._template = template
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed by kill
        self._seen = 0
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        with theirs:
            self.pid = template.start((rank, size, port), theirs.fileno(), self._log.fileno())

    def send(self, job: bytes) -> None:
        self._seen = self._size()
        try:
            self.connection.send_bytes(job)
        except ConnectionError as error:
            raise RanksFailed(f"rank {self.rank} {self.last_words()}") from error

    def last_words(self) -> str:
        """Return how the process ended."""
        return f"died with exit code {self._template.wait_for(self.pid)}:\n{self._written()}"

    def where(self) -> str:
        """Return the stack of every thread of the process, as far as it still answers."""
        before = self._size()
        os.kill(self.pid, signal.SIGUSR1)
        end = time.monotonic() + 2.0
        while time.monotonic() < end and self._size() == before:
            time.sleep(0.05)
        time.sleep(0.1)  # for the rest of it
        return self._written()

    def kill(self) -> None:
        self._template.kill(self.pid)
        self.connection.close()
        self._log.close()

    def _size(self) -> int:
        return os.fstat(self._log.fileno()).st_size

    def _written(self) -> str:
        text = os.pread(self._log.fileno(), self._size() - self._seen, self._seen).decode(errors="replace")
        return "\n".join(text.splitlines()[-LINES_SHOWN:])


@functools.cache
def _template(kernels: bool) -> _Template:
    return _Template(kernels)


class _Template:
    """The process that all workers of a kind are forked from, and which knows how they ended."""

    def __init__(self, kernels: bool) -> None:
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._exit_codes: dict[int, int] = {}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "template.py"), str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                env=environment(kernels),
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # ^C is for pytest, which then kills the workers
            )

    def start(self, arguments: tuple[int, ...], *descriptors: int) -> int:
        """Fork a worker with these open files. Returns its process id."""
        self._connection.send(arguments)
        for descriptor in descriptors:
            send_handle(self._connection, descriptor, self._process.pid)
        return self._connection.recv()

    def wait_for(self, pid: int) -> int:
        """Return the exit code of a worker that is ending."""
        if pid not in self._exit_codes:
            self._connection.send(pid)
            self._exit_codes[pid] = self._connection.recv()
        return self._exit_codes[pid]

    def kill(self, pid: int) -> None:
        if pid not in self._exit_codes:
            os.killpg(pid, signal.SIGKILL)
            self.wait_for(pid)


def environment(kernels: bool) -> dict[str, str]:
    """Return the environment of a template and its workers."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ours = {
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE))),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return {**kept, **ours, **({"TRITON_INTERPRET": "1"} if kernels else {})}
