"""What is said about training runs: how far they are apart, as JSON, as a table and as a plot."""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from adamw_triton.storage.policies import Policy, dtype_name

from . import common
from .gpt import Sizes, corpus
from .trainer import BETAS, MAX_GRAD_NORM, Features, Run

WARM_UP = 5  # steps that the median step time leaves out
MIB = 2**20


def tolerances(dtype: torch.dtype, steps: int, *, exact: bool = False, distributed: bool = False) -> dict[str, float]:
    """How far two runs may be apart: losses, and weights in units of the largest of their tensor.

    exact: the eager reference takes the operations of torch's loop in fp32, and gives its bits. Otherwise every step
    differs by roundings, which training amplifies: room grows with the steps, so that a short run, in which little
    can drift, finds small mistakes. For scale, over 400 steps at the default sizes torch's own two CPU
    implementations ended 7e-7 and 3e-6 apart in fp32, and 8e-3 and 0.1 in bf16, with one seed.

    distributed: gradients are summed in another order, so that they differ from the first step on. For scale, over 40
    steps at the default sizes, four seeds: losses ended at most 1e-5 apart and weights 8e-5; a batch of one seed told
    runs apart by 1.3e-4, those of two optimizers on one process too.
    """
    if dtype.itemsize < 4:
        return {"loss": 2e-2, "relative": 0.5}
    if exact:
        return {"loss": 1e-6, "relative": 1e-5}
    least = {"loss": 5e-4, "relative": 1e-3} if distributed else {"loss": 0.0, "relative": 0.0}
    return {
        "loss": max(least["loss"], min(1e-3, 2.5e-6 * steps)),
        "relative": max(least["relative"], min(1e-2, 5e-6 * steps)),
    }


def as_json(value: Any) -> Any:
    """With None for what JSON has no number for: the NaN and infinity of a run that diverged."""
    if isinstance(value, dict):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Difference:
    """How far two runs are apart; NaN where one of them is."""

    loss: float  # largest, over the steps
    weight: float  # largest, over all weights at the end
    relative: float  # the same in units of the largest weight of its tensor

    @classmethod
    def of(cls, run: Run, reference: Run) -> Difference:
        loss = (torch.tensor(run.losses) - torch.tensor(reference.losses)).abs().max()
        pairs = list(zip(run.weights, reference.weights, strict=True))
        weights = torch.stack([(a.double() - b.double()).abs().max() for a, b in pairs])
        scales = torch.stack([b.double().abs().max() for _, b in pairs])
        return cls(loss.item(), weights.max().item(), (weights / scales).max().item())

    def within(self, tolerance: dict[str, float]) -> bool:
        return self.loss <= tolerance["loss"] and self.relative <= tolerance["relative"]


