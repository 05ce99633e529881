"""What storage costs in accuracy: training curves, the error of the update, and gradients that are hard to store."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.optim import Optimizer

from adamw_triton import AdamW, param_groups_weight_decay
from adamw_triton.storage.policies import BY_NAME, Policy

from . import common, records
from .gpt import GPT, Sizes, batches, corpus
from .moments import BASELINE, EPS, KINDS, gradient_records, mixed_records, update_records
from .records import Record
from .trainer import schedule

DESCRIPTION = """\
What storage costs in accuracy. "training": a small GPT with each storage policy and several seeds, which choose weights
and batches; forward and backward in fp32 from the stored weights, gradients rounded to the policy's dtype, so that only
the optimizer differs; "torch bf16" is torch.optim.AdamW on bf16 parameters. "update": 8-bit moments of each kind, kept
in step with the fp32 ones on the gradients of a training run; the error of the update relative to its norm (mean over
steps) and of its worst element, in units of the learning rate. "gradients": weights whose gradients are tiny, rare or
always zero, in the same groups as ordinary ones; the error of all they moved in 1000 steps relative to that. "mixed":
gradients of magnitudes from 1e-9 to 1 in the same groups; the largest movement in 300 steps, the same over fp32's (the
largest of 8 seeds), and the largest single step, in units of the learning rate. "long": one training run of each of
some policies with beta2 = 0.999 and more steps."""

SIZES = Sizes(layers=2, heads=4, width=128, context=64)
BATCH = 8
LR, WEIGHT_DECAY, BETAS = 1e-3, 0.1, (0.9, 0.95)
MAX_GRAD_NORM = 1.0
TORCH = "torch bf16"
TRAINED = (
    BASELINE,
    "bf16-master32",
    "bf16-master24-8bit",
    "bf16-master24-8bit-stochastic",
    "bf16-stochastic",
    TORCH,
)
LONG_TRAINED = (BASELINE, "bf16-master32-bf16", "bf16-master24-8bit", "bf16-master24-8bit-stochastic")
LONG_BETAS = (0.9, 0.999)
PARTS = ("training", "update", "gradients", "mixed", "long")
POINTS = 50  # of a loss curve, each the mean of the steps since the last
VALIDATION_BATCHES = 32


class Trainee:
    """A GPT that computes in fp32 and whose weights are stored, and stepped, as a policy says."""

    def __init__(self, name: str, seed: int, device: torch.device, betas: tuple[float, float] = BETAS) -> None:
        torch.manual_seed(seed)
        self.model = GPT(SIZES).to(device)
        policy: Policy = BY_NAME["bf16" if name == TORCH else name]
        groups = param_groups_weight_decay(self.model, WEIGHT_DECAY)
        self.computing = [param for group in groups for param in group["params"]]
        self.stored = [nn.Parameter(param.detach().to(policy.param)) for param in self.computing]
        by_param = dict(zip(self.computing, self.stored, strict=True))
        for group in groups:
            group["params"] = [by_param[param] for param in group["params"]]
        options: dict[str, Any] = {"lr": LR, "betas": betas, "eps": EPS}
        self.optimizer: Optimizer
        if name == TORCH:
            self.optimizer = torch.optim.AdamW(groups, **options)
        else:
            self.optimizer = AdamW(groups, **options, **policy.options)

    @torch.no_grad()
    def load(self) -> None:
        for param, stored in zip(self.computing, self.stored, strict=True):
            param.copy_(stored)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        device = self.computing[0].device
        return F.cross_entropy(self.model(inputs.to(device)).flatten(0, 1), targets.to(device).flatten())

    def gradients(self, inputs: Tensor, targets: Tensor) -> float:
        """Give every stored parameter its gradient; returns the loss."""
        self.load()
        loss = self.loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.computing, MAX_GRAD_NORM)
        for param, stored in zip(self.computing, self.stored, strict=True):
            assert param.grad is not None
            stored.grad, param.grad = param.grad.to(stored.dtype), None
        return loss.item()

    def step(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = LR * factor
        self.optimizer.step()


def train(
    name: str, seed: int, steps: int, device: torch.device, betas: tuple[float, float] = BETAS
) -> Iterator[tuple[Trainee, float]]:
    """The trainee before each step, with its gradients and loss, and once more after the last."""
    trainee = Trainee(name, seed, device, betas)
    data, _ = corpus()
    for step, batch in enumerate(batches(data, batch=BATCH, context=SIZES.context, count=steps, seed=seed)):
        yield trainee, trainee.gradients(*batch)
        trainee.step(schedule(step, steps))
    yield trainee, math.nan


def training_record(
    name: str, seed: int, steps: int, device: torch.device, betas: tuple[float, float] = BETAS, case: str = "training"
) -> Record:
    losses: list[float] = []
    for trainee, loss in train(name, seed, steps, device, betas):  # noqa: B007
        losses.append(loss)
    losses.pop()
    trainee.load()
    _, held_out = corpus()
    sizes = {"batch": BATCH, "context": SIZES.context, "count": VALIDATION_BATCHES, "seed": 0}
    with torch.no_grad():
        validation = statistics.fmean(trainee.loss(*batch).item() for batch in batches(held_out, **sizes))
    every = max(1, steps // POINTS)
    curve = [statistics.fmean(losses[i : i + every]) for i in range(0, len(losses) - every + 1, every)]
    record: Record = {"command": "accuracy", "case": f"{case}, seed {seed}", "provider": name, "seed": seed}
    if not (math.isfinite(validation) and all(map(math.isfinite, curve))):
        return {**record, "error": "diverged"}
    return {**record, "steps": steps, "steps_per_point": every, "losses": curve, "validation_loss": validation}


def summaries(found: list[Record], case: str = "training") -> list[Record]:
    """Of each policy over the seeds: the mean, and how it compares with the baseline's spread."""
    by_policy: dict[str, dict[int, float]] = {}
    for record in found:
        if "validation_loss" in record:
            by_policy.setdefault(record["provider"], {})[record["seed"]] = record["validation_loss"]
    baseline = by_policy.get(BASELINE, {})
    rows: list[Record] = []
    for name, losses in by_policy.items():
        differences = [loss - baseline[seed] for seed, loss in losses.items() if seed in baseline]
        row: Record = {
            "command": "accuracy",
            "case": case,
            "provider": name,
            "mean_loss": statistics.fmean(losses.values()),
            "seed_spread": max(losses.values()) - min(losses.values()),
        }
        if differences:
            row["mean_difference"] = statistics.fmean(differences)
            row["within_spread"] = abs(row["mean_difference"]) <= max(baseline.values()) - min(baseline.values())
        rows.append(row)
    return rows


