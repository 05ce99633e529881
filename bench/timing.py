"""How a call is timed: on the GPU, on the host, and with the providers of a comparison taking turns.

Every sample starts with the L2 cache full of something else, as after a backward pass. Providers take turns
(A B C A B C ...), so that a clock that drops or a machine that warms up meets all of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from . import common

Call = Callable[[], object]
Providers = Mapping[str, Call]
Samples = dict[str, list[float]]

FLUSHED = 2  # buffers of so many times the L2 cache are written to flush it
BURST = 3  # steps enqueued at once where host time is measured: few, so that the launch queue is never full


class Event(Protocol):
    """As much of torch.cuda.Event as is needed here."""

    def record(self) -> Any: ...

    def elapsed_time(self, end: Any) -> float: ...


class Flush:
    """Writes a buffer that pushes everything else out of the L2 cache; nothing on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.buffer: torch.Tensor | None = None
        if device.type == "cuda":
            size = FLUSHED * torch.cuda.get_device_properties(device).L2_cache_size
            self.buffer = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()


def in_turns(
    providers: Providers,
    sample: Callable[[Call], float],
    *,
    samples: int,
    warmup: int,
    limit: float = math.inf,
) -> Samples:
    """`samples` of each provider, after `warmup` calls of each; A B C A B C ...

    A provider gets no more turns, after three, once its samples sum up to `limit`.
    """
    for call in providers.values():
        for _ in range(warmup):
            call()
    taken: Samples = {name: [] for name in providers}
    for turn in range(samples):
        for name, call in providers.items():
            if turn < 3 or sum(taken[name]) < limit:
                taken[name].append(sample(call))
    return taken


def device_ms(
    providers: Providers,
    device: torch.device,
    *,
    samples: int,
    warmup: int = 5,
    flush: Call | None = None,
    event: Callable[[], Event] | None = None,
) -> Samples:
    """Milliseconds between two events around each call.

    The queue is never empty when a call is made: the flush keeps the GPU busy for longer than a launch takes
    on the host. So a call must be one or a few launches, without Python of its own worth mentioning.
    """
    new_event: Callable[[], Event] = event or (lambda: torch.cuda.Event(enable_timing=True))
    clear = flush or Flush(device)
    pairs: dict[str, list[tuple[Event, Event]]] = {name: [] for name in providers}

    for call in providers.values():
        for _ in range(warmup):
            call()
    common.synchronize(device)
    for _ in range(samples):
        for name, call in providers.items():
            start, end = new_event(), new_event()
            clear()
            start.record()
            call()
            end.record()
            pairs[name].append((start, end))
        common.synchronize(device)
    return {name: [start.elapsed_time(end) for start, end in taken] for name, taken in pairs.items()}


def wall_ms(
    providers: Providers,
    device: torch.device,
    *,
    samples: int,
    warmup: int = 3,
    seconds: float = math.inf,
    flush: Call | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Milliseconds from an idle device to an idle device; of slow providers about `seconds` worth of samples."""
    clear = flush or Flush(device)

    def sample(call: Call) -> float:
        clear()
        common.synchronize(device)
        start = clock()
        call()
        common.synchronize(device)
        return (clock() - start) * 1e3

    return in_turns(providers, sample, samples=samples, warmup=warmup, limit=seconds * 1e3)


def host_us(
    providers: Providers,
    device: torch.device,
    *,
    samples: int,
    warmup: int = 3,
    seconds: float = math.inf,
    clock: Callable[[], float] = time.perf_counter,
) -> Samples:
    """Microseconds until a call returns, which on a GPU is before its work is done."""

    def sample(call: Call) -> float:
        common.synchronize(device)
        start = clock()
        for _ in range(BURST):
            call()
        return (clock() - start) / BURST * 1e6

    taken = in_turns(providers, sample, samples=samples, warmup=warmup, limit=seconds / BURST * 1e6)
    common.synchronize(device)
    return taken


def kernels(call: Call, device: torch.device, steps: int = 3) -> dict[str, float | None]:
    """GPU time and number of kernels of one call, as the profiler sees them; copies and fills are not kernels.

    The cache is as the call before has left it. Without a GPU both are None.
    """
    if device.type != "cuda":
        return {"kernel_ms": None, "launches": None}
    call()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            call()
        torch.cuda.synchronize(device)
    return count_kernels(profiler.events() or [], steps)


def count_kernels(events: Any, steps: int) -> dict[str, float | None]:
    """Sum over the profiler's events on the GPU; ranges that annotate kernels are no kernels."""
    durations = [
        event.time_range.elapsed_us()
        for event in events
        if event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset", "Optimizer."))
    ]
    if not durations:
        return {"kernel_ms": None, "launches": None}  # a profiler that may not look at the GPU sees nothing
    return {"kernel_ms": sum(durations) / steps / 1e3, "launches": len(durations) / steps}


def added_bytes(call: Call, device: torch.device) -> int | None:
    """What a call allocates at its peak, on top of what is there before; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
