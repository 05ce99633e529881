"""The main job on several processes: it agrees with one, finds out what does not, and refuses what cannot be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamw_triton import AdamW
from bench import ranks, train, train_distributed, train_report
from bench.gpt import GPT, Sizes
from bench.processes import ProcessError
from bench.ranks import WRAPPERS

ROOT = Path(__file__).parents[2]
TINY = ["--layers", "1", "--heads", "2", "--width", "32", "--context", "16", "--batch", "4", "--lr", "0.01"]
TINY += ["--device", "cpu", "--time-limit", "300"]


def run(*argv, ours="AdamW"):
    """The command, or with an optimizer of this file instead of ours; in a process that knows no interpreter."""
    code = f"import sys, test_bench_distributed as tests; sys.exit(tests.train.main(sys.argv[1:], ours=tests.{ours}))"
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    command = [sys.executable, "-m", "bench", *argv] if ours == "AdamW" else [sys.executable, "-c", code, *argv]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("wrapper", "processes", "more"),
    [("fsdp2", [2], ["--skip-nonfinite"]), ("tp-fsdp2", [4], ["--policy", "fp32-8bit-stochastic"])],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_end_to_end(wrapper, processes, more, tmp_path):
    counts = ["--processes", *map(str, processes)]
    result = run("--distributed", wrapper, *counts, *TINY, *more, "--steps", "8", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr + result.stdout
    assert "agree" in result.stdout and f"{wrapper} on {processes[0]}" in " ".join(result.stdout.split())
    found = json.loads((tmp_path / "train.json").read_text())
    assert found["distributed"]["wrapper"] == wrapper and found["distributed"]["processes"] == [1, *processes]
    one, several = found["runs"]
    assert len(several["losses"]) == 8 and None not in several["losses"]
    assert several["losses"][7] < several["losses"][0] - 0.5, "it learns"
    assert several["difference"]["weight"] > 0, "another order of sums"
    assert several["state_bytes"] < 0.8 * one["state_bytes"], "each process has a part of the state"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


class LocalNorm(AdamW):
    """Each rank clips by the norm of its own shards, as an optimizer that knows no DTensor would."""

    def __init__(self, params, max_grad_norm=None, skip_nonfinite=False, **options):
        super().__init__(params, **options)
        self.limit = max_grad_norm

    @torch.no_grad()
    def step(self, closure=None):
        grads = [param.grad.to_local() for group in self.param_groups for param in group["params"]]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for grad in grads:
            grad.mul_((self.limit / (norm + 1e-6)).clamp(max=1.0))
        return super().step(closure)


def test_a_norm_of_each_rank_is_found_out(tmp_path):
    argv = ["--distributed", "fsdp2", "--processes", "2", *TINY, "--steps", "6", "--max-grad-norm", "0.5"]
    result = run(*argv, "--output", str(tmp_path), ours="LocalNorm")
    assert result.returncode == 1 and "DIVERGE" in result.stdout, result.stderr


def test_a_process_that_fails_is_told(tmp_path, monkeypatch, capsys):
    def fail(*args, **options):
        raise ProcessError("rank 1 of 2 failed: no step today")

    monkeypatch.setattr(train_distributed, "run_ranks", fail)
    argv = ["--distributed", "ddp", "--processes", "2", *TINY, "--output", str(tmp_path)]
    assert train.main(argv) == 3
    assert "python -m bench train: error: rank 1 of 2 failed: no step today" in capsys.readouterr().err
    assert not (tmp_path / "train.json").exists()


def test_zero_gives_no_group_what_is_of_the_whole_optimizer():
    planned = train_distributed.runs_of(options_of("--distributed", "zero1", "--amp", "--capturable"), AdamW)
    given = planned[1][0].make.keywords
    assert given["optimizer_class"] is AdamW and given["capturable"] and given["fused"]
    assert not {"max_grad_norm", "skip_nonfinite"} & given.keys()


@pytest.mark.parametrize("name", WRAPPERS)
def test_ranks_share_a_batch(name):
    wrapper = WRAPPERS[name]
    for world in wrapper.processes:
        assert world % wrapper.multiple == 0
        parts = [wrapper.part(rank, world) for rank in range(world)]
        assert {count for _, count in parts} == {world // wrapper.copies(world)}
        count = parts[0][1]
        assert sorted(index for index, _ in parts) == sorted(list(range(count)) * (world // count))
    assert ranks.refused(options_of("--distributed", name)) is None, "its defaults are allowed"


def options_of(*argv):
    parsed = []
    check = ranks.refused
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "refused", lambda options: parsed.append(options) or check(options) or "stop")
        with pytest.raises(SystemExit):
            train.main([*argv, "--device", "cpu"])
    return parsed[0]


def test_tolerances_allow_for_another_order_of_sums():
    """Those of one process are tighter; of low precision they are the same."""
    for steps in (1, 40, 4000):
        one, several = (train_report.tolerances(torch.float32, steps, distributed=it) for it in (False, True))
        assert all(one[key] <= several[key] <= 1e-2 for key in one)
    assert train_report.tolerances(torch.bfloat16, 40, distributed=True) == train_report.tolerances(torch.bfloat16, 40)


def test_clipping_is_folded_where_it_can_be():
    def clip(*argv):
        return train_distributed.with_defaults(options_of(*argv)).features.max_grad_norm

    assert clip("--distributed", "fsdp2") == train_distributed.MAX_GRAD_NORM
    assert clip("--distributed", "fsdp2", "--max-grad-norm", "3") == 3.0
    assert clip("--distributed", "zero1") is clip("--distributed", "fsdp2", "--release") is None


def test_the_reference_is_torchs_on_one_process():
    planned = train_distributed.runs_of(options_of("--distributed", "hsdp", "--control"), AdamW)
    assert [world for _, world, _ in planned] == [1, 4, 1]
    assert planned[0][2].startswith("torch.optim.AdamW") and not planned[0][0].folded
    assert all(contestant.folded for contestant, _, _ in planned[1:])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--distributed", "fsdp3"], "invalid choice: 'fsdp3'"),
        (["--processes", "2"], "got --processes without --distributed"),
        (["--distributed", "fsdp2", "--processes", "1"], "got 1 processes for fsdp2; allowed: 2 or more"),
        (["--distributed", "fsdp2", "--processes", "0"], "got '0'; allowed: a positive integer"),
        (["--distributed", "hsdp", "--processes", "3"], "got 3 processes for hsdp; allowed: 2 or more, multiples of 2"),
        (
            ["--distributed", "ddp", "--processes", "3"],
            "got --batch 8 for 3 parts of a batch; allowed: a multiple of 3",
        ),
        (["--distributed", "tp", "--processes", "3"], "got --width 256; allowed: a multiple of 3"),
        (["--distributed", "ddp", "--release"], "got --release with ddp; allowed: without, because gradients"),
        (["--distributed", "fsdp2", "--release", "--skip-nonfinite"], "got --release with --skip-nonfinite"),
        (["--distributed", "zero1", "--max-grad-norm", "1"], "with zero1; allowed: neither, because each process"),
        (["--distributed", "zero1", "--skip-nonfinite"], "with zero1; allowed: neither, because each process"),
        (["--distributed", "tp-fsdp2", "--amp"], "got --amp with tp-fsdp2; allowed: without, because GradScaler"),
        (["--distributed", "fsdp2", "--release", "--max-grad-norm", "1"], "because gradient release steps before"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_options_give_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        train.main([*argv, "--device", "cpu"])
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1


def test_gpus_are_counted(monkeypatch):
    options = options_of("--distributed", "fsdp2")
    options.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert "got 4 processes and 3 GPUs; allowed: as many GPUs, or --device cpu" in ranks.refused(options)
    options.processes = [2]
    assert ranks.refused(options) is None
    options.device = torch.device("cuda", 1)
    assert "got --device cuda:1; allowed: cpu, or cuda" in ranks.refused(options)


def test_plots_any_number_of_runs(tmp_path):
    run = {"losses": [3.0, 2.0], "label": "a run"}
    found = {
        "runs": [run] + [{**run, "losses": [3.0, 2.0 + i / 1e6]} for i in range(7)],
        "tolerance": {"loss": 1e-3},
        "conditions": {"device_name": "a CPU", "path": "eager", "torch": "2", "date": "2026-01-01T"},
        "model": {"parameters": Sizes(1, 2, 32, 16).parameters(), "policy": "fp32"},
    }
    train_report.plot(found, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    assert sum(p.numel() for p in GPT(Sizes(1, 2, 32, 16)).parameters()) == found["model"]["parameters"]
