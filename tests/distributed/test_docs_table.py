"""Each row of the table in docs/distributed.md names tests, and these exist."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "distributed.md").read_text(encoding="utf-8")
SECTION = PAGE.split("## What works with what")[1].split("\n## ")[0]
ROWS = [line for line in SECTION.splitlines() if line.startswith("| ")][1:]


def test_there_is_a_table():
    assert len(ROWS) > 15


@pytest.mark.fast
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_row(row):
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", row.split("|")[3])
    assert named, "the last column names tests"
    for file, function in named:
        path = TESTS / file if "/" in file else TESTS / "distributed" / file
        assert path.is_file(), file
        if function:
            assert re.search(rf"^def {function}\(", path.read_text(encoding="utf-8"), re.MULTILINE), (
                f"{file}::{function}"
            )
