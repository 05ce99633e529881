"""Records, comparison, plots and README tables, from results made up here."""

import json
import math
import os
import subprocess
import sys
from html.parser import HTMLParser
from unittest import mock

import pytest
import torch

from bench import __main__ as bench
from bench import compare, docs, host, plot, records, report, suite

WITH_JSON = ("static", "host", "arithmetic", "accuracy", "throughput", "models", "tune")


def document(tmp_path, found, name="result.json"):
    records.write(tmp_path / name, "suite", ["--only", "host"], torch.device("cpu"), found)
    return tmp_path / name


def spread(median, wide=1.1):
    return {"p20": median / wide, "median": median, "p80": median * wide, "n": 9}


def host_records(factor=1.0):
    return [
        {
            "command": "host", "case": f"{n} tensors", "provider": provider, "tensors": n,
            "host_us": spread(n * us * (factor if provider == "adamw_triton" else 1)), "host_us_per_tensor": us,
        }
        for n in (10, 100)
        for provider, us in (("bare scan", 0.25), ("adamw_triton", 0.4), ("torch fused", 4.0))
    ]  # fmt: skip


def all_records():
    return [
        *host_records(),
        *(
            {
                "command": "throughput", "case": f"2^{e} {policy}", "provider": provider, "policy": policy,
                "elements": 2**e, "gb_per_s": spread(gb),
            }
            for e in (10, 30)
            for policy in ("fp32", "bf16")
            for provider, gb in (("adamw_triton", 2900.0), ("torch fused", 2500.0), ("skeleton 4R3W", 3000.0))
        ),
        *(
            {"command": "models", "case": model, "provider": provider, "wall_ms": spread(ms)}
            for model in ("gpt-2", "resnet-50")
            for provider, ms in (("torch fused", 2.0), ("adamw_triton", 1.0))
        ),
        {"command": "models", "case": "gpt-2", "provider": "torchao 8-bit", "error": "not installed"},
        *(
            {"command": "models", "case": f"gpt-2 {name}", "provider": p, "features": name, "wall_ms": spread(ms)}
            for name in ("clip", "release")
            for p, ms in (("torch fused", 3.0), ("adamw_triton", 1.0))
        ),
        *(
            {
                "command": "static", "case": f"fp32 table sm_90 + {name}", "provider": "adamw_triton", "policy": "fp32",
                "kernel": "table", "target": "sm_90", "feature": name, "instructions_per_element": 36.1 + added,
                "added_instructions": added,
            }
            for name, added in (("", 0.0), ("control", 2.0))
        ),
        {
            "command": "static", "case": "norm of bf16 gradients sm_90", "provider": "adamw_triton", "policy": "bf16",
            "kernel": "norm", "target": "sm_90", "instructions_per_element": 4.4, "bytes_per_element": 2,
            "access_bytes": "16", "h100_instruction_budget": 19.97,
        },
        {
            "command": "static", "case": "fp32 table sm_90", "provider": "adamw_triton", "policy": "fp32",
            "kernel": "table", "target": "sm_90", "instructions_per_element": 36.1, "bytes_per_element": 28,
            "read_bytes": 16, "written_bytes": 12, "state_bytes": 8,
        },
        *(
            {
                "command": "accuracy", "case": f"training, seed {seed}", "provider": name, "seed": seed,
                "losses": [5.0, 4.0 + seed, 3.0], "steps_per_point": 10, "steps": 30, "validation_loss": 3.0,
            }
            for seed in range(2)
            for name in ("fp32", "bf16-master32")
        ),
        *(
            {
                "command": "accuracy", "case": f"update, beta2 {beta2}", "provider": name, "beta2": beta2,
                "relative_error": 0.01, "worst_element": 0.1, "bytes_per_element": 2.0,
            }
            for beta2 in (0.95, 0.999)
            for name in ("adamw_triton 8-bit", "linear 8-bit")
        ),
    ]  # fmt: skip


def test_spread_is_the_order_statistics():
    assert records.spread([5.0]) == {"p20": 5.0, "median": 5.0, "p80": 5.0, "n": 1}
    found = records.spread([float(x) for x in range(101)])
    assert (found["p20"], found["median"], found["p80"], found["n"]) == (20, 50, 80, 101)


def test_records_are_read_back_and_others_refused(tmp_path):
    path = document(tmp_path, host_records())
    read = records.read(path)
    assert read["records"] == host_records()
    assert {"date", "command", "device_name", "torch", "triton", "python", "commit"} <= read["conditions"].keys()
    path.write_text(json.dumps({**read, "schema_version": 99}))
    with pytest.raises(ValueError, match="schema version 99"):
        records.read(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="is not a result"):
        records.read(path)