def add_options(parser: common.Parser) -> None:
    add = parser.add_argument
    add("--steps", type=common.positive_int, default=1500, help="of each training run")
    add("--seeds", type=common.positive_int, default=3, help="how many")
    add("--update-steps", type=common.positive_int, default=300, help="of the run that gives gradients")
    add("--long-steps", type=common.positive_int, default=4000, help="of each long training run")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), help="some of the parts")
    add("--device", type=common.device, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")


def measure(options: argparse.Namespace, console: Console | None = None) -> list[Record]:
    def show(iterable: Any, title: str, total: int) -> Any:
        return track(iterable, title, total, console=console, disable=console is None)

    found: list[Record] = []
    if "training" in options.only:
        runs = [(name, seed) for seed in range(options.seeds) for name in TRAINED]
        for name, seed in show(runs, "training", len(runs)):
            found.append(training_record(name, seed, options.steps, options.device))
        found += summaries(found)
    if "update" in options.only:
        steps = options.update_steps
        found += update_records(show(train(BASELINE, 0, steps, options.device), "updates", steps + 1), steps)
    if "gradients" in options.only:
        found += gradient_records()
    if "mixed" in options.only:
        found += mixed_records()
    if "long" in options.only:
        long = [
            training_record(name, 0, options.long_steps, options.device, LONG_BETAS, "long")
            for name in show(LONG_TRAINED, "long training", len(LONG_TRAINED))
        ]
        found += [*long, *summaries(long, "long")]
    return found


TABLES = {
    "training": {
        "mean_loss": "validation loss",
        "seed_spread": "spread of seeds",
        "mean_difference": "from fp32",
        "within_spread": "within fp32's spread",
    },
    "update": {"bytes_per_element": "bytes of m and v", "relative_error": "relative", "worst_element": "worst element"},
    "gradients": {f"error_{kind}": kind for kind in KINDS},
    "mixed": {
        "largest_movement": "largest movement",
        "movement_over_fp32": "over fp32's",
        "largest_step": "largest step",
    },
    "long": {"mean_loss": "validation loss", "mean_difference": "from fp32"},
}


def main(argv: list[str]) -> int:
    parser = common.Parser("accuracy", DESCRIPTION)
    add_options(parser)
    parser.add_argument("--json", type=common.json_file, help="file for the records")
    options = parser.parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    found = measure(options, console)
    for case in options.only:
        columns = TABLES[case]
        rows = [r for r in found if r["case"] == case or r["case"].startswith(f"{case}, beta2")]
        console.print(records.table(case, rows, columns))
    if options.json:
        records.write(options.json, "accuracy", argv, options.device, found)
    return 0
