"""Time of `step()` on the host, for 10 to 10,000 tensors."""

from __future__ import annotations

import gc
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from torch import nn

from adamw_triton import AdamW, launch
from adamw_triton.signature import Signature

from . import common, records
from .records import Record

COUNTS = (10, 161, 291, 1000, 10_000)  # 161: ResNet-50, 291: Llama-3-8B
ELEMENTS = 4  # of each tensor: the CPU's own arithmetic must not count, in torch's optimizers either
WARM_UP = 4  # steps before the one that counts, at least
WARM_UP_SECONDS = 0.03  # of steps: ours take a dozen until their times stop falling
GROWTH = (161, 1000)  # tensors between which the time of one more is taken
FUSED, FUSED_MOVING, FUSED_GROUPS = "torch fused", "torch fused, gradients move", "torch fused, a group each"
DESCRIPTION = """\
Time of step() on the host. On a GPU launches are real, and the queue is drained outside of what is timed; without
one, the launch is replaced by nothing at the one place that calls kernels, while torch's optimizers on the CPU do
their (tiny) arithmetic, on one thread. Tensors have 4 elements. "bare scan" reads the addresses of gradients and
parameters, the least that any step has to. "signature alone" is the comparison of everything that the step's tables
hold with what is there now, a part of each of our steps. "gradients move" gives every parameter another gradient before
each step, "missing gradients" takes that of every other parameter away, of the odd and the even ones in turn; both
outside of what is timed. "clip and skip" needs the norm of all gradients. "a group each": every tensor is a param
group, of three learning rates. Moving gradients and many groups are compared with torch's fused step on the same, all
others with its plain one.
Providers take turns. Each takes steps for 30 ms, four at least, before the one that counts; median and 20th and 80th
percentile, without Python's garbage collector. "cold" is the first step of a turn, after the others have used the
caches, as forward and backward do."""


class Samples(NamedTuple):
    """Microseconds of steps: of those that count, and of the first of each turn."""

    warm: list[float]
    cold: list[float]


class Provider(NamedTuple):
    step: Callable[[], Any]
    before: Callable[[], None] = lambda: None  # of every step, not timed
    against: str = FUSED  # which provider to compare it with


def signature_alone(optimizer: AdamW) -> Callable[[], Any]:
    """Return the reading that a step begins with, of the same tensors."""
    optimizer.step()  # builds the plan
    with mock.patch.object(Signature, "read", autospec=True, side_effect=Signature.read) as read:
        optimizer.step()
    return partial(Signature.read, *read.call_args.args)


def providers(count: int, device: torch.device) -> dict[str, Provider]:
    """Each optimizer on tensors of its own, which have gradients."""

    def params() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.zeros(ELEMENTS, device=device)) for _ in range(count)]
        for param in made:
            param.grad = torch.zeros_like(param)
        return made

    def groups() -> list[dict[str, Any]]:
        return [{"params": [param], "lr": 1e-3 / (1 + i % 3)} for i, param in enumerate(params())]

    moving, fused_moving, missing, scanned = params(), params(), params(), params()
    spare, fused_spare = ([[torch.zeros_like(p) for p in some] for _ in range(2)] for some in (moving, fused_moving))
    halves = [[p.grad if i % 2 == odd else None for i, p in enumerate(missing)] for odd in range(2)]

    def give(params: Sequence[nn.Parameter], in_turn: list[list[Any]]) -> None:
        in_turn.reverse()
        for param, grad in zip(params, in_turn[0], strict=True):
            param.grad = grad

    return {
        "bare scan": Provider(lambda: [(p.grad.data_ptr(), p.data_ptr()) for p in scanned if p.grad is not None]),
        "signature alone": Provider(signature_alone(AdamW(params()))),
        "adamw_triton": Provider(AdamW(params()).step),
        "adamw_triton, gradients move": Provider(
            AdamW(moving).step, before=partial(give, moving, spare), against=FUSED_MOVING
        ),
        "adamw_triton, missing gradients": Provider(AdamW(missing).step, before=partial(give, missing, halves)),
        "adamw_triton, clip and skip": Provider(AdamW(params(), max_grad_norm=1.0, skip_nonfinite=True).step),
        "adamw_triton, capturable": Provider(AdamW(params(), capturable=True).step),
        "adamw_triton, a group each": Provider(AdamW(groups()).step, against=FUSED_GROUPS),
        FUSED: Provider(torch.optim.AdamW(params(), fused=True).step),
        FUSED_MOVING: Provider(
            torch.optim.AdamW(fused_moving, fused=True).step, before=partial(give, fused_moving, fused_spare)
        ),
        FUSED_GROUPS: Provider(torch.optim.AdamW(groups(), fused=True).step),
        "torch foreach": Provider(torch.optim.AdamW(params(), foreach=True).step),
        "torch for-loop": Provider(torch.optim.AdamW(params(), foreach=False).step),
    }


