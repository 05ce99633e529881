"""Small tables on a device that the host writes now and then, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor

_CAPTURES = 16  # in a row


class DeviceTable:
    """An int64 table that is written whenever its content changes.

    A write from pageable memory would wait for the device, so there is a pinned copy between. The one of a write that a
    CUDA graph captures is read again at every replay: it is kept, and made beforehand, because pinning memory is
    not allowed during a capture.

    Args:
        size: words.
        device: where it lies.
        capturable: whether writes may be captured.

    Attributes:
        tensor: int64 [size].
    """

    def __init__(self, size: int, device: torch.device, *, capturable: bool) -> None:
        self.tensor = torch.zeros(size, dtype=torch.int64, device=device)
        self._content: bytes | None = None
        self._is_replayed = False  # graphs write it too, at times that the host does not know
        self._capturable = capturable and device.type == "cuda"
        self._spare: list[Tensor] = []
        self._captured: list[Tensor] = []
        self._reserve()

    def write(self, content: bytes, *, capturing: bool) -> None:
        """Write int64 words unless they are there already; in a graph, write them at each replay."""
        if content == self._content and not capturing and not self._is_replayed:
            return
        self._content = None if capturing else content
        words = torch.frombuffer(bytearray(content), dtype=torch.int64)
        if capturing:
            self._is_replayed = True
            if not self._spare and self._capturable:
                raise RuntimeError(f"after {_CAPTURES} captures of step() in a row, take a step outside of CUDA graphs")
            words = self._spare.pop().copy_(words) if self._capturable else words.clone()
            self._captured.append(words)
        elif self.tensor.is_cuda:
            words = words.pin_memory()
        self.tensor.copy_(words, non_blocking=True)
        if not capturing:
            self._reserve()

    def _reserve(self) -> None:
        """Hold copies ready for captures to come."""
        if self._capturable and len(self._spare) < _CAPTURES:
            pinned = torch.empty(_CAPTURES, len(self.tensor), dtype=torch.int64, device="cpu", pin_memory=True)
            self._spare = list(pinned.unbind())
