"""A process with everything imported, which forks workers on request; it ends with who started it."""

import faulthandler
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle

import pytest  # noqa: F401
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.optim
import torch.distributed.tensor.parallel  # noqa: F401
from worker import work

import adamw_triton  # noqa: F401, decides now whether kernels are interpreted


def serve(connection):
    """Fork for each tuple of arguments, which two open files follow; wait for each process id."""
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        if isinstance(request, int):
            _, status = os.waitpid(request, 0)
            connection.send(os.waitstatus_to_exitcode(status))
            continue
        descriptor, log = recv_handle(connection), recv_handle(connection)
        pid = os.fork()
        if pid == 0:
            connection.close()
            become_worker(descriptor, log, request)
        os.setpgid(pid, pid)
        os.close(descriptor)
        os.close(log)
        connection.send(pid)


def become_worker(descriptor, log, arguments):
    """Never returns."""
    try:
        os.setpgid(0, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(Connection(descriptor), *arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


if __name__ == "__main__":
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    serve(Connection(int(sys.argv[1])))
