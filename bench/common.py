"""What all commands share: options with one-line errors, and the conditions of a measurement."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import subprocess
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import torch

from adamw_triton import launch


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with an option and what is allowed, and exits with status 2."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"python -m bench {command}",
            description=description,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, argv: list[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(argv)
        if unknown:
            allowed = ", ".join(action.option_strings[-1] for action in self._actions if action.option_strings)
            self.error(f"unknown option {unknown[0]!r}; allowed: {allowed}")
        return options

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def positive_int(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a positive integer")
    return int(text)


def seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**63):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: an integer from 0 to 2**63 - 1")
    return int(text)


def non_negative_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a finite number that is not negative")
    return value


def device(text: str) -> torch.device:
    """A device that is there; "auto" is a GPU if there is one."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    allowed = ["auto", "cpu", *(["cuda", *gpus] if gpus else [])]
    if text not in allowed:
        reason = "" if gpus else " (no GPU found)"
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed here: {', '.join(allowed)}{reason}")
    if text == "auto":
        text = "cuda" if gpus else "cpu"
    return torch.device(text)


def output_folder(text: str) -> Path:
    """A folder that exists from now on."""
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a folder to write to ({error.strerror})") from None
    return Path(text)


def json_file(text: str) -> Path:
    """A file that can be written, as far as can be told before it is."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a file to write, this is a folder")
    output_folder(str(path.parent))
    return path


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def kernel_path(device: torch.device) -> str:
    """What executes a step of adamw_triton on `device`."""
    where = "the CPU" if device.type == "cpu" else device_name(device)
    if not launch.has_kernels(device):
        return f"eager reference on {where}"
    return f"Triton interpreter on {where}" if launch.INTERPRETED else f"CUDA kernels on {where}"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _output(*command: str) -> str | None:
    """What a program prints, or None if it cannot be run."""
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() or None if ran.returncode == 0 else None


def _gpu(device: torch.device) -> dict[str, str]:
    """Driver, clocks, power cap and ECC as nvidia-smi reports them."""
    names = ("driver_version", "clocks.max.sm", "clocks.max.mem", "clocks.sm", "power.limit", "ecc.mode.current")
    if device.type != "cuda":
        return {}
    index = torch.cuda.current_device() if device.index is None else device.index
    line = _output("nvidia-smi", f"--id={index}", f"--query-gpu={','.join(names)}", "--format=csv,noheader")
    return dict(zip(names, line.split(", "), strict=True)) if line else {}


def conditions(command: str, argv: list[str], device: torch.device) -> dict[str, Any]:
    """What somebody needs to know to measure again."""
    try:
        triton_version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton_version = None
    return {
        "commit": _output("git", "describe", "--always", "--dirty"),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "bench", command, *argv]),
        "device": str(device),
        "device_name": device_name(device),
        "path": kernel_path(device),
        "gpu": _gpu(device),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "adamw_triton": metadata.version("adamw-triton"),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
