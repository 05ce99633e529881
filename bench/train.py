"""Train a small GPT twice from the same seed, with torch.optim.AdamW and with ours, and compare.

With `--distributed`, on several local processes and on one.
"""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from adamw_triton import AdamW
from adamw_triton.storage.policies import BY_NAME, POLICIES, Policy

from . import common, train_report
from .gpt import GPT, Sizes, batches, corpus
from .processes import ProcessError
from .ranks import STEPS as DISTRIBUTED_STEPS
from .ranks import WRAPPERS, refused
from .trainer import SPOILED_EVERY, VALIDATION_BATCHES, Contestant, Features, Run, Trainer, contestants_of

STEPS = 400


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


def compare(options: Namespace, argv: list[str], ours: type[Optimizer], console: Console) -> dict[str, Any]:
    """Train with each optimizer; everything that was found, ready for JSON."""
    device: torch.device = options.device
    policy: Policy = options.policy
    features: Features = options.features
    contestants = contestants_of(policy, features, device, ours)
    if not options.control:
        contestants = contestants[:2]
    sizes = Sizes(options.layers, options.heads, options.width, options.context)
    torch.manual_seed(options.seed)
    initial = GPT(sizes).to(device, policy.param)
    # The only attention whose backward pass is deterministic on every GPU.
    with sdpa_kernel(SDPBackend.MATH), train_report.progress(console) as bar:
        runs = train(contestants, initial, options, bar)

    on_cpu = common.kernel_path(device) == "eager reference on the CPU"
    exact = policy.name == "fp32" and on_cpu and not features.names
    return train_report.report_of(runs, options, argv, exact=exact, judged=1)


def _job(options: Namespace) -> Callable[..., dict[str, Any]]:
    if options.distributed is None:
        return compare
    from . import train_distributed  # much of PyTorch, which the other job does without

    return train_distributed.compare


def main(argv: list[str], ours: type[Optimizer] = AdamW) -> int:
    """Run the job; `ours` is for a test that shows that a wrong optimizer is found out."""
    parser = common.Parser(
        "train",
        "Train a small GPT on the source of Python's standard library, with torch's AdamW and with ours from the same "
        "weights on the same batches, and compare losses, weights, step time and memory. Status 1 if they diverge. "
        "With --distributed, torch's on one process and ours on several, which share each batch; clipping is then in "
        "our step. " + " ".join(f"{name}: {wrapper.description}." for name, wrapper in WRAPPERS.items()),
    )
    add = parser.add_argument
    add("--distributed", choices=WRAPPERS, help="train on several local processes, and on one")
    add(
        "--processes", type=common.positive_int, nargs="+", help="with --distributed: how many, one run for each number"
    )
    add("--time-limit", type=common.non_negative_float, default=600.0, help="seconds of a run with --distributed")
    few = f"optimizer steps of each run; default: {STEPS}, with --distributed {DISTRIBUTED_STEPS}"
    add("--steps", type=common.positive_int, help=few)
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
    files = "folder for loss.png and train.json; default: out/train, with --distributed out/NAME"
    add("--output", type=common.output_folder, help=files)
    add(
        "--control",
        action="store_true",
        help="train once more, with torch's other implementation; with --distributed, with ours on one process",
    )
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

    reason = refused(options)
    if reason:
        parser.error(reason)
    options.steps = options.steps or (DISTRIBUTED_STEPS if options.distributed else STEPS)
    options.output = options.output or common.output_folder(f"out/{options.distributed or 'train'}")

    try:
        job = _job(options)
        found = job(options, argv, ours, Console(stderr=True))
    except ProcessError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 3
    (options.output / "train.json").write_text(
        json.dumps(train_report.as_json(found), indent=1, allow_nan=False) + "\n"
    )
    train_report.plot(found, options.output / "loss.png")
    # Wide enough for the table where there is no terminal.
    console = Console() if os.isatty(1) else Console(width=160)
    train_report.show(found, console)
    console.print(f"written: {options.output / 'loss.png'}, {options.output / 'train.json'}")
    return 0 if found["agree"] else 1