@pytest.mark.fast
def test_compare_marks_what_changed_beyond_its_spread(tmp_path, capsys):
    before = document(tmp_path, host_records(), "a.json")
    assert compare.main([str(before), str(document(tmp_path, host_records(1.05), "b.json"))]) == 0
    assert "18 quantities compared, 0 changed" in capsys.readouterr().out
    assert compare.main([str(before), str(document(tmp_path, host_records(2.0), "c.json"))]) == 0
    out = capsys.readouterr().out
    assert "18 quantities compared, 2 changed" in out and "2.000" in out
    assert compare.ratio(2.0, 3.0) == (1.5, 1.5, 1.5)
    assert compare.ratio(0, 0) == (1.0, 1.0, 1.0) and compare.ratio(0, 5) == (math.inf,) * 3
    assert compare.ratio(spread(2.0, 1.25), spread(3.0, 1.25)) == pytest.approx((0.96, 1.5, 2.34375))


class Page(HTMLParser):
    """Text of each table's cells by row, the headings before tables, and what the page fetches."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.fetched, self.headings, self.inside = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.fetched += [value for name, value in attrs if name in ("src", "href")]
        if tag in ("table", "tr", "td", "th"):
            place = {"table": self.tables, "tr": self.tables[-1:]}.get(tag, self.tables[-1:] and self.tables[-1][-1:])
            (place if tag == "table" else place[0]).append("" if tag in ("td", "th") else [])

    def handle_data(self, data):
        if self.inside in ("td", "th") and self.tables:
            self.tables[-1][-1][-1] += data
        if self.inside == "h2" and data.strip():
            self.headings.append(data)

    def handle_endtag(self, tag):
        self.inside = ""


def test_a_report_is_one_page_with_every_record(tmp_path, capsys):
    before, path = document(tmp_path, host_records(), "a.json"), document(tmp_path, all_records(), "b.json")
    assert report.main([str(path)]) == 0
    text = path.with_suffix(".html").read_text()
    page = Page(text)
    commands = list(dict.fromkeys(record["command"] for record in all_records()))
    assert page.headings == ["Conditions", "Plots", *commands]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.fetched), "it needs nothing else"
    of_host = page.tables[1 + commands.index("host")]
    assert of_host[0] == ["case", "provider", "tensors", "host_us", "host_us_per_tensor"]
    assert of_host[1] == ["10 tensors", "bare scan", "10", "2.5 (2.273 to 2.75)", "0.25"]
    assert len(of_host) == 1 + len(host_records())
    assert "gpt-2, torchao 8-bit: not installed" in text
    slower = document(tmp_path, host_records(2.0), "c.json")
    assert report.main([str(slower), "--against", str(before), "--output", str(tmp_path / "c.html")]) == 0
    page = Page((tmp_path / "c.html").read_text())
    assert page.headings[1] == "Differences"
    quantity = ["host", "10 tensors", "adamw_triton", "host_us", "4", "8", "2.000"]
    assert quantity in page.tables[1] and len(page.tables[1]) == 1 + 2


def test_plots_render_from_json_alone(tmp_path, capsys):
    path = document(tmp_path, all_records())
    assert plot.main([str(path), "--output", str(tmp_path / "plots")]) == 0
    made = sorted(tmp_path.glob("plots/*.png"))
    assert [p.stem for p in made] == ["around", "bytes", "host", "models", "throughput", "training", "update"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 10_000 for p in made)
    capsys.readouterr()
    assert plot.main([str(document(tmp_path, host_records(), "few.json")), "--output", str(tmp_path / "few")]) == 0
    assert "models: not in" in capsys.readouterr().out
    assert [p.stem for p in (tmp_path / "few").glob("*.png")] == ["host"]


def test_readme_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(docs, "ROOT", tmp_path)
    document(tmp_path, all_records())
    text = (
        "before\n<!-- table host result.json -->\nold\n<!-- end -->\n<!-- table static result.json -->\n<!-- end -->\n"
        "<!-- table features result.json -->\n<!-- end -->\n<!-- table norm result.json -->\n<!-- end -->\n"
    )
    (tmp_path / "README.md").write_text(text)
    assert docs.main(["--check"]) == 1
    assert (tmp_path / "README.md").read_text() == text
    assert docs.main([]) == 0
    new = (tmp_path / "README.md").read_text()
    assert "| adamw_triton | 4 | 40 |  |" in new and "| fp32 | table | 28 | 36.1 |" in new and "old" not in new
    assert "| factor and flag: clip, unscale, skip | 2.0 |" in new and "| sm_90 | fp32 |" in new
    assert "| bf16 | sm_90 | 2 | 4.4 | 16 | H100 20 |" in new
    assert new.startswith("before\n")
    assert docs.main(["--check"]) == 0


@pytest.mark.fast
def test_pages_agree_with_the_committed_results():
    assert docs.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("command", "argv", "message"),
    [
        ("host", ["--tensors", "0"], "got '0'; allowed: a positive integer"),
        ("host", ["--tensors"], "expected at least one argument"),
        ("compare", ["nothing.json", "nothing.json"], "nothing.json is not a result"),
        ("plot", ["nothing.json"], "nothing.json is not a result"),
        ("suite", ["--only", "everything"], "invalid choice: 'everything'"),
        ("docs", ["--what"], "unknown option '--what'"),
        ("report", ["a.json", "b.json"], "unknown option 'b.json'; allowed: --help, --against, --output"),
        *((name, ["--json", "."], "this is a folder") for name in WITH_JSON),
        ("host", ["--json", "pyproject.toml/result.json"], "allowed: a folder to write to"),
        ("suite", ["--output", "."], "this is a folder"),
        ("accuracy", ["--seeds", "0"], "got '0'; allowed: a positive integer"),
        ("arithmetic", ["--seed", "-1"], "got '-1'"),
        ("no-such", [], "unknown command 'no-such'"),
    ],
)
def test_bad_options_give_one_line_and_status_2(command, argv, message, capsys):
    try:
        status = bench.main([command, *argv])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1


def test_host_shows_a_slowed_down_step_as_slower(monkeypatch):
    """The harness itself: a step that sleeps a millisecond is a millisecond slower, its neighbours are not."""
    import time

    from adamw_triton import AdamW

    parser = host.common.Parser("host", "")
    host.add_options(parser)
    options = parser.parse(["--tensors", "10", "--seconds", "0.2", "--device", "cpu"])

    def medians():
        return {r["provider"]: r["host_us"]["median"] for r in host.measure(options) if "host_us" in r}

    step = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self: (time.sleep(0.1), step(self))[1])
    found = medians()
    for name, microseconds in found.items():  # busy machines are slow, but not by that much
        assert (microseconds > 1e5) == name.startswith("adamw_triton"), name


def test_host_providers_step_what_they_say():
    """Every other gradient is missing, the odd and the even ones in turn; all else is there at each step."""
    from adamw_triton import launch

    counted = []

    def count(params, grads, *_, **__):
        counted.append(grads.clone())

    with host.launches(torch.device("cpu")), mock.patch.object(launch, "launch_scalars", count):
        made = host.providers(6, torch.device("cpu"))
        for name, (step, before, against) in made.items():
            assert against in made
            counted.clear()
            for _ in range(4):
                before()
                step()
            present = [(grads != 0).tolist() for grads in counted]
            if name.endswith("missing gradients"):
                assert present == [[True] * 3, [True, False] * 3, [False, True] * 3, [True, False] * 3]
            else:
                assert present == ([[True] * 6] * 4 if name.startswith("adamw_triton") else []), name
            if name == "adamw_triton, gradients move":
                assert (counted[2] != counted[3]).all()


def test_host_launches_nothing_and_scans_everything(monkeypatch):
    from adamw_triton import launch

    parser = host.common.Parser("host", "")
    host.add_options(parser)
    found = host.measure(parser.parse(["--tensors", "161", "1000", "--seconds", "0", "--device", "cpu"]))
    assert launch.launch_table.__module__ == "adamw_triton.launch", "the replacement is taken back"
    growth = {r["provider"]: r["host_us_per_tensor"] for r in found if r["case"].startswith("growth")}
    assert growth["adamw_triton"] > 0.5 * growth["bare scan"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU measures and marks")
def test_suite_writes_what_every_command_measured(tmp_path):
    path = tmp_path / "suite.json"
    code = f"""
