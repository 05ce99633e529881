"""Train a small GPT on several local processes, and on one, and compare."""

from __future__ import annotations

import dataclasses
import math
import os
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import TaskID
from torch.optim import Optimizer

from . import train_report
from .processes import run_ranks
from .ranks import WRAPPERS, train_rank, zero_redundancy
from .trainer import MAX_GRAD_NORM, Contestant, Features, Run, contestants_of

OF_THE_WHOLE = ("max_grad_norm", "skip_nonfinite")  # options that no param group has


def runs_of(options: Namespace, ours: type[Optimizer]) -> list[tuple[Contestant, int, str]]:
    """Who trains on how many processes, and what it is called: the reference, ours, and perhaps a control."""
    name = options.distributed
    reference, folded, _ = contestants_of(options.policy, options.features, options.device, ours)
    sharded = folded
    if name == "zero1":  # makes an optimizer of ours, which sees these as options of groups
        given = {key: value for key, value in _options(folded).items() if key not in OF_THE_WHOLE}
        sharded = folded._replace(make=partial(zero_redundancy, optimizer_class=ours, **given))
    processes: Sequence[int] = options.processes or WRAPPERS[name].processes
    return [
        (reference, 1, f"{reference.label}, 1 process"),
        *((sharded, world, f"{folded.label}, {name} on {world}") for world in processes),
        *([(folded, 1, f"{folded.label}, 1 process")] if options.control else []),
    ]


def _options(contestant: Contestant) -> dict[str, Any]:
    assert isinstance(contestant.make, partial)
    return contestant.make.keywords


def with_defaults(options: Namespace) -> Namespace:
    """Options with the clipping of the job folded into our step, where that is possible."""
    features: Features = options.features
    if options.distributed != "zero1" and not features.clips_by_itself:
        features = dataclasses.replace(features, max_grad_norm=MAX_GRAD_NORM)
    return Namespace(**{**vars(options), "features": features})


def compare(options: Namespace, argv: list[str], ours: type[Optimizer], console: Console) -> dict[str, Any]:
    """Train on one process, and on several; everything that was found, ready for JSON.

    Raises:
        ProcessError: a process failed, or took too long.
    """
    options = with_defaults(options)
    planned = runs_of(options, ours)
    # As many for all: no more threads than cores in any run, and sums in one order.
    threads = max(1, (os.cpu_count() or 1) // max(world for _, world, _ in planned))
    runs: list[Run] = []
    with train_report.progress(console) as bar:
        for contestant, world, label in planned:
            task = bar.add_task(label, total=options.steps, loss=math.nan)

            def advance(loss: float, task: TaskID = task) -> None:
                bar.update(task, advance=1, loss=loss)

            run: Run = run_ranks(
                train_rank,
                world,
                contestant,
                options,
                device_type=options.device.type,
                seconds=options.time_limit,
                threads=threads,
                progress=advance,
            )
            run.label = label
            runs.append(run)
    judged = len(planned) - 1 - options.control
    found = train_report.report_of(runs, options, argv, judged=judged)
    found["distributed"] = {
        "wrapper": options.distributed,
        "description": WRAPPERS[options.distributed].description,
        "processes": [world for _, world, _ in planned],
    }
    return found
