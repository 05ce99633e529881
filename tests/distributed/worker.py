"""One rank: runs what it is sent, until the other end of the connection is gone."""

import importlib
import os
import pickle
import queue
import sys
import threading
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

IGNORED = [
    ("does not have a deterministic implementation", UserWarning),  # of torch, asked to tell
    ("Found a non-scalar tensor with numel=1", UserWarning),  # of DTensor, in torch's GradScaler
    ("encountered in", RuntimeWarning),  # of NumPy, where the interpreter evaluates both sides of tl.where
]


def work(connection, rank, size, port):
    """Join the group, and run jobs for ever."""
    jobs = queue.SimpleQueue()
    threading.Thread(target=receive, args=(connection, jobs), daemon=True).start()
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    warnings.simplefilter("error")
    for message, category in IGNORED:
        warnings.filterwarnings("ignore", f".*{message}", category)
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        connection.send_bytes(answer(jobs.get()))


def receive(connection, jobs):
    """Receive jobs; end the process when nobody sends any more, wherever it is."""
    try:
        while True:
            jobs.put(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(1)


def answer(job):
    """Run a job. Returns, pickled, whether it succeeded, and its result or the traceback."""
    try:
        file, name, kwargs = pickle.loads(job)
        if str(Path(file).parent) not in sys.path:
            sys.path.append(str(Path(file).parent))
        function = getattr(importlib.import_module(Path(file).stem), name)
        torch.manual_seed(0)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)
        return pickle.dumps((True, function(**kwargs)))
    except BaseException:
        return pickle.dumps((False, f"failed:\n{traceback.format_exc()}"))
