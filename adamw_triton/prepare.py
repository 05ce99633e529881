"""Part of compiled.py that only torch.compile imports: the decorator imports the compiler, which takes seconds."""

from __future__ import annotations

import torch


@torch.compiler.assume_constant_result
def prepare(key: str, numbers: tuple[int, ...]) -> int:
    """While a step is being traced: create what state lacks, on the real tensors, and list it."""
    from .compiled import LIVE

    optimizer = LIVE[int(key)]  # a number would become symbolic
    with torch.no_grad(), torch.inference_mode(False):
        optimizer._compiled.complete(optimizer, numbers)
    return int(key)
