"""PNGs from a result's JSON alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from . import common, records
from .records import Record

DESCRIPTION = """\
Draw what a result (python -m bench suite, or --json of another command) holds: GB/s against the roofs, wall time per
model, host time against the number of tensors and on shards, bytes per parameter, and of python -m bench accuracy
--json the loss curves and the errors of the update. Nothing is measured again; a plot for which the result has no
records is named and left out."""
OURS = ("#c1272d", "#e8866f", "#f4b9a7")
OTHERS = ("#0000a7", "#008176", "#eecc16", "#8a8a8a", "#6a3d9a", "#b15928", "#1f9ed1")


def colours(providers: list[str]) -> dict[str, str]:
    """Reds for ours, whatever their variant, and other colours for the others, in their order."""
    ours = [name for name in providers if name.startswith("adamw_triton")]
    others = [name for name in providers if not name.startswith("adamw_triton")]
    return {name: OURS[i % len(OURS)] for i, name in enumerate(ours)} | {
        name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)
    }


def order(names: Any) -> list[str]:
    """As they come, ours first."""
    return sorted(dict.fromkeys(names), key=lambda name: not name.startswith("adamw_triton"))


def grouped_bars(axes: Axes, found: list[Record], quantity: str) -> None:
    """One group of bars for each case, one bar for each provider, with p20 to p80 where there is a spread."""
    cases = list(dict.fromkeys(record["case"] for record in found))
    providers = order(record["provider"] for record in found)
    width = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        bars = [r for r in found if r["provider"] == provider]
        at = [cases.index(r["case"]) + (i - (len(providers) - 1) / 2) * width for r in bars]
        values = [records.middle(r[quantity]) for r in bars]
        axes.bar(at, values, width, label=provider, color=colours(providers)[provider])
        for x, record in zip(at, bars, strict=True):
            if isinstance(record[quantity], dict):
                axes.plot([x, x], [record[quantity]["p20"], record[quantity]["p80"]], color="black", linewidth=1)
    axes.set_xticks(range(len(cases)), cases, rotation=20, ha="right")
    axes.legend(frameon=False, fontsize=8)


def draw_throughput(axes: Axes, found: list[Record]) -> bool:
    found = [r for r in found if r["command"] == "throughput" and "gb_per_s" in r]
    if not found:
        return False
    largest = max(r["elements"] for r in found)
    grouped_bars(axes, [{**r, "case": r["policy"]} for r in found if r["elements"] == largest], "gb_per_s")
    axes.set_ylabel("GB/s")
    axes.set_title(f"Throughput, {largest:,} elements")
    return True


def draw_models(axes: Axes, found: list[Record]) -> bool:
    found = [r for r in found if r["command"] == "models" and "wall_ms" in r and "features" not in r]
    if not found:
        return False
    grouped_bars(axes, found, "wall_ms")
    axes.set_yscale("log")
    axes.set_ylabel("ms per step")
    axes.set_title("Wall time of a step")
    return True


def draw_around(axes: Axes, found: list[Record]) -> bool:
    found = [r for r in found if r["command"] == "models" and "wall_ms" in r and "features" in r]
    if not found:
        return False
    grouped_bars(axes, found, "wall_ms")
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.set_title("Wall time of a step and what is around it")
    return True


def draw_host(axes: Axes, found: list[Record]) -> bool:
    found = [r for r in found if r["command"] == "host" and "tensors" in r and "host_us" in r]
    if not found:
        return False
    providers = order(r["provider"] for r in found)
    for provider in providers:
        points = [(r["tensors"], r["host_us"]) for r in found if r["provider"] == provider]
        tensors = [n for n, _ in points]
        line = colours(providers)[provider]
        axes.plot(tensors, [s["median"] for _, s in points], marker="o", label=provider, color=line)
        axes.fill_between(tensors, [s["p20"] for _, s in points], [s["p80"] for _, s in points], color=line, alpha=0.15)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("tensors")
    axes.set_ylabel("µs per step()")
    axes.set_title("Host time of step()")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False, fontsize=8)
    return True


def draw_dist(axes: Axes, found: list[Record]) -> bool:
    found = [r for r in found if r["command"] == "dist"]
    if not found:
        return False
    grouped_bars(axes, found, "host_us")
    axes.set_yscale("log")
    axes.set_ylabel("µs per step()")
    axes.set_title("Host time of step() on shards of FSDP2")
    axes.legend(frameon=False, fontsize=6, ncols=2)
    return True


def draw_bytes(axes: Axes, found: list[Record]) -> bool:
    found = [r for r in found if r["command"] == "static" and "read_bytes" in r and "policy" in r]
    policies = {r["policy"]: (r["state_bytes"], r["read_bytes"], r["written_bytes"]) for r in found}
    if not policies:
        return False
    names = list(policies)
    state, read, written = zip(*policies.values(), strict=True)
    axes.barh(names, read, color=OTHERS[0], label="read per step")
    axes.barh(names, written, left=read, color=OTHERS[1], label="written per step")
    axes.plot(state, names, "D", color=OURS[0], label="optimizer state")
    axes.invert_yaxis()
    axes.set_xlabel("bytes per parameter")
    axes.set_title("Bytes per parameter")
    axes.legend(frameon=False, fontsize=8)
    return True


def _is_training(record: Record) -> bool:
    return record["command"] == "accuracy" and "losses" in record and not record["case"].startswith("long")


def draw_training(axes: Axes, found: list[Record]) -> bool:
    """Loss curves of fp32, and how far those of the other policies are from them, seed by seed."""
    runs = {(r["provider"], r["seed"]): r for r in found if _is_training(r)}
    if not runs:
        return False
    providers = list(dict.fromkeys(provider for provider, _ in runs))
    palette = dict(zip(providers, [*OTHERS, *OURS], strict=False))
    inset = axes.inset_axes((0.52, 0.55, 0.46, 0.4))
    for (provider, seed), run in runs.items():
        at = [(j + 1) * run["steps_per_point"] for j in range(len(run["losses"]))]
        style = {"color": palette[provider], "linewidth": 1, "alpha": 0.8}
        inset.plot(at, run["losses"], **style)
        baseline = runs.get(("fp32", seed))
        if baseline is not None and provider != "fp32":
            apart = [loss - other for loss, other in zip(run["losses"], baseline["losses"], strict=True)]
            axes.plot(at, apart, **style, label=provider if seed == 0 else None)
    inset.set_yscale("log")
    inset.set_title("training loss, nats per byte", fontsize=7)
    inset.tick_params(labelsize=6, which="both")
    axes.set_ylim(top=2.2 * axes.get_ylim()[1])  # room for the inset
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss minus that of fp32")
    axes.set_title("Storage policies, one line for each seed")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return True


def draw_update(axes: Axes, found: list[Record]) -> bool:
    found = [r for r in found if r["command"] == "accuracy" and "relative_error" in r]
    if not found:
        return False
    grouped_bars(axes, found, "relative_error")
    axes.set_ylabel("relative error of the update")
    axes.set_title("8-bit and bf16 moments on the gradients of a training run")
    return True


PLOTS: dict[str, Callable[[Axes, list[Record]], bool]] = {
    "throughput": draw_throughput,
    "models": draw_models,
    "around": draw_around,
    "host": draw_host,
    "dist": draw_dist,
    "bytes": draw_bytes,
    "training": draw_training,
    "update": draw_update,
}


def figures(document: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Yield the name and the figure of each plot that a result has something for."""
    made = document["conditions"]
    for name, draw in PLOTS.items():
        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        if draw(axes, document["records"]):
            conditions = (made["device_name"], f"torch {made['torch']}", f"triton {made['triton']}", made["date"][:10])
            figure.supxlabel(", ".join(conditions), fontsize=7, color="gray")
            yield name, figure
        plt.close(figure)


def main(argv: list[str]) -> int:
    parser = common.Parser("plot", DESCRIPTION)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="what to draw")
    parser.add_argument("--output", type=Path, help="folder for the PNGs; the result's own, if not given")
    options = parser.parse(argv)
    try:
        document = records.read(options.result)
    except ValueError as error:
        parser.error(str(error))
    folder = options.output or options.result.parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = set()
    for name, figure in figures(document):
        drawn.add(name)
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        print(path)
    for name in PLOTS:
        if name not in drawn:
            print(f"{name}: not in {options.result}")
    return 0
