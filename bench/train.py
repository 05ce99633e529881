"""Train a small GPT twice from the same seed, with torch.optim.AdamW and with ours, and compare."""

from __future__ import annotations

import copy
import json
import math
import os
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from adamw_triton import AdamW, param_groups_weight_decay

from . import common
from .data import batches, corpus
from .gpt import GPT, Sizes
from .loop import Features, Loop, schedule, spoil
from .policies import BY_NAME, POLICIES, Policy, dtype_name

BETAS = (0.9, 0.95)
MAX_GRAD_NORM = 1.0
VALIDATION_BATCHES = 16
WARM_UP = 5  # steps that the median step time leaves out
MIB = 2**20
SPOILED_EVERY = 7  # steps, of which one has a NaN in a gradient, with --skip-nonfinite


class Contestant(NamedTuple):
    """An optimizer, and whether it does itself what is around the step."""

    label: str
    make: Callable[..., Optimizer]
    folded: bool = False


@dataclass
class Run:
    """One training run."""

    label: str
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    validation_loss: float = math.nan
    state_bytes: int = 0
    first_step_bytes: int | None = None


def tolerances(dtype: torch.dtype, exact: bool, steps: int) -> dict[str, float]:
    """How far two runs may be apart: losses, and weights in units of the largest of their tensor.

    exact: the eager reference takes the operations of torch's loop in fp32, and gives its bits. Otherwise every step
    differs by roundings, which training amplifies: room grows with the steps, so that a short run, in which little
    can drift, finds small mistakes. For scale, over 400 steps at the default sizes torch's own two CPU
    implementations ended 7e-7 and 3e-6 apart in fp32, and 8e-3 and 0.1 in bf16, with one seed.
    """
    if dtype.itemsize < 4:
        return {"loss": 2e-2, "relative": 0.5}
    if exact:
        return {"loss": 1e-6, "relative": 1e-5}
    return {"loss": min(1e-3, 2.5e-6 * steps), "relative": min(1e-2, 5e-6 * steps)}


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


class Trainer:
    """A model and its optimizer; everything but the optimizer's class is the same in every one."""

    def __init__(self, contestant: Contestant, model: GPT, options: Namespace) -> None:
        self.run = Run(contestant.label)
        self.model = model
        self.device: torch.device = options.device
        groups = param_groups_weight_decay(model, options.weight_decay)
        self.optimizer = contestant.make(groups, lr=options.lr, betas=BETAS, eps=1e-8)
        features: Features = options.features
        clip = None if features.clips_by_itself else MAX_GRAD_NORM
        self.loop = Loop(self.optimizer, model, features, self.device, folded=contestant.folded, clip=clip)
        if features.skip_nonfinite:
            n_params = len(self.loop.params)
            spoil(self.loop.params, lambda index: self._is_spoiled() and index == len(self.run.losses) % n_params)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(schedule, steps=options.steps))

    def _is_spoiled(self) -> bool:
        return len(self.run.losses) % SPOILED_EVERY == SPOILED_EVERY - 1

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = self.model(inputs.to(self.device)).flatten(0, 1).float()
        return F.cross_entropy(logits, targets.to(self.device).flatten())

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        loss = self.loss(inputs, targets)
        self.loop.backward(loss)
        ms, added = timed_step(self.loop, self.device)
        if not self.run.losses:
            self.run.first_step_bytes = added
        self.loop.zero_grad()
        self.scheduler.step()
        self.run.losses.append(loss.item())
        self.run.step_ms.append(ms)

    @torch.no_grad()
    def finish(self, held_out: list[tuple[Tensor, Tensor]]) -> Run:
        self.run.validation_loss = statistics.fmean(self.loss(*batch).item() for batch in held_out)
        self.run.weights = [param.detach() for param in self.model.parameters()]
        self.run.state_bytes = state_bytes(self.optimizer)
        return self.run


def train(contestants: Sequence[Contestant], initial: GPT, options: Namespace, bar: Progress) -> list[Run]:
    """Train a copy of `initial` with each optimizer, in turns, so that what slows the machine slows all of them."""
    training, validation = corpus()
    sizes = {"batch": options.batch, "context": options.context}
    trainers = [Trainer(contestant, copy.deepcopy(initial), options) for contestant in contestants]
    task = bar.add_task("training", total=options.steps, loss=math.nan)
    for batch in batches(training, **sizes, count=options.steps, seed=options.seed):
        for trainer in trainers:
            trainer.step(*batch)
        bar.update(task, advance=1, loss=trainers[0].run.losses[-1])
    held_out = list(batches(validation, **sizes, count=VALIDATION_BATCHES, seed=options.seed + 1))
    return [trainer.finish(held_out) for trainer in trainers]


def timed_step(loop: Loop, device: torch.device) -> tuple[float, int | None]:
    """Milliseconds from gradients to new weights, and on a GPU the bytes that added at its peak."""
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    common.synchronize(device)
    start = time.perf_counter()
    loop.step()
    common.synchronize(device)
    ms = (time.perf_counter() - start) * 1e3
    return ms, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None


