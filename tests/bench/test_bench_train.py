"""The main job: runs end to end, refuses bad options in one line, and finds out a wrong optimizer."""

import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from adamw_triton import AdamW, launch
from bench import __main__ as bench
from bench import train
from bench.gpt import GPT, Sizes, batches, corpus

ROOT = Path(__file__).parents[2]
TINY = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4", "--lr", "0.01"]


def run(*argv):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", *argv]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("name", [[], ["train"]], ids=["no command", "train"])
def test_end_to_end(name, tmp_path):
    result = run(*name, *TINY, "--steps", "6", "--control", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "agree" in result.stdout and "torch.optim.AdamW fused=True" in result.stdout
    report = json.loads((tmp_path / "train.json").read_text())
    losses = [run["losses"] for run in report["runs"]]
    assert [len(x) for x in losses] == [6] * 3
    assert report["agree"] and losses[0][0] == losses[1][0] != losses[0][5]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    # param, 2 moments: fp32; one fp32 step count for each tensor
    state = 2 * 4 * report["model"]["parameters"]
    assert state < report["runs"][1]["state_bytes"] < state + 1000


FEATURES = {
    "clip": ["--max-grad-norm", "0.5"],
    "amp": ["--amp"],
    "skip": ["--skip-nonfinite"],
    "release": ["--release"],
    "capturable": ["--capturable"],
}
# Clipping and AMP are not combined with gradient release, which steps before all gradients are there.
ALL_TOGETHER = [("clip", "amp", "skip", "capturable"), ("skip", "release", "capturable")]


@pytest.mark.parametrize(
    ("names", "policy"),
    [((name,), policy) for name in FEATURES for policy in ("fp32", "bf16-master24-8bit")]
    + [(names, "fp32") for names in ALL_TOGETHER],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_features_end_where_torchs_passes_end(names, policy, tmp_path, monkeypatch):
    if len(names) > 1:  # in the eager step: kernels take pairs in test_feature_pairs.py
        monkeypatch.setattr(launch, "has_kernels", lambda device: False)
    argv = [*itertools.chain.from_iterable(FEATURES[name] for name in names), "--policy", policy]
    assert train.main([*TINY, "--steps", "9", *argv, "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "train.json").read_text())
    assert set(report["training"]["folded"]) == set(names)
    if "skip" in names:
        losses = report["runs"][1]["losses"]
        assert len(losses) == 9 and all(map(math.isfinite, losses))


def test_a_feature_that_does_nothing_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)

    class Unclipped(AdamW):
        def __init__(self, params, **options):
            super().__init__(params, **{**options, "max_grad_norm": 1e9})

    argv = ["--max-grad-norm", "0.01", "--steps", "20", "--output", str(tmp_path)]
    assert train.main([*TINY, *argv]) == 0
    assert train.main([*TINY, *argv], ours=Unclipped) == 1


@pytest.mark.fast
def test_one_step(tmp_path):
    assert train.main([*TINY, "--steps", "1", "--output", str(tmp_path)]) == 0


def test_a_diverged_run_is_found_out_and_its_json_is_json(tmp_path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    assert train.main([*TINY, "--steps", "4", "--lr", "1e30", "--output", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "train.json").read_text(), parse_constant=refuse)
    assert None in report["runs"][1]["losses"]


class NoDecay(AdamW):
    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            group["weight_decay"] = 0.0


class DoubleEps(AdamW):
    def __init__(self, params, **options):
        super().__init__(params, **{**options, "eps": 2 * options["eps"]})


class LateEps(AdamW):
    def __init__(self, params, **options):
        super().__init__(params, **{**options, "eps": 1e-4})


class OtherBeta(AdamW):
    def __init__(self, params, **options):
        super().__init__(params, **{**options, "betas": (0.9, 0.96)})


@pytest.mark.parametrize("wrong", [NoDecay, LateEps, OtherBeta], ids=lambda cls: cls.__name__)
def test_a_wrong_optimizer_is_found_out(wrong, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)
    argv = [*TINY, "--steps", "40", "--weight-decay", "0.5", "--output", str(tmp_path)]
    assert train.main(argv, ours=wrong) == 1
    assert "DIVERGE" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [NoDecay, DoubleEps], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    ("steps", "path"), [("6", "kernel"), ("6", "reference"), ("40", "reference")], indirect=["path"]
)
def test_a_slightly_wrong_optimizer_is_found_out_in_a_short_run(wrong, steps, tmp_path, path):
    """With the default options, in a few steps: there two implementations have had no time to drift apart."""
    assert train.main([*TINY[:-2], "--steps", steps, "--output", str(tmp_path)], ours=wrong) == 1


def test_kernels_agree_within_their_tolerance(tmp_path, path):
    """In this process: under the interpreter where there is no GPU."""
    assert train.main([*TINY, "--steps", "12", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "train.json").read_text())
    assert ("reference" in report["conditions"]["path"]) == (path == "reference")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "argument --steps: got '0'; allowed: a positive integer"),
        (["--heads", "3"], "got --width 256 --heads 3; allowed: a width divisible by the heads"),
        (["--context", "50000000"], "got --context 50000000; allowed: less than"),
        (["--lr", "fast"], "got 'fast'; allowed: a finite number that is not negative"),
        (["--device", "tpu"], "got 'tpu'; allowed here: auto, cpu"),
        (["--policy", "int8"], "invalid choice: 'int8'"),
        (["--max-grad-norm", "0"], "got --max-grad-norm 0; allowed: a number above 0"),
        (["--release", "--amp"], "got --release with --max-grad-norm or --amp; allowed: one of them"),
        (["--release", "--max-grad-norm", "1"], "because gradient release steps before the norm"),
        (["--colour", "red"], "unknown option '--colour'"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_options_give_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(argv)
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


@pytest.mark.parametrize("argv", [["--steps", "0"], ["nonsense"]], ids=" ".join)
def test_the_status_is_that_of_the_process(argv):
    result = run(*argv)
    assert result.returncode == 2 and result.stdout == ""
    assert "allowed: " in result.stderr and result.stderr.count("\n") == 1


def test_help_lists_the_commands():
    result = run("--help")
    assert result.returncode == 0
    assert "commands" in result.stdout and "--weight-decay" in result.stdout


def test_data_is_real_and_the_same_every_time():
    training, validation = corpus()
    assert b"def " in bytes(training[:100_000].tolist()) and len(training) > 1_000_000 < 10 * len(validation)
    first, second = (list(batches(training, batch=3, context=8, count=2, seed=7)) for _ in range(2))
    for (x, y), (again, _) in zip(first, second, strict=True):
        assert torch.equal(x, again) and torch.equal(x[:, 1:], y[:, :-1]) and x.shape == (3, 8)
    other = next(batches(training, batch=3, context=8, count=1, seed=8))
    assert not torch.equal(other[0], first[0][0])


@pytest.mark.fast
@pytest.mark.parametrize("sizes", [Sizes(1, 2, 16, 8), Sizes(3, 4, 256, 64)], ids=str)
def test_parameter_count(sizes):
    model = GPT(sizes)
    assert sum(p.numel() for p in model.parameters()) == sizes.parameters()
    logits = model(torch.zeros(2, sizes.context, dtype=torch.long))
    assert logits.shape == (2, sizes.context, 256)