from bench import cpu, dist, host, shapes, suite
from bench.codegen import static
host.COUNTS = (10, 161)
static.FEATURED, static.FEATURE_TARGETS = static.FEATURED[:1], static.FEATURE_TARGETS[:1]
static.TARGETS = ("sm_90", "gfx942")
static.BY_NAME = {{name: static.BY_NAME[name] for name in static.FEATURED}}
shapes.MODELS["tiny"] = lambda: [(256, 128), (256,)]
dist.MODELS = {{"tiny": shapes.MODELS["tiny"]}}
cpu.LISTS = ("tiny",)
suite.main(["--output", {str(path)!r}])
"""
    command = [sys.executable, "-c", code]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    subprocess.run(command, check=True, cwd=docs.ROOT, env=environment, timeout=1800)  # if it hangs
    by_command = {}
    for record in records.read(path)["records"]:
        by_command.setdefault(record["command"], []).append(record)
    assert tuple(by_command) == suite.COMMANDS
    for command, found in by_command.items():
        failed = [record for record in found if "error" in record]
        if command in suite.NEEDS_GPU:
            assert [record["error"] for record in failed] == ["not measured: no GPU"] and len(found) == 1
        elif command == "static":  # Triton 3.4's wheel cannot link for AMD
            assert {record["target"] for record in failed} <= {"gfx942"} and len(failed) < len(found)
        else:
            assert found and not failed