def state_bytes(optimizer: Optimizer) -> int:
    tensors = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    storages = {(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def compare(options: Namespace, argv: list[str], ours: type[Optimizer], console: Console) -> dict[str, Any]:
    """Train with each optimizer; everything that was found, ready for JSON."""
    device: torch.device = options.device
    policy: Policy = options.policy
    features: Features = options.features
    dtype = policy.param
    contestants = contestants_of(policy, features, device, ours)
    if not options.control:
        contestants = contestants[:2]

    sizes = Sizes(options.layers, options.heads, options.width, options.context)
    torch.manual_seed(options.seed)
    initial = GPT(sizes).to(device, dtype)
    # The only attention whose backward pass is deterministic on every GPU.
    with sdpa_kernel(SDPBackend.MATH), progress(console) as bar:
        runs = train(contestants, initial, options, bar)

    on_cpu = common.kernel_path(device) == "eager reference on the CPU"
    exact = policy.name == "fp32" and on_cpu and not features.names
    tolerance = tolerances(min(policy.dtypes, key=lambda dtype: dtype.itemsize), exact, options.steps)
    differences = [Difference.of(run, runs[0]) for run in runs]
    training, validation = corpus()
    return {
        "schema_version": 1,
        "job": "train",
        "conditions": common.conditions("train", argv, device),
        "model": {
            **asdict(sizes),
            "parameters": sizes.parameters(),
            "policy": policy.name,
            "dtype": dtype_name(dtype),
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
        "agree": differences[1].within(tolerance),
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


def contestants_of(policy: Policy, features: Features, device: torch.device, ours: type[Optimizer]) -> list[Contestant]:
    """The reference, ours and the control. Only the second folds what is around the step into it."""
    if policy.is_plain and policy.param == policy.exp_avg == policy.exp_avg_sq:
        make = partial(torch.optim.AdamW, amsgrad=policy.amsgrad)
        loop = Contestant("torch.optim.AdamW foreach=False", partial(make, foreach=False))
        fused = Contestant("torch.optim.AdamW fused=True", partial(make, fused=True))
    else:  # torch stores nothing in this way: torch's passes around our step
        plain = partial(ours, **policy.options)
        loop = Contestant("adamw_triton.AdamW, torch's passes", partial(plain, foreach=False))
        fused = Contestant("adamw_triton.AdamW, torch's passes, one launch", partial(plain, foreach=True))
    reference, control = (fused, loop) if device.type == "cuda" else (loop, fused)
    label = ", ".join(["adamw_triton.AdamW", *features.names])
    options = {**policy.options, **features.options} if policy.name != "fp32" or features.names else {}
    return [reference, Contestant(label, partial(ours, **options), folded=True), control]


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
    styles = [("#0000a7", "-", 2.5), ("#c1272d", "--", 1.2), ("#008176", ":", 1.2)]
    reference = report["runs"][0]["losses"]
    for run, (colour, dashes, width) in zip(report["runs"], styles, strict=False):
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


def main(argv: list[str], ours: type[Optimizer] = AdamW) -> int:
    """Run the job; `ours` is for a test that shows that a wrong optimizer is found out."""
    parser = common.Parser(
        "train",
        "Train a small GPT on the source of Python's standard library, with torch's AdamW and with ours from the same "
        "weights on the same batches, and compare losses, weights, step time and memory. Status 1 if they diverge.",
    )
    add = parser.add_argument
    add("--steps", type=common.positive_int, default=400, help="optimizer steps of each run")
    add("--layers", type=common.positive_int, default=3, help="blocks of the GPT")
    add("--heads", type=common.positive_int, default=4, help="attention heads, a divisor of the width")
    add("--width", type=common.positive_int, default=256, help="width of the residual stream")
    add("--context", type=common.positive_int, default=64, help="bytes in a sequence")
    add("--batch", type=common.positive_int, default=8, help="sequences in a batch")
    add("--lr", type=common.non_negative_float, default=6e-4, help="peak learning rate")
    add("--weight-decay", type=common.non_negative_float, default=0.1, help="of matrices and embeddings")
    add("--seed", type=common.seed, default=0, help="of weights and batches")
    add("--device", type=common.device, default="auto", help="auto (a GPU if there is one), cpu, cuda or cuda:N")
    # In fp16 torch's loop divides 0 by 0, its eps being 0, and its GradScaler refuses to unscale.
    names = [p.name for p in POLICIES if p.grad == p.param != torch.float16]
    add("--policy", choices=names, default="fp32", help="how parameters and state are stored")
    add("--max-grad-norm", type=common.non_negative_float, help="clip in our step; torch's is a pass before it")
    add(
        "--amp",
        action="store_true",
        help="with GradScaler, whose work our step does; no clipping, unless --max-grad-norm",
    )
    add("--skip-nonfinite", action="store_true", help=f"with a NaN in a gradient of one step in {SPOILED_EVERY}")
    add("--release", action="store_true", help="gradient release in ours; no clipping")
    add("--capturable", action="store_true", help="step counts and hyper-parameters on the device")
    add("--output", type=common.output_folder, default="out/train", help="folder for loss.png and train.json")
    add("--control", action="store_true", help="train a third time, with torch's other implementation")
    options = parser.parse(argv)
    if options.width % options.heads:
        parser.error(f"got --width {options.width} --heads {options.heads}; allowed: a width divisible by the heads")
    options.policy = BY_NAME[options.policy]
    options.features = Features(
        options.max_grad_norm, options.amp, options.skip_nonfinite, options.release, options.capturable
    )
    if options.max_grad_norm == 0.0:
        parser.error("got --max-grad-norm 0; allowed: a number above 0")
    if options.features.refused:
        parser.error(f"got --release with --max-grad-norm or --amp; allowed: one of them, {options.features.refused}")
    shortest = min(map(len, corpus()))
    if options.context >= shortest:
        parser.error(f"got --context {options.context}; allowed: less than {shortest}, the bytes of validation text")

    report = compare(options, argv, ours, Console(stderr=True))
    (options.output / "train.json").write_text(json.dumps(as_json(report), indent=1, allow_nan=False) + "\n")
    plot(report, options.output / "loss.png")
    # Wide enough for the table where there is no terminal.
    console = Console() if os.isatty(1) else Console(width=160)
    show(report, console)
    console.print(f"written: {options.output / 'loss.png'}, {options.output / 'train.json'}")
    return 0 if report["agree"] else 1
