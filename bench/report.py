"""One HTML page of a result, as people want to look at it: conditions, plots, tables, differences to another result."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2

from . import common, compare, plot, records

DESCRIPTION = """\
Write one self-contained HTML page from a result: its conditions, its plots, and a table for each command, sorted by a
click on a heading. With a second result, the page lists what noise does not explain, as `compare` does."""
TEMPLATE = Path(__file__).with_name("report.html")
OURS = "adamw_triton"
HIDDEN = {"command", "case", "provider", "losses", "spans"}


def cells(record: records.Record, columns: list[str]) -> list[dict[str, Any]]:
    """Text, and the number to sort by, of each column."""
    made = []
    for name in columns:
        value = record.get(name)
        number = records.middle(value) if isinstance(value, (dict, float, int)) and "error" not in record else None
        made.append({"text": value if isinstance(value, str) else records.cell(value), "number": number})
    return made


def tables(found: list[records.Record]) -> list[dict[str, Any]]:
    """A table for each command: columns that some record has, and whether they are text; rows; what failed."""
    made = []
    for command in dict.fromkeys(record["command"] for record in found):
        of_command = [record for record in found if record["command"] == command]
        measured = [record for record in of_command if "error" not in record]
        names = [
            name for name in dict.fromkeys(name for record in measured for name in record)
            if name not in HIDDEN and not any(isinstance(record.get(name), list) for record in measured)
        ]  # fmt: skip
        providers = {record["provider"] for record in measured}
        columns = ["case", *(["provider"] if len(providers) > 1 else []), *names]
        rows = [cells(record, columns) for record in measured]
        is_text = [all(row[i]["number"] is None for row in rows) for i in range(len(columns))]
        is_ours = [len(providers) > 1 and record["provider"].startswith(OURS) for record in measured]
        errors = [f"{r['case']}, {r['provider']}: {r['error']}" for r in of_command if "error" in r]
        table = {"columns": list(zip(columns, is_text, strict=True)), "rows": list(zip(rows, is_ours, strict=True))}
        made.append({"command": command, **table, "errors": errors})
    return made


def images(document: dict[str, Any]) -> list[dict[str, str]]:
    """Plots as data URLs."""
    made = []
    for name, figure in plot.figures(document):
        memory = io.BytesIO()
        figure.savefig(memory, dpi=110, format="png")
        made.append({"name": name, "data": base64.b64encode(memory.getvalue()).decode()})
    return made


def page(document: dict[str, Any], other: dict[str, Any] | None = None) -> str:
    """The whole page.

    Args:
        document: the result.
        other: an earlier result, which it is compared with.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(TEMPLATE.read_text())
    return template.render(
        conditions={name: value for name, value in document["conditions"].items() if value not in (None, {}, "")},
        images=images(document),
        tables=tables(document["records"]),
        before=None if other is None else other["conditions"],
        changes=[] if other is None else [c for c in compare.changes(other, document) if c.is_marked],
    )


def main(argv: list[str]) -> int:
    parser = common.Parser("report", DESCRIPTION)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="what to show")
    parser.add_argument("--against", type=Path, metavar="OTHER.json", help="an earlier result to compare with")
    parser.add_argument("--output", type=Path, help="the HTML file; beside the result, if not given")
    options = parser.parse(argv)
    try:
        document = records.read(options.result)
        other = None if options.against is None else records.read(options.against)
    except ValueError as error:
        parser.error(str(error))
    path = options.output or options.result.with_suffix(".html")
    path.write_text(page(document, other))
    print(path)
    return 0
