"""Text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

MAX_BYTES = 4_000_000


def corpus() -> tuple[Tensor, Tensor]:
    """Training and validation bytes: the library's top-level modules by name, and the last tenth of them."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda path: path.name)
    text = b"".join(path.read_bytes() for path in paths)[:MAX_BYTES]
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    split = len(data) * 9 // 10
    return data[:split], data[split:]


def batches(data: Tensor, *, batch: int, context: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`count` random batches of (inputs, targets); a seed always draws the same ones."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        starts = torch.randint(len(data) - context, (batch, 1), generator=generator)
        windows = data[starts + torch.arange(context + 1)].long()
        yield windows[:, :-1], windows[:, 1:]
