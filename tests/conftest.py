"""Without a GPU, kernels run in Triton's interpreter: that has to be decided before triton is imported."""

import gc
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))  # for bench; last, so that `kernels` is PyPI's where that is installed

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if "PYTEST_XDIST_WORKER" in os.environ:  # one core for each: threads that wait for each other take turns otherwise
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by torch's deterministic mode

import pairwise
import pytest

from adamw_triton import launch
from adamw_triton.storage.policies import Policy

if launch.INTERPRETED:
    import interpreter

    interpreter.speed_up()


def pytest_addoption(parser):
    parser.addoption(
        "--all-combinations",
        action="store_true",
        help="all cases of tests with three parameters or more, not as many as every two values meet in",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all-combinations"):
        items[:], left_out = pairwise.split(items)
        config.hook.pytest_deselected(items=left_out)
    any_grad_dtype = hasattr(torch.zeros(1, requires_grad=True), "grad_dtype")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        params = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if not any_grad_dtype and any(isinstance(p, Policy) and p.grad != p.param for p in params):
            reason = "this torch refuses gradients of another dtype than their parameter's"
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish():
    """Leave out of garbage collections what is there by now, torch and thousands of tests: they take long otherwise."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def device():
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(params=["kernel", "reference"])
def path(request, monkeypatch):
    """Run a test once through the kernels and once through the eager reference."""
    if request.param == "reference":
        monkeypatch.setattr(launch, "has_kernels", lambda device: False)
    else:
        assert launch.has_kernels(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu"))
    return request.param


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def defaults_come_back():
    """A test that leaves torch's defaults changed breaks those after it."""
    yield
    probe = torch.empty(0)
    assert (probe.device.type, probe.dtype) == ("cpu", torch.float32)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fresh memory is NaN, so that reading what was never written shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """Records (kernel, number of programs) of every launch."""
    seen = []
    for name in ("adamw_kernel", "adamw_table_kernel", "grad_norm_kernel", "scalars_kernel"):
        kernel = getattr(launch, name)

        class Recorder:
            def __init__(self, name, kernel):
                self.name, self.kernel = name, kernel

            def __getitem__(self, grid):
                seen.append((self.name, grid[0]))
                return self.kernel[grid]

        monkeypatch.setattr(launch, name, Recorder(name, kernel))
    return seen
