"""Machine code of variants, examined once in a test run, whichever of pytest-xdist's workers asks first."""

import fcntl
import os
import pickle

import pytest
from helpers import compiled_or_skipped

from bench.codegen.machine_code import Examiners


@pytest.fixture(scope="session")
def examined(tmp_path_factory):
    """A function that returns the machine code of each of some variants; the test is skipped where there is none."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    examiners = None

    def examine(variants):
        nonlocal examiners
        paths = {variant: folder / f"{variant}.pickle" for variant in variants}
        with (folder / "examined.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # examiners keep all CPUs busy
            missing = [variant for variant, path in paths.items() if not path.exists()]
            if missing and examiners is None:
                examiners = Examiners()
            for variant, result in zip(missing, examiners.examine_all(missing) if missing else [], strict=True):
                paths[variant].write_bytes(pickle.dumps(result))
        return {v: compiled_or_skipped(v, pickle.loads(path.read_bytes())) for v, path in paths.items()}

    yield examine
    if examiners is not None:
        examiners.close()


@pytest.fixture
def for_each(examined):
    """A function that checks every variant, `check(variant, code)`, and fails with all that do not pass."""

    def failure(check, variant, code):
        try:
            check(variant, code)
        except AssertionError as error:
            return f"{variant}: {error}"
        return None

    def run(variants, check):
        failures = [failure(check, variant, code) for variant, code in examined(variants).items()]
        assert variants and not any(failures), "\n".join(filter(None, failures))

    return run
