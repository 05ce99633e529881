"""`python -m bench static`, the byte formulas of policies, and the arithmetic of predictions."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from adamw_triton.storage import GROUP_SIZE
from adamw_triton.storage.policies import BY_NAME, POLICIES
from bench import records
from bench.codegen import devices, static
from bench.codegen.devices import DEVICES, Device
from bench.codegen.machine_code import IN_A_ROW, Failure, MachineCode
from bench.codegen.variants import KERNELS, TARGETS, Variant

pytest.importorskip("triton")

CASES = [(policy, kernel) for policy in POLICIES for kernel in KERNELS]
# 10 SMs that issue 100 instructions and 10 special functions at 1 GHz, and move 1 TB/s.
ROUND = Device("round", "Round", "Round", "sm_90", 1e12, 10, 1e9, 100, 10, "made up")
CODE = MachineCode(
    threads=128,
    elements=4,
    instructions=120,
    mufu=8,
    loads=[16, 8],
    stores=[16],
    uniform_loads=[8],
    calls=0,
    barriers=0,
    shared_accesses=0,
    spills=0,
    registers=40,
    shared_bytes=0,
    local_bytes=0,
)


# Policies


def test_byte_formula_is_what_the_kernels_load_and_store(for_each):
    policies = {Variant.of("sm_90", kernel, policy): policy for policy, kernel in CASES}

    def check(variant, code):
        policy = policies[variant]
        # Of a scale, every thread loads 4 bytes and one in GROUP_SIZE / elements stores them: counted once for a group.
        scales = 4 * (not policy.exp_avg.is_floating_point) + 4 * (not policy.exp_avg_sq.is_floating_point)
        of_group = scales / GROUP_SIZE
        scales *= max(1, code.elements // IN_A_ROW)
        assert (sum(code.loads) - scales) / code.elements + of_group == policy.read_bytes
        assert (sum(code.stores) - scales) / code.elements + of_group == policy.written_bytes

    for_each(list(policies), check)


def test_bytes_of_policies():
    assert {policy.name: (policy.bytes_per_element, policy.state_bytes) for policy in POLICIES} == {
        "fp32": (28, 8),
        "fp32-amsgrad": (36, 12),
        "bf16-grad": (26, 8),
        "bf16-state": (20, 4),
        "bf16-param-grad": (22, 8),
        "bf16": (14, 4),
        "fp16": (14, 4),
        "fp32-8bit": (16.125, 2.0625),
        "fp32-8bit-stochastic": (16.125, 2.0625),
        "bf16-master32": (26, 10),
        "bf16-master32-bf16": (18, 6),
        "bf16-master24-8bit": (12.125, 3.0625),
        "bf16-master24-8bit-stochastic": (12.125, 3.0625),
        "bf16-stochastic": (14, 4),
        "fp16-master32": (30, 12),
    }
    assert all(policy.bytes_per_element == policy.read_bytes + policy.written_bytes for policy in POLICIES)


def test_descriptions():
    assert BY_NAME["fp32"].description == "fp32 p, g, m, v"
    assert BY_NAME["bf16-param-grad"].description == "bf16 p, g; fp32 m, v"
    assert BY_NAME["bf16-grad"].description == "fp32 p, m, v; bf16 g"
    assert BY_NAME["fp32-amsgrad"].description == "fp32 p, g, m, v, max v"
    assert BY_NAME["bf16-master24-8bit"].description == "bf16 p, g; int8 m; uint8 v; 8-bit remainder"
    assert BY_NAME["fp16-master32"].description == "fp16 p, g; fp32 m, v; fp32 master"
    assert BY_NAME["bf16-stochastic"].description == "bf16 p, g, m, v; stochastic rounding"
    assert BY_NAME["bf16-param-grad"].dtypes == (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)


# Predictions


@pytest.mark.parametrize(
    ("arguments", "memory", "issue", "special", "bound"),
    [
        ((28, 30, 2), 28, 30, 20, "issue"),
        ((28, 20, 2), 28, 20, 20, "memory"),
        ((12, 20, 4), 12, 20, 40, "special"),
    ],
)
def test_predicted_time_is_the_longest_of_the_bounds(arguments, memory, issue, special, bound):
    prediction = static.Prediction.of(ROUND, *arguments)
    assert prediction.memory == pytest.approx(memory)
    assert prediction.issue == pytest.approx(issue)
    assert prediction.special == pytest.approx(special)
    assert prediction.bound == bound
    assert prediction.ms == max(prediction.memory, prediction.issue, prediction.special)
    assert ROUND.instruction_budget(28) == pytest.approx(28)


def test_record_of_hand_made_code(monkeypatch):
    monkeypatch.setattr(static, "DEVICES", [ROUND])
    record = static.record_of("sm_90", BY_NAME["bf16-param-grad"], "table", CODE)
    assert record["case"] == "bf16-param-grad table sm_90"
    assert record["access_bytes"] == "8, 16"
    assert (record["instructions_per_element"], record["mufu_per_element"]) == (30, 2)
    assert record["round_ms"] == record["round_issue_ms"] == pytest.approx(30)
    assert (record["round_bound"], record["round_instruction_budget"]) == ("issue", pytest.approx(22))


@pytest.mark.parametrize(
    ("key", "policy", "ms"),
    # At nominal bandwidth: bytes / (TB/s).
    [
        ("a100", "fp32", 28 / 2.039),
        ("h100", "fp32", 28 / 3.35),
        ("h200", "bf16", 14 / 4.8),
        ("b200", "bf16-param-grad", 22 / 7.672),
        ("mi300x", "bf16-state", 20 / 5.3),
    ],
)
def test_memory_time_of_real_devices(key, policy, ms):
    device = next(device for device in DEVICES if device.key == key)
    prediction = static.Prediction.of(device, BY_NAME[policy].bytes_per_element, 0, 0)
    assert prediction.ms == prediction.memory == pytest.approx(ms, rel=1e-3)


def test_devices_are_of_known_targets_and_found_by_their_name():
    assert {device.target for device in DEVICES} == set(TARGETS)
    assert all(device.source for device in DEVICES)
    assert devices.find("NVIDIA H100 80GB HBM3").key == "h100"
    assert devices.find("NVIDIA H200").key == "h200"
    assert devices.find("NVIDIA H100 PCIe") is None


# The command


def test_run_for_one_policy_and_target(tmp_path, capsys):
    file = tmp_path / "new" / "static.json"
    assert static.main(["--target", "sm_90", "--policy", "fp32", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "H100 SXM" in printed and "fp32 table" in printed

    document = records.read(file)
    assert document["conditions"]["command"].startswith("python -m bench static --target sm_90")
    found = document["records"]
    assert [record["case"] for record in found] == ["fp32 tensor sm_90", "fp32 table sm_90"]
    for record in found:
        if "nvdisasm" in record.get("error", ""):
            pytest.skip(record["error"])
        assert (record["command"], record["provider"]) == ("static", "adamw_triton")
        assert record["spills"] == record["shared_bytes"] == 0
        assert record["access_bytes"] == "16"
        assert record["bytes_per_element"] == record["read_bytes"] + record["written_bytes"] == 28
        assert record["state_bytes"] == 8
        assert record["mufu_per_element"] == 2
        assert 0 < record["instructions_per_element"] < record["h200_instruction_budget"]
        assert record["h100_bound"] == "memory"
        assert record["h100_ms"] == pytest.approx(28 / 3.35)
        assert "a100_ms" not in record


def run(monkeypatch, examine, **options):
    monkeypatch.setattr(static, "examine_all", examine)
    return static.measure(argparse.Namespace(**options))


def test_everything_by_default_and_each_choice_once(monkeypatch):
    every = run(monkeypatch, lambda variants: [CODE] * len(variants))
    assert len(every) == len({record["case"] for record in every}) == len(TARGETS) * len(CASES)
    some = run(monkeypatch, lambda variants: [CODE] * len(variants), target=["gfx942", "gfx942"], policy=["fp16"])
    assert [record["case"] for record in some] == ["fp16 tensor gfx942", "fp16 table gfx942"]
    assert all("mi300x_ms" in record for record in some)


def test_features_are_counted_against_the_plain_kernel(monkeypatch):
    def examine(variants):
        return [
            Failure("no") if variant.cautious else replace(CODE, instructions=CODE.instructions + 8 * variant.control)
            for variant in variants
        ]

    found = run(monkeypatch, examine, features=True, target=["sm_90"])
    names = ("", *static.FEATURES)
    assert [r.get("feature") for r in found] == [*names * len(static.FEATURED), *[None] * len(static.NORM_DTYPES)]
    for record in found[: len(names)]:
        if record["feature"] == "cautious":
            assert record["error"] == "no"
        else:
            assert record["added_instructions"] == (8 / CODE.elements if record["feature"] == "control" else 0)
    assert found[-1]["kernel"] == "norm" and found[-1]["h100_instruction_budget"] > 0


def test_what_cannot_be_compiled_is_a_row(monkeypatch):
    def examine(variants):
        if variants[0].target == "sm_80":
            raise RuntimeError("the process ended after 0 of 2 variants:\nLLVM ERROR")
        return [Failure("Traceback (most recent call last):\nValueError: no\n  such gpu-name\n"), CODE]

    found = run(monkeypatch, examine, target=["sm_80", "sm_100"], policy=["bf16"])
    assert [record.get("error") for record in found] == [
        "the process ended after 0 of 2 variants: LLVM ERROR",
        "the process ended after 0 of 2 variants: LLVM ERROR",
        "ValueError: no such gpu-name",
        None,
    ]
    assert not any("registers" in record for record in found if "error" in record)
    console = Console(record=True, width=static.WIDTH)
    static.show(console, found)
    assert "no such gpu-name" in " ".join(console.export_text().split())
    json.dumps(found)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--target", "sm_70"], "sm_70"),
        (["--policy", "int8"], "int8"),
        (["--targets", "sm_90"], "unknown option '--targets'"),
        (["--json", "."], "argument --json: got '.'"),
    ],
)
def test_bad_options_are_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as exit:
        static.main(argv)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error
    assert "allowed" in error or "choose from" in error


def test_unwritable_file_is_one_line_and_status_2(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(static, "examine_all", lambda variants: [CODE] * len(variants))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit:
        static.main(["--target", "sm_90", "--policy", "fp32", "--json", str(tmp_path / "file" / "x.json")])
    assert exit.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_says_how_instructions_are_counted(capsys):
    with pytest.raises(SystemExit):
        static.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "path of a full block" in text and "arithmetic, not measurements" in text
    assert "SUPPRESS" not in text