def report_of(
    runs: Sequence[Run], options: Namespace, argv: Sequence[str], *, judged: int, exact: bool = False
) -> dict[str, Any]:
    """Everything that was found, ready for JSON.

    Args:
        runs: the reference first.
        options: of the command, with `device`, `policy` and `features`.
        judged: how many runs after the reference have to agree with it.
        exact: whether all runs should have the reference's bits, as for `tolerances`.
    """
    policy: Policy = options.policy
    features: Features = options.features
    sizes = Sizes(options.layers, options.heads, options.width, options.context)
    tolerance = tolerances(
        min(policy.dtypes, key=lambda dtype: dtype.itemsize),
        options.steps,
        exact=exact,
        distributed=options.distributed is not None,
    )
    differences = [Difference.of(run, runs[0]) for run in runs]
    training, validation = corpus()
    return {
        "schema_version": 1,
        "job": "train",
        "conditions": common.conditions("train", list(argv), options.device),
        "model": {
            **asdict(sizes),
            "parameters": sizes.parameters(),
            "policy": policy.name,
            "dtype": dtype_name(policy.param),
            "seed": options.seed,
        },
        "training": {
            "steps": options.steps,
            "batch": options.batch,
            "lr": options.lr,
            "weight_decay": options.weight_decay,
            "betas": BETAS,
            "max_grad_norm": features.max_grad_norm if features.clips_by_itself else MAX_GRAD_NORM,
            "folded": features.names,
        },
        "corpus": {"training_bytes": len(training), "validation_bytes": len(validation)},
        "tolerance": tolerance,
        "agree": all(difference.within(tolerance) for difference in differences[1 : 1 + judged]),
        "runs": [
            {
                "label": run.label,
                "losses": run.losses,
                "validation_loss": run.validation_loss,
                "step_ms": run.step_ms,
                "median_step_ms": statistics.median(run.step_ms[min(WARM_UP, options.steps // 2) :]),
                "state_bytes": run.state_bytes,
                "first_step_bytes": run.first_step_bytes,
                "difference": asdict(difference),
            }
            for run, difference in zip(runs, differences, strict=True)
        ],
    }


def progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def show(report: dict[str, Any], console: Console) -> None:
    """The table, and what it means."""
    made, model, training = report["conditions"], report["model"], report["training"]
    data = f"{training['batch']} x {model['context']} bytes"
    console.print(
        f"GPT of {model['parameters']:,} parameters ({model['policy']}), {training['steps']} steps of {data}, "
        f"on {made['device_name']} ({made['device']}); adamw_triton steps by: {made['path']}"
    )
    table = Table()
    for heading in ("optimizer", "training loss, last 20", "validation loss", "step(), median ms", "state, MiB"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    on_gpu = any(run["first_step_bytes"] for run in report["runs"])
    if on_gpu:
        table.add_column("first step adds, MiB", justify="right")
    for heading in ("difference of losses", "of weights", "relative"):
        table.add_column(heading, justify="right")
    for index, run in enumerate(report["runs"]):
        table.add_row(
            run["label"],
            f"{statistics.fmean(run['losses'][-20:]):.4f}",
            f"{run['validation_loss']:.4f}",
            f"{run['median_step_ms']:.2f}",
            f"{run['state_bytes'] / MIB:.1f}",
            *([f"{(run['first_step_bytes'] or 0) / MIB:.1f}"] if on_gpu else []),
            *(["reference", "", ""] if index == 0 else [f"{value:.1e}" for value in run["difference"].values()]),
        )
    console.print(table)
    if "distributed" in report:
        spread = report["distributed"]
        most = max(spread["processes"])
        crowded = made["device"] == "cpu" and most > (made["cpus"] or 1)
        console.print(
            f"{spread['wrapper']}: {spread['description']}; state is that of one process"
            + (f"; {most} processes share {made['cpus']} cores, so that times say little" if crowded else "")
        )
    allowed = report["tolerance"]
    verdict = "[green]agree[/green]" if report["agree"] else "[red]DIVERGE[/red]"
    console.print(
        f"adamw_triton and {report['runs'][0]['label']} {verdict}; allowed: {allowed['loss']:.0e} between losses, "
        f"{allowed['relative']:.0e} of the largest weight of a tensor between weights"
    )


def plot(report: dict[str, Any], path: Path) -> None:
    """Both loss curves, and their difference below."""
    figure, (curves, differences) = plt.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, layout="constrained", height_ratios=[3, 1]
    )
    styles = [("#0000a7", "-", 2.5), ("#c1272d", "--", 1.2), ("#008176", ":", 1.2), ("#eecc16", "-.", 1)]
    styles += [("#6a3d9a", ":", 1.6), ("#8a8a8a", "--", 0.8)]
    reference = report["runs"][0]["losses"]
    for run, (colour, dashes, width) in zip(report["runs"], cycle(styles), strict=False):
        curves.plot(run["losses"], dashes, color=colour, linewidth=width, label=run["label"])
        if run["losses"] is not reference:
            apart = [abs(a - b) for a, b in zip(run["losses"], reference, strict=True)]
            differences.plot(apart, color=colour, linewidth=1, label=run["label"])
    allowed = report["tolerance"]["loss"]
    differences.axhline(allowed, color="gray", linewidth=0.8, linestyle=":")
    differences.set_yscale("symlog", linthresh=1e-7)
    differences.set_ylim(0, 10 * allowed)
    differences.set_ylabel("|difference|")
    differences.set_xlabel("step")
    differences.annotate("allowed", (0, allowed), fontsize=7, color="gray", va="bottom")
    curves.set_ylabel("training loss, nats per byte")
    curves.legend(frameon=False)
    curves.grid(alpha=0.3)
    made = report["conditions"]
    curves.set_title(
        f"GPT of {report['model']['parameters']:,} parameters ({report['model']['policy']}) on {made['device_name']}\n"
        f"{made['path']}, torch {made['torch']}, {made['date'][:10]}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
