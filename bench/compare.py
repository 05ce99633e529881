"""Ratios between two results, with their spread: for regressions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from . import common, records
from .records import Record

DESCRIPTION = """\
Compare two results of the same commands, quantity by quantity: the ratio B / A of the medians and, for quantities
with a spread, the ratio's range from p20 of B over p80 of A to p80 of B over p20 of A. A quantity is marked where
that range excludes 1, which noise alone seldom does. Conditions that differ are listed first."""


def flatten(found: list[Record]) -> dict[tuple[str, str, str, str], Any]:
    """Quantities by command, case, provider and name."""
    return {
        (record["command"], record["case"], record["provider"], name): value
        for record in found
        for name, value in record.items()
        if isinstance(value, (Mapping, float, int)) and not isinstance(value, bool)
    }


def ratio(a: Any, b: Any) -> tuple[float, float, float]:
    """B / A: smallest, of the medians, largest; from 0 to 0 nothing changes."""
    low_a, high_a = (a["p20"], a["p80"]) if isinstance(a, Mapping) else (a, a)
    low_b, high_b = (b["p20"], b["p80"]) if isinstance(b, Mapping) else (b, b)
    ratios = ((low_b, high_a), (records.middle(b), records.middle(a)), (high_b, low_a))
    low, median, high = (y / x if x else math.inf if y else 1.0 for y, x in ratios)
    return low, median, high


class Change(NamedTuple):
    """One quantity in two results.

    Attributes:
        key: command, case, provider and name.
        before, after: medians.
        ratio, low, high: of `ratio`.
    """

    key: tuple[str, str, str, str]
    before: float
    after: float
    low: float
    ratio: float
    high: float

    @property
    def is_marked(self) -> bool:
        """Whether noise does not explain it."""
        return not self.low <= 1 <= self.high


def changes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    """Every quantity that both results have."""
    before, after = flatten(a["records"]), flatten(b["records"])
    return [
        Change(key, records.middle(value), records.middle(after[key]), *ratio(value, after[key]))
        for key, value in before.items()
        if key in after
    ]


def main(argv: list[str]) -> int:
    parser = common.Parser("compare", DESCRIPTION)
    parser.add_argument("a", type=Path, metavar="A.json", help="the result to compare with")
    parser.add_argument("b", type=Path, metavar="B.json", help="the result to compare")
    parser.add_argument("--all", action="store_true", help="also what is the same within its spread")
    options = parser.parse(argv)
    try:
        a, b = records.read(options.a), records.read(options.b)
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    for name in ("device_name", "torch", "triton", "cuda", "gpu", "python", "path", "commit"):
        if a["conditions"].get(name) != b["conditions"].get(name):
            console.print(f"{name}: {a['conditions'].get(name)} -> {b['conditions'].get(name)}")

    before, after = flatten(a["records"]), flatten(b["records"])
    found = changes(a, b)
    table = Table(title="B / A", title_justify="left")
    for heading in ("command", "case", "provider", "quantity", "A", "B", "ratio", ""):
        table.add_column(heading)
    for change in found:
        if change.is_marked or options.all:
            spread = f"{change.ratio:.3f} ({change.low:.3f} to {change.high:.3f})"
            medians = f"{change.before:.4g}", f"{change.after:.4g}"
            table.add_row(*change.key, *medians, spread, "*" if change.is_marked else "")
    console.print(table)
    only = [len(before.keys() - after.keys()), len(after.keys() - before.keys())]
    marked = sum(change.is_marked for change in found)
    console.print(f"{len(found)} quantities compared, {marked} changed; only in A: {only[0]}, only in B: {only[1]}")
    return 0
