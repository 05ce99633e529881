"""Every script in examples/ runs to its end, on the CPU; each asserts what it promises."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What each needs beyond the test extra; only packages that may not install are skipped.
NEEDS = {
    "plain_loop.py": [],
    "fsdp2_checkpoint.py": [],
    "hf_trainer.py": ["transformers", "accelerate"],
    "accelerate_loop.py": ["accelerate"],
    "lightning_module.py": ["lightning"],
    "peft_lora.py": ["peft", "transformers"],
    "timm_training.py": ["timm", "torchvision"],
    "torchtitan_container.py": ["torchtitan"],
    "deepspeed_client.py": ["deepspeed"],
    "hub_kernel.py": ["kernels"],
}


def run(command, **variables):
    """Run a script outside of the checkout, as a user does; fails with what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def skip_without(packages):
    installed = {name.lower() for name in metadata.packages_distributions()}
    missing = [package for package in packages if package not in installed]
    if missing:
        pytest.skip(f"{missing[0]} is not installed; docs/frameworks.md says how")


def test_no_example_is_left_out():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == NEEDS.keys()


@pytest.mark.parametrize("script", [name for name in NEEDS if name != "fsdp2_checkpoint.py"])
def test_example(script):
    skip_without(NEEDS[script])
    assert run([sys.executable, str(ROOT / "examples" / script)]).strip()


def test_fsdp2_on_two_ranks_and_then_on_three(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(ROOT / "examples" / "fsdp2_checkpoint.py")
    first = run([*torchrun, "--nproc-per-node", "2", script, str(tmp_path)])
    second = run([*torchrun, "--nproc-per-node", "3", script, str(tmp_path)])
    assert "steps 0 to 10 on 2 ranks" in first and "steps 10 to 20 on 3 ranks" in second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-10", "step-20"]
    losses = [float(printed.split("loss ")[1].split(",")[0]) for printed in (first, second)]
    assert losses[1] < losses[0]


def test_the_checkout_does_not_hide_another_package():
    """Its folder `kernels` is no package, so that Python finds the one of that name from PyPI."""
    skip_without(["kernels"])
    code = "import adamw_triton, kernels; print(kernels.get_local_kernel.__module__)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("kernels.")
