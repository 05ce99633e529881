"""The distribution: names, metadata, contents; documentation that runs."""

import doctest
import importlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import adamw_triton

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the files that git tracks or would track, so that building leaves no trace."""
    target = tmp_path_factory.mktemp("tree") / "source"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def build(tree, hook, out):
    """Call the build backend as pip would, without a network."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out / result.stdout.splitlines()[-1]


def test_wheel(tree, tmp_path):
    wheel = build(tree, "build_wheel", tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    top = {name.split("/")[0] for name in names}
    assert top == {"adamw_triton", f"adamw_triton-{adamw_triton.__version__}.dist-info"}
    assert {"adamw_triton/py.typed", "adamw_triton/kernels/adamw.py", "adamw_triton/storage/formats.py"} <= set(names)
    assert "adamw_triton/extras/gradient_release.py" in names
    # It imports from somewhere else, and finds its own kernels there.
    code = "import adamw_triton, adamw_triton.kernels.adamw as k; print(adamw_triton.__file__, k.__file__)"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert all(path.startswith(str(tmp_path / "site")) for path in result.stdout.split())


def test_sdist_has_what_a_build_needs(tree, tmp_path):
    archive = build(tree, "build_sdist", tmp_path)
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    for name in ("kernels/adamw.py", "adamw_triton/optimizer.py", "LICENSE", "README.md", "pyproject.toml"):
        assert (source / name).is_file(), name
    assert build(source, "build_wheel", tmp_path).is_file()


def test_import_needs_no_gpu_and_is_quiet():
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = (
        "import sys, torch; import adamw_triton\n"
        "assert 'torch._dynamo' not in sys.modules, 'importing the compiler takes seconds'\n"
        "assert not torch.cuda.is_initialized()\n"
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3)\n"
        "adamw_triton.AdamW([p]).step(); print(p.tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "" and result.stdout.startswith("[0.998")


def test_without_triton():
    """Where triton is not published, the reference runs."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, adamw_triton\n"
        "p = torch.ones(3, requires_grad=True); p.grad = torch.ones(3)\n"
        "adamw_triton.AdamW([p]).step(); print(p.tolist())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("[0.998")


@pytest.mark.parametrize("name", ["optimizer", "functional", "param_groups"])
def test_examples_in_docstrings(name):
    module = importlib.import_module(f"adamw_triton.{name}")
    from torch import nn

    results = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn})
    assert results.attempted > 0 and results.failed == 0


def test_unmodified_script_with_one_line_changed(tmp_path):
    """The promise: a training script whose only change is where AdamW comes from."""
    script = """
import torch
from torch.optim import AdamW

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))
optimizer = AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=False, foreach=False)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
x = torch.randn(64, 8)
for step in range(30):
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    print(f"{loss.item():.5f}")
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    outputs = []
    for text in (script, script.replace("from torch.optim import AdamW", "from adamw_triton import AdamW")):
        (tmp_path / "train.py").write_text(text)
        result = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1] and outputs[0].count("\n") == 30
