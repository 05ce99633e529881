"""Ways in which a rank dies or fails while a checkpoint is saved; as a script, resuming_script.py, and a death."""

import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import resuming_script
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter


def kill_me() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_space() -> None:
    raise OSError("no space left on device")


# Where: the class and method that does not come back, and at which of its calls.
PLACES: dict[str, tuple[type, str, int]] = {
    "in a file": (DefaultSavePlanner, "resolve_data", 3),
    "before the metadata": (FileSystemWriter, "finish", 1),
    "before the new name": (Path, "rename", 1),
}


@contextmanager
def failing(place: str, rank: int, fail: Callable[[], None]) -> Iterator[None]:
    """On one rank, fail at a place in the next save."""
    owner, name, last_call = PLACES[place]
    original, calls = getattr(owner, name), 0

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        # DCP renames the file of its metadata.
        calls += owner is not Path or self.name.endswith(".part")
        if calls == last_call:
            fail()
        return original(self, *args, **kwargs)

    if dist.get_rank() != rank:
        yield
        return
    with mock.patch.object(owner, name, method):
        yield


def main() -> None:
    """The first attempt loses a rank after step 3, of which there is no checkpoint."""
    is_first, rank = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", int(os.environ["RANK"])
    Path(sys.argv[1], f"pid-{os.getpid()}").touch()

    def after_step(step: int) -> None:
        if is_first and (step, rank) == (3, 1):
            kill_me()

    with mock.patch.object(resuming_script, "train", functools.partial(resuming_script.train, after_step=after_step)):
        resuming_script.main()


if __name__ == "__main__":
    main()
