"""Write the tables of the README and of docs/ from results, or check that they agree.

A table stands between two comments:

    <!-- table host bench/results/some-device/suite.json -->
    <!-- end -->

whose first names what to show (a function below) and the result to take it from. What follows from arithmetic alone
has no result:

    <!-- table paper -->
    <!-- end -->
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import common, paper, records

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- table (\w+)(?: (\S+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL)
DESCRIPTION = """\
Rewrite the tables of README.md and docs/ from the results that they name; with --check, write nothing and fail if one
of them does not agree."""


def pages() -> list[str]:
    """Names of all pages, from the root."""
    return ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def conditions(document: dict[str, Any]) -> str:
    made = document["conditions"]
    return (
        f"\n{made['device_name']}, torch {made['torch']}, triton {made['triton']}, Python {made['python']}, "
        f"{made['date'][:10]}: `{made['command']}`\n"
    )


def host(document: dict[str, Any]) -> str:
    of_host = [r for r in document["records"] if r["command"] == "host"]
    found = [r for r in of_host if "host_us" in r]
    growth = {r["provider"]: f"{r['host_us_per_tensor']:.2f}" for r in of_host if r["case"].startswith("growth")}
    tensors = list(dict.fromkeys(r["tensors"] for r in found))
    times = {(r["provider"], r["tensors"]): r["host_us"]["median"] for r in found}
    rows = [
        [provider, *(f"{times[provider, n]:,.0f}" for n in tensors), growth.get(provider, "")]
        for provider in dict.fromkeys(p for p, _ in times)
    ]
    headings = ["host time of `step()`, µs", *(f"{n:,} tensors" for n in tensors), "each further tensor"]
    return markdown(headings, rows) + conditions(document)


def dist(document: dict[str, Any]) -> str:
    """Host time of steps on shards, and what they launch and reduce."""
    found = [r for r in document["records"] if r["command"] == "dist"]
    cases = {r["case"]: r["tensors"] for r in found}
    cells = {(r["provider"], r["case"]): r for r in found}
    rows = []
    for provider in dict.fromkeys(r["provider"] for r in found):
        of = [cells[provider, case] for case in cases]
        times = [f"{r['host_us']['median']:,.0f}" for r in of]
        ratios = [f"{r['times_torch_fused']:.1f}" for r in of]
        cold = [f"{r['times_torch_fused_cold']:.1f}" for r in of]
        counts = [str(of[0].get(key, "")) for key in ("all_reduces", "launches")]
        rows.append(
            [provider, *(cell for of_case in zip(times, ratios, cold, strict=True) for cell in of_case), *counts]
        )
    headings = ["host time of `step()` on shards, µs"]
    for case, tensors in cases.items():
        headings += [f"{case}, {tensors} tensors", "torch on DTensors / this", "the same, cold"]
    return markdown([*headings, "all-reduces", "launches"], rows) + conditions(document)


def cpu(document: dict[str, Any]) -> str:
    """Steps of parameters on the CPU."""
    found = [r for r in document["records"] if r["command"] == "cpu"]
    rows = [
        [r["case"], r["provider"], f"{r['wall_ms']['median']:,.1f}", f"{r['this_over_torch_fused']:.2f}"] for r in found
    ]
    return markdown(["parameters on the CPU", "", "step, ms", "this / torch fused"], rows) + conditions(document)


def static(document: dict[str, Any]) -> str:
    of_policies = [r for r in document["records"] if r["command"] == "static" and "state_bytes" in r]
    found = [r for r in of_policies if r.get("instructions_per_element")]
    targets = list(dict.fromkeys(r["target"] for r in found))
    rows = []
    for policy, kernel in dict.fromkeys((r["policy"], r["kernel"]) for r in found):
        of_kernel = [r for r in found if (r["policy"], r["kernel"]) == (policy, kernel)]
        cells = {r["target"]: f"{r['instructions_per_element']:.1f}" for r in of_kernel}
        counts = [cells.get(target, "") for target in targets]
        rows.append([policy, kernel, f"{of_kernel[0]['bytes_per_element']:.4g}", *counts])
    return markdown(["policy", "entry", "bytes", *targets], rows) + conditions(document)


def features(document: dict[str, Any]) -> str:
    """Instructions per element that each feature adds."""
    found = [r for r in document["records"] if r.get("feature") and "added_instructions" in r]
    policies, targets = (list(dict.fromkeys(r[key] for r in found)) for key in ("policy", "target"))
    cells = {(r["feature"], r["policy"], r["target"]): f"{r['added_instructions']:.1f}" for r in found}
    rows = [
        [FEATURES[feature], *(" / ".join(cells.get((feature, p, t), "?") for t in targets) for p in policies)]
        for feature in dict.fromkeys(r["feature"] for r in found)
        if feature in FEATURES
    ]
    return markdown([" / ".join(targets), *policies], rows) + conditions(document)


def norm(document: dict[str, Any]) -> str:
    """Instructions per element of the gradient norm, and the budget of each device."""
    found = [r for r in document["records"] if r.get("kernel") == "norm" and "instructions_per_element" in r]
    rows = []
    for r in found:
        budgets = [f"{k.split('_')[0].upper()} {v:.0f}" for k, v in r.items() if k.endswith("_instruction_budget")]
        counts = [f"{r['bytes_per_element']}", f"{r['instructions_per_element']:.1f}", r["access_bytes"]]
        rows.append([r["policy"], r["target"], *counts, ", ".join(budgets)])
    headings = ["gradients", "target", "bytes", "instructions", "bytes of an access", "budget"]
    return markdown(headings, rows) + conditions(document)


def arithmetic(document: dict[str, Any]) -> str:
    found = [r for r in document["records"] if r["command"] == "arithmetic"]
    cells = [f"{r['rms_ulp']:.2f}" for r in found]
    return markdown([r["provider"] for r in found], [cells]) + conditions(document)


def memory(document: dict[str, Any]) -> str:
    found = {r["policy"]: r for r in document["records"] if r["command"] == "static" and "state_bytes" in r}
    keys = ("state_bytes", "read_bytes", "written_bytes", "bytes_per_element")
    rows = [[r["storage"], *(f"{r[key]:.4g}" for key in keys)] for r in found.values()]
    headings = ["stored", "state, bytes per parameter", "read per step", "written", "together"]
    return markdown(headings, rows) + conditions(document)


def training(document: dict[str, Any]) -> str:
    found = [r for r in document["records"] if r["command"] == "accuracy" and r["case"] == "training"]
    rows = [
        [
            r["provider"],
            f"{r['mean_loss']:.4f}",
            f"{r['seed_spread']:.4f}",
            f"{r['mean_difference']:+.4f}",
            "yes" if r["within_spread"] else "no",
        ]
        for r in found
    ]
    headings = ["policy", "validation loss", "spread of seeds", "from fp32, same seeds", "within fp32's spread"]
    return markdown(headings, rows) + conditions(document)


def long(document: dict[str, Any]) -> str:
    found = [r for r in document["records"] if r["command"] == "accuracy" and r["case"] == "long"]
    rows = [[r["provider"], f"{r['mean_loss']:.4f}", f"{r['mean_difference']:+.4f}"] for r in found]
    return markdown(["policy", "validation loss", "from fp32, same seed"], rows) + conditions(document)


def update(document: dict[str, Any]) -> str:
    found = [r for r in document["records"] if r["command"] == "accuracy" and "relative_error" in r]
    betas = list(dict.fromkeys(r["beta2"] for r in found))
    rows = []
    for name in dict.fromkeys(r["provider"] for r in found):
        of = {r["beta2"]: r for r in found if r["provider"] == name}
        errors = [f"{100 * of[b]['relative_error']:.2g} %" for b in betas]
        worst = [f"{of[b]['worst_element']:.2g}" for b in betas]
        rows.append([name, f"{of[betas[0]]['bytes_per_element']:.3g}", *errors, *worst])
    headings = ["m and v", "bytes", *(f"error, β₂ {b:g}" for b in betas), *(f"worst, β₂ {b:g}" for b in betas)]
    return markdown(headings, rows) + conditions(document)


def gradients(document: dict[str, Any]) -> str:
    found = [r for r in document["records"] if r["command"] == "accuracy" and r["case"].startswith("gradients")]
    kinds = [key for key in found[0] if key.startswith("error_")]
    rows = [[r["provider"], f"{r['beta2']:g}", *(f"{r[kind]:.2g}" for kind in kinds)] for r in found]
    return markdown(["m and v", "β₂", *(kind.removeprefix("error_") for kind in kinds)], rows) + conditions(document)


def mixed(document: dict[str, Any]) -> str:
    found = [r for r in document["records"] if r["command"] == "accuracy" and "largest_step" in r]
    keys = ("largest_movement", "movement_over_fp32", "largest_step")
    rows = [[r["provider"], f"{r['beta2']:g}", *(f"{r[key]:.3g}" for key in keys)] for r in found]
    headings = ["m and v", "β₂", "largest movement", "over fp32's", "largest step"]
    return markdown(headings, rows) + conditions(document)


def train(document: dict[str, Any]) -> str:
    """The main job, whose result has a form of its own."""
    rows = []
    for index, run in enumerate(document["runs"]):
        differences = [f"{run['difference'][name]:.1g}" if index else "" for name in ("loss", "weight")]
        rows.append([run["label"], f"{run['validation_loss']:.4f}", *differences])
    headings = ["optimizer", "validation loss", "largest difference of losses", "of weights"]
    return markdown(headings, rows) + conditions(document)


def on_paper() -> str:
    """Memory and step time of large models, by arithmetic."""
    parts = []
    for headings, rows, lines in paper.sections():
        parts.append(markdown(headings, rows) + ("\n```\n" + "\n".join(lines) + "\n```\n" if lines else ""))
    return "\n".join(parts)


FEATURES = {
    "control": "factor and flag: clip, unscale, skip",
    "statistics": "norms of update and parameters",
    "cautious": "cautious decay",
}
TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "arithmetic": arithmetic,
    "cpu": cpu,
    "dist": dist,
    "features": features,
    "norm": norm,
    "gradients": gradients,
    "long": long,
    "mixed": mixed,
    "host": host,
    "memory": memory,
    "static": static,
    "train": train,
    "training": training,
    "update": update,
}


COMPUTED: dict[str, Callable[[], str]] = {"paper": on_paper}


def rewritten(text: str) -> str:
    """A page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        opening, name, path, _, end = match.groups()
        return opening + (TABLES[name](records.read(ROOT / path)) if path else COMPUTED[name]()) + end

    return BLOCK.sub(made, text)


def main(argv: list[str]) -> int:
    parser = common.Parser("docs", DESCRIPTION)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table does not agree")
    options = parser.parse(argv)
    status = 0
    for name in pages():
        page = ROOT / name
        text = page.read_text()
        new = rewritten(text)
        if not options.check:
            page.write_text(new)
        elif new != text:
            print(f"{name} does not agree with bench/results: run python -m bench docs")
            status = 1
    return status
