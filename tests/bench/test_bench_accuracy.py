"""The accuracy study: codes against their definitions, and that it finds what is wrong."""

import math

import pytest
import torch

from adamw_triton import launch
from bench import accuracy, moments, records
from bench.moments import CODES, dynamic_map

VALUES = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 1000)


@pytest.mark.parametrize("name", CODES)
def test_a_stored_value_is_near(name):
    code = CODES[name]
    for store, value in ((code.exp_avg, VALUES), (code.exp_avg_sq, VALUES.square())):
        stored = store(value)
        assert stored.shape == value.shape and stored.isfinite().all()
        assert (stored - value).norm() <= 0.02 * value.norm()
        assert torch.equal(store(torch.zeros(300)), torch.zeros(300))
        again = store(stored)  # what was stored is stored as it is, up to the scale's own rounding
        torch.testing.assert_close(again, stored, rtol=2e-3, atol=2e-3 * stored.abs().max().item())


def test_levels_of_the_codes():
    """As many values as 8 bits have, at most, in one group."""
    for name, code in CODES.items():
        if "8-bit" in name:
            ramp = torch.linspace(-1, 1, 32)
            many = torch.cat([torch.cat((torch.linspace(-1, 1, 31), torch.ones(1)))] * 4)
            most = 64 if "stochastic" in name else 32  # equal values go to two neighbours
            assert code.exp_avg(ramp).unique().numel() <= 32 and code.exp_avg(many).unique().numel() <= most
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    # 2 (2^7 - 1) middles, 0 and 1; the paper's Figure: 0.99 and 0.0055e-6 ... are ends of the table.
    assert len(signed) == 256 and len(unsigned) == 256
    assert signed.max() == 1 and signed.min() == pytest.approx(-0.993, abs=1e-3)
    assert unsigned[1] == pytest.approx(3.25e-7, rel=1e-3) and unsigned.min() == 0
    assert signed[signed > 0].min() == pytest.approx(5.5e-7, rel=1e-3)


def test_moments_are_adamws():
    """The update of exact moments is what torch's optimizer moves a weight by."""
    param = torch.nn.Parameter(torch.zeros(50, dtype=torch.float64))
    optimizer = torch.optim.AdamW([param], lr=1.0, betas=(0.9, 0.95), eps=moments.EPS, weight_decay=0.0)
    exact = moments.Moments(CODES["fp32"], (0.9, 0.95))
    total = torch.zeros(50, dtype=torch.float64)
    for step in range(5):
        gradient = torch.randn(50, generator=torch.Generator().manual_seed(step))
        param.grad = gradient.double()
        optimizer.step()
        total -= exact.update([gradient])[0].double()
    torch.testing.assert_close(total, param.detach(), rtol=1e-5, atol=1e-6)


def test_whole_study_in_small(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)  # as where the interpreter is not asked for
    path = tmp_path / "accuracy.json"
    argv = [
        "--steps",
        "4",
        "--seeds",
        "2",
        "--update-steps",
        "3",
        "--long-steps",
        "3",
        "--device",
        "cpu",
        "--json",
        str(path),
    ]
    assert accuracy.main(argv) == 0
    found = records.read(path)["records"]
    long_runs = [r for r in found if r["case"] == "long, seed 0"]
    assert [r["provider"] for r in long_runs] == list(accuracy.LONG_TRAINED) and all(r["steps"] == 3 for r in long_runs)
    assert [r["provider"] for r in found if r["case"] == "long"] == list(accuracy.LONG_TRAINED)
    runs = [r for r in found if "losses" in r and r["case"].startswith("training")]
    assert {(r["provider"], r["seed"]) for r in runs} == {(n, s) for n in accuracy.TRAINED for s in range(2)}
    summary = {r["provider"]: r for r in found if r["case"] == "training"}
    assert summary.keys() == set(accuracy.TRAINED) and summary["fp32"]["mean_difference"] == 0
    by_seed = {r["seed"]: r["validation_loss"] for r in runs if r["provider"] == "fp32"}
    assert summary["fp32"]["seed_spread"] == pytest.approx(abs(by_seed[0] - by_seed[1])) and by_seed[0] != by_seed[1]
    updates = [r for r in found if r["case"].startswith("update")]
    assert len(updates) == 2 * (len(CODES) - 1)
    assert all(0 < r["relative_error"] < 1 and r["worst_element"] > 0 for r in updates)
    hard = [r for r in found if r["case"].startswith("gradients")]
    assert len(hard) == 2 * (len(CODES) - 1)
    assert all(r[f"error_{kind}"] >= 0 for r in hard for kind in moments.KINDS)
    mixed = [r for r in found if r["case"].startswith("mixed")]
    assert len(mixed) == 2 * len(CODES)
    fp32 = [r for r in mixed if r["provider"] == "fp32"]
    assert all(r["movement_over_fp32"] == 1.0 and 1 <= r["largest_step"] < 1.1 for r in fp32)


def test_a_bad_policy_is_outside_of_the_spread():
    def record(name, seed, loss):
        return {"provider": name, "seed": seed, "validation_loss": loss}

    found = [record("fp32", 0, 1.0), record("fp32", 1, 1.1), record("good", 0, 1.01), record("good", 1, 1.12)]
    found += [record("bad", 0, 1.15), record("bad", 1, 1.25)]
    rows = {row["provider"]: row for row in accuracy.summaries(found)}
    assert rows["good"]["within_spread"] and not rows["bad"]["within_spread"]
    assert rows["bad"]["mean_difference"] == pytest.approx(0.15)


def test_the_stored_weights_are_what_computes():
    """The low-precision weights are loaded before each forward pass, and their gradients have their dtype."""
    trainee, loss = next(accuracy.train("bf16-master24-8bit", 0, 2, torch.device("cpu")))
    assert math.isfinite(loss)
    for computing, stored in zip(trainee.computing, trainee.stored, strict=True):
        assert stored.dtype == stored.grad.dtype == torch.bfloat16 and computing.dtype == torch.float32
        assert torch.equal(computing.detach(), stored.float())
