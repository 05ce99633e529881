"""The models command: what is compared, with what around the step, and what is not timed."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from adamw_triton import launch
from adamw_triton.storage.policies import BY_NAME, POLICIES
from bench import common, features, models, peers

CPU = torch.device("cpu")


def options_of(*argv):
    parser = common.Parser("models", "")
    models.add_options(parser)
    return parser.parse(list(argv))


SMALL = ("--device", "cpu", "--steps", "3", "--seconds", "0", "--max-elements", "200000", "--model", "resnet-50")


@pytest.fixture
def reference(monkeypatch):
    """Ours as eager operations: the interpreter takes seconds for a model."""
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)


def test_models_on_the_cpu(reference):
    chosen = ["adamw_triton", "torch for-loop", "torch foreach", "torch fused"]
    rows = models.measure(options_of(*SMALL, *itertools.chain(*(("--peer", name) for name in chosen))))
    assert [row["provider"] for row in rows] == chosen
    for row in rows:
        assert row["tensors"] == 161 and row["elements"] <= 200_000 and row["scale"] > 1
        assert row["wall_ms"]["n"] == row["host_us"]["n"] == 3 and row["wall_ms"]["median"] > 0
        assert "kernel_ms" not in row and "launches" not in row and "added_bytes" not in row
    assert rows[-1]["fused_over_this"] == pytest.approx(1)


def test_models_with_what_is_around_the_step(reference):
    names = "clip,amp,clip+amp,graph,release"
    rows = models.measure(options_of(*SMALL, "--peer", "adamw_triton", "--with", names))
    by_case = {}
    for row in rows[1:]:
        by_case.setdefault(row["features"], {})[row["provider"]] = row
    assert list(by_case) == names.split(",")
    for name in ("clip", "amp", "clip+amp"):
        assert set(by_case[name]) == {"adamw_triton", "torch fused"}
    assert set(by_case["release"]) == {
        "adamw_triton", "torch fused", features.RELEASED, features.IN_BACKWARD,
    }  # fmt: skip
    assert all(row["error"] == "CUDA graphs need a GPU" for row in by_case["graph"].values())
    for name, providers in by_case.items():
        for provider, row in providers.items():
            assert row["case"] == f"resnet-50 fp32 {name}"
            if name != "graph":
                assert "error" not in row and row["wall_ms"]["median"] > 0, provider


@pytest.mark.parametrize("names", [("clip",), ("amp",), ("clip", "amp"), ("release",)], ids="+".join)
def test_what_is_around_the_step_ends_alike(names, path):
    """Every provider on parameters of its own: what is timed does what it says."""
    ends = {}
    torch.manual_seed(3)
    start, _ = peers.problem([(40, 30), (7,)], BY_NAME["fp32"], CPU)
    for provider in features.starters(names, start, BY_NAME["fp32"], [{}, {}], CPU):
        params, moments = peers.problem([(40, 30), (7,)], BY_NAME["fp32"], CPU)
        for param, other in zip(params, start, strict=True):
            param.data.copy_(other)
            param.grad = torch.full_like(param, 0.3)
        call = features.starters(names, params, BY_NAME["fp32"], moments, CPU)[provider]()
        for _ in range(3):
            call()
        ends[provider] = [p.detach().clone() for p in params]
    first, *others = ends.values()
    assert others and not torch.equal(first[0], start[0])
    for end in others:
        torch.testing.assert_close(end, first, rtol=1e-6, atol=1e-7)


def test_wrong_results_are_not_timed(reference, monkeypatch):
    kept = models.measure(options_of(*SMALL, "--peer", "adamw_triton"))
    assert "error" not in kept[0]
    monkeypatch.setattr(models, "GATE_HYPER", {**models.GATE_HYPER, "weight_decay": 0.5})
    healthy = peers.BY_NAME["adamw_triton"]
    broken = SimpleNamespace(**{**vars(healthy), "factory": _negligent(healthy), "version": healthy.version})
    (row,) = models.gate(kept, BY_NAME["fp32"], broken, CPU)
    assert row["error"].startswith("wrong result") and "wall_ms" not in row


def _negligent(peer):
    def factory(params, policy, moments):
        optimizer = peer.factory(params, policy, moments)
        step = optimizer.step
        optimizer.step = lambda: step() if optimizer.param_groups[0].update(weight_decay=0.0) is None else None
        return optimizer

    return factory


@pytest.mark.parametrize("name", ["adamw_triton", "adamw_triton foreach=False"])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_ours_passes_the_gate(policy, name, path):
    assert models.wrong(policy, peers.BY_NAME[name], CPU) is None


def test_lists_are_divided_until_all_providers_fit(reference, monkeypatch):
    monkeypatch.setattr(models, "free_bytes", lambda device: 2**23)
    rows = models.measure(
        options_of("--device", "cpu", "--steps", "1", "--model", "resnet-50", "--peer", "torch fused")
    )
    per_element = models.bytes_per_element(BY_NAME["fp32"], [peers.BY_NAME["torch fused"]])
    assert rows[0]["elements"] * per_element <= models.FREE_SHARE * 2**23
    monkeypatch.setattr(models, "free_bytes", lambda device: 100)
    (row,) = models.measure(options_of("--device", "cpu", "--model", "10x16Mi", "--peer", "torch fused"))
    assert "one row of each" in row["error"]


# commands
