"""Records of measurements: flat dictionaries, written as JSON with the conditions they were made under.

A record has `command`, `case` and `provider`, and then either measured quantities, named with their unit and
each a number or a spread, or `error`: one sentence that says why there are none.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from . import common

SCHEMA_VERSION = 1
Record = dict[str, Any]


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile, as triton.testing reports them."""
    if len(samples) == 1:
        return {"p20": samples[0], "median": samples[0], "p80": samples[0], "n": 1}
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return {"p20": fifths[0], "median": statistics.median(samples), "p80": fifths[3], "n": len(samples)}


def middle(quantity: Any) -> float:
    """The median of a spread, or a number itself."""
    return quantity["median"] if isinstance(quantity, Mapping) else quantity


def write(path: Path, command: str, argv: Sequence[str], device: torch.device, records: Sequence[Record]) -> None:
    """Write records and conditions as JSON."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "conditions": common.conditions(command, list(argv), device),
        "records": list(records),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote.

    Raises:
        ValueError: not such a file, or of another schema version.
    """
    try:
        document = json.loads(path.read_text())
        version = document["schema_version"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of python -m bench: {error}") from None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version}; this version of bench reads {SCHEMA_VERSION}")
    return document


def table(title: str, records: Sequence[Record], columns: Mapping[str, str]) -> Table:
    """A table of records: `columns` maps keys to headings; spreads as median (p20 to p80), errors below it."""
    made = Table(title=title, title_justify="left")
    for heading in ("case", "provider", *columns.values()):
        made.add_column(heading, justify="left" if heading in ("case", "provider") else "right")
    for record in records:
        if "error" not in record:
            cells = [cell(record.get(key)) for key in columns]
            made.add_row(escape(record["case"]), escape(record["provider"]), *cells)
    failed = [f"{r['case']}, {r['provider']}: {r['error']}" for r in records if "error" in r]
    made.caption = escape("\n".join(failed)) or None
    made.caption_justify = "left"
    return made


def cell(quantity: Any) -> str:
    """A quantity as text: a spread as median (p20 to p80)."""
    if quantity is None:
        return ""
    if isinstance(quantity, Mapping):
        return f"{cell(quantity['median'])} ({cell(quantity['p20'])} to {cell(quantity['p80'])})"
    if isinstance(quantity, float):
        return f"{quantity:,.0f}" if 1e4 <= abs(quantity) < 1e9 else f"{quantity:.4g}"
    return str(quantity)
