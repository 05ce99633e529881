"""Small tables on a device that the host writes now and then, without waiting for the device."""

from __future__ import annotations

import torch
from torch import Tensor


class Upload:
    """A table on `device` that starts as `values`, a tensor on the CPU.

    A write from pageable memory would wait for the device, so there is a pinned copy between. The one of a write that a
    CUDA graph captures is read again at every replay: it is kept, and made beforehand, because pinning memory is
    not allowed during a capture.

    Args:
        capturable: whether such a copy is to be held ready.
    """

    def __init__(self, values: Tensor, device: torch.device, *, capturable: bool) -> None:
        self.tensor = values.to(device)
        self.capturable = capturable
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []
        self.replayed = False  # whether graphs write it too, at times that the host does not know
        self.prepare()

    def prepare(self) -> None:
        """Hold a copy ready for a capture to come."""
        if self.capturable and self._spare is None:
            self._spare = torch.empty_like(self.tensor, device="cpu", pin_memory=self.tensor.is_cuda)

    def write(self, values: Tensor, *, capturing: bool) -> None:
        if capturing:
            self.replayed = True
            if self._spare is None:
                raise RuntimeError("take a step outside of CUDA graphs between two captures of step()")
            staging = self._spare.copy_(values)
            self._captured.append(staging)
            self._spare = None
        else:
            staging = values.pin_memory() if self.tensor.is_cuda else values
        self._copy(staging)

    def _copy(self, staging: Tensor) -> None:
        self.tensor.copy_(staging, non_blocking=True)