@contextmanager
def launches(device: torch.device) -> Iterator[None]:
    """On a GPU, nothing; elsewhere the step believes in kernels whose launch does nothing."""
    with ExitStack() as stack:
        if device.type != "cuda":
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
            for name in [name for name in vars(launch) if name.startswith("launch_")]:
                stack.enter_context(mock.patch.object(launch, name, lambda *args, **options: None))
            stack.enter_context(mock.patch.object(launch, "has_kernels", lambda device: True))
        yield


class CountedKernel:
    """A kernel whose launches are counted; without a GPU they do nothing else."""

    def __init__(self, name: str, count: list[str], device: torch.device) -> None:
        self.name = name
        self.count = count
        self.kernel = getattr(launch, name) if device.type == "cuda" else None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        self.count.append(self.name)
        return (lambda *args, **options: None) if self.kernel is None else self.kernel[grid]


@contextmanager
def counted_launches(device: torch.device) -> Iterator[list[str]]:
    """Yield a list of the names of kernels launched from now on, by ours, as the step itself calls them."""
    count: list[str] = []
    with ExitStack() as stack:
        for name in [name for name in vars(launch) if name.endswith("_kernel")]:
            stack.enter_context(mock.patch.object(launch, name, CountedKernel(name, count, device)))
        if device.type != "cuda":
            stack.enter_context(mock.patch.object(launch, "has_kernels", lambda device: True))
        yield count


def sample(taking_turns: dict[str, Provider], device: torch.device, seconds: float) -> dict[str, Samples]:
    """Time steps, taking turns until the time is used; at least three samples after a warm-up."""
    samples = {name: Samples([], []) for name in taking_turns}

    def timed(provider: Provider) -> float:
        provider.before()
        common.synchronize(device)
        start = time.perf_counter_ns()
        provider.step()
        return (time.perf_counter_ns() - start) / 1e3

    for step, before, _ in taking_turns.values():
        before()
        step()
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()  # as timeit does
    try:
        while time.perf_counter() < end or min(len(of.warm) for of in samples.values()) < 3:
            for name, provider in taking_turns.items():
                samples[name].cold.append(timed(provider))
                turn, n_steps = time.perf_counter() + WARM_UP_SECONDS, 1
                while n_steps < WARM_UP or time.perf_counter() < turn:  # until its own data are in the caches
                    timed(provider)
                    n_steps += 1
                samples[name].warm.append(timed(provider))
    finally:
        gc.enable()
    return samples


def compared(taking_turns: dict[str, Provider], samples: dict[str, Samples]) -> dict[str, dict[str, Any]]:
    """Of each provider the spread of its times, and how many times longer what it is compared with takes."""
    found: dict[str, dict[str, Any]] = {name: {} for name in taking_turns}
    for which, ratio in (("host_us", "times_torch_fused"), ("cold_us", "times_torch_fused_cold")):
        times = {name: records.spread(of.warm if which == "host_us" else of.cold) for name, of in samples.items()}
        for name, spread in times.items():
            against = times[taking_turns[name].against]
            found[name] |= {which: spread, ratio: against["median"] / spread["median"]}
    return found


def measure(options: Namespace) -> list[Record]:
    """One record for each number of tensors and provider, and the growth per tensor of each provider."""
    found: list[Record] = []
    medians: dict[tuple[str, int], float] = {}
    for count in options.tensors:
        with launches(options.device):
            taking_turns = providers(count, options.device)
            samples = sample(taking_turns, options.device, options.seconds)
        for name, quantities in compared(taking_turns, samples).items():
            medians[name, count] = quantities["host_us"]["median"]
            found.append(
                {
                    "command": "host",
                    "case": f"{count} tensors",
                    "provider": name,
                    "tensors": count,
                    "host_us_per_tensor": quantities["host_us"]["median"] / count,
                    **quantities,
                }
            )
    few, many = GROWTH
    for name in dict.fromkeys(name for name, _ in medians):
        if (name, few) in medians and (name, many) in medians:
            growth = (medians[name, many] - medians[name, few]) / (many - few)
            found.append(
                {
                    "command": "host",
                    "case": f"growth, {few} to {many}",
                    "provider": name,
                    "host_us_per_tensor": growth,
                }
            )
    return found


def add_options(parser: common.Parser) -> None:
    add = parser.add_argument
    add("--tensors", type=common.positive_int, nargs="+", default=list(COUNTS), help="numbers of tensors")
    add("--seconds", type=common.non_negative_float, default=3.0, help="for each number of tensors, at least 3 samples")
    add("--device", type=common.device, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")


COLUMNS = {
    "host_us": "step(), µs",
    "host_us_per_tensor": "µs per tensor",
    "times_torch_fused": "torch fused / this",
    "cold_us": "cold, µs",
    "times_torch_fused_cold": "cold: torch fused / this",
}


def main(argv: list[str]) -> int:
    parser = common.Parser("host", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    found = measure(options)
    Console().print(records.table(f"Host time of step() on {common.device_name(options.device)}", found, COLUMNS))
    if options.json:
        records.write(options.json, "host", argv, options.device, found)
    return 0
