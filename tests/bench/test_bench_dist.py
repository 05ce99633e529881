"""Steps on shards and on the CPU, in small: what is measured is what is said, and it is counted right."""

import time
from contextlib import contextmanager

import pytest
import torch
import torch.distributed
from torch.distributed.tensor import DTensor

from adamw_triton import AdamW, launch
from bench import __main__ as bench
from bench import common, cpu, dist, host, plot, records, shapes

CPU = torch.device("cpu")
TINY = [(32, 16), (16,), (16, 16), (8, 16)]


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(dist, "MODELS", {"tiny": lambda: TINY})


@pytest.mark.parametrize(("name", "tensors"), [("llama-3-8b", 291), ("llama-3-70b", 723)])
def test_small_models_have_a_row_of_every_tensor_on_every_rank(name, tensors):
    whole = dist.MODELS[name]()
    listed = dist.small(whole)
    assert len(listed) == len(whole) == tensors and [len(shape) for shape in listed] == [len(s) for s in whole]
    assert listed[0][1] == dist.WIDTH and all(shape[0] % dist.WORLD == 0 for shape in listed)
    assert shapes.elements(shapes.shard(listed, dist.WORLD)) < 200 * tensors
    factor = whole[0][1] // dist.WIDTH
    for small, large in zip(listed, whole, strict=True):  # up to rounding up, which may be to one row for each rank
        assert small[0] < large[0] / factor + dist.WORLD and small[1:] == tuple(-(-n // factor) for n in large[1:])


def test_shards_are_as_fsdp2_makes_them():
    with dist.fake_mesh(CPU) as mesh:
        params, renew = dist.sharded(TINY, mesh, CPU)
        assert [tuple(param.shape) for param in params] == TINY
        assert [tuple(param.to_local().shape) for param in params] == shapes.shard(TINY, dist.WORLD)
        plain, _ = dist.plain(TINY, CPU)
        assert [tuple(param.shape) for param in plain] == shapes.shard(TINY, dist.WORLD)
        assert not any(isinstance(tensor, DTensor) for param in plain for tensor in (param, param.grad))
        before = [param.grad for param in params]
        assert all(isinstance(grad, DTensor) for grad in before)
        assert all(grad._spec is param._spec for param, grad in zip(params, before, strict=True))
        renew()
        for param, grad in zip(params, before, strict=True):
            assert param.grad is not grad and param.grad._spec is param._spec
            assert param.grad.to_local().data_ptr() != grad.to_local().data_ptr()
    assert not torch.distributed.is_initialized()


def test_the_command_counts_and_compares(tiny, tmp_path, capsys):
    path = tmp_path / "dist.json"
    assert bench.main(["dist", "--model", "tiny", "--seconds", "0", "--device", "cpu", "--json", str(path)]) == 0
    found = {record["provider"]: record for record in records.read(path)["records"]}
    kinds = [dist.OURS, dist.CLIP_OURS, dist.FUSED, dist.CLIP_FUSED, "torch foreach", "torch for-loop"]
    both = [kind + suffix for kind in kinds for suffix in ("", dist.PLAIN)]
    assert found.keys() == {*both, dist.FUSED_NEW, f"{dist.OURS}, new gradients"}
    assert all(r["tensors"] == len(TINY) and r["host_us"]["n"] >= 3 for r in found.values())

    # A step counts and updates, a norm is one launch more, and one all-reduce where gradients are sharded.
    expected = {
        dist.OURS: (0, 2),
        dist.CLIP_OURS: (1, 3),
        f"{dist.OURS}, new gradients": (0, 2),
        dist.OURS + dist.PLAIN: (0, 2),
        dist.CLIP_OURS + dist.PLAIN: (0, 3),
        dist.CLIP_FUSED: (1, None),
        dist.CLIP_FUSED + dist.PLAIN: (0, None),
    }
    counted = {name: (r["all_reduces"], r.get("launches")) for name, r in found.items() if "all_reduces" in r}
    assert counted == expected

    fused, clip_fused = (found[name]["host_us"]["median"] for name in (dist.FUSED, dist.CLIP_FUSED))
    for name, against in (("torch for-loop" + dist.PLAIN, fused), (dist.CLIP_OURS, clip_fused), (dist.OURS, fused)):
        assert found[name]["times_torch_fused"] == pytest.approx(against / found[name]["host_us"]["median"])
    out = capsys.readouterr().out
    assert f"tiny, {dist.OURS}: " in out and f"tiny, {dist.CLIP_OURS}: " in out and "aimed at" in out

    assert plot.main([str(path), "--output", str(tmp_path)]) == 0
    assert [png.name for png in tmp_path.glob("*.png")] == ["dist.png"]

    assert launch.launch_table.__module__ == "adamw_triton.launch", "the replacement is taken back"
    assert not torch.distributed.is_initialized()


def test_a_slowed_down_step_is_slower(tiny, monkeypatch):
    step = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self: (time.sleep(0.02), step(self))[1])
    parser = common.Parser("dist", "")
    dist.add_options(parser)
    for record in dist.measure(parser.parse(["--model", "tiny", "--seconds", "0", "--device", "cpu"])):
        if record["provider"].startswith(dist.OURS):
            assert record["host_us"]["p20"] >= 2e4 and record["times_torch_fused"] < 1


@pytest.mark.fast
def test_launches_are_counted_one_by_one():
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    for param in params:
        param.grad = torch.ones(4)
    optimizer = AdamW(params, foreach=False, max_grad_norm=1.0)
    with host.launches(CPU):
        optimizer.step()
    with host.counted_launches(CPU) as launched:
        optimizer.step()
    assert sorted(launched) == sorted(["adamw_kernel"] * 3 + ["scalars_kernel", "grad_norm_kernel"])
    assert all(torch.equal(param, torch.zeros(4)) for param in params), "kernels do nothing while they are counted"


def test_each_is_compared_with_what_it_names():
    providers = {"a": host.Provider(lambda: None), host.FUSED: host.Provider(lambda: None)}
    providers["b"] = host.Provider(lambda: None, against="a")
    warm = {"a": [2.0, 3.0, 1.0], host.FUSED: [8.0, 8.0, 8.0], "b": [0.5, 0.5, 0.5]}
    cold = {"a": [30.0, 10.0, 20.0], host.FUSED: [40.0] * 3, "b": [10.0] * 3}
    samples = {name: host.Samples(warm[name], cold[name]) for name in providers}
    found = host.compared(providers, samples)
    assert {name: r["times_torch_fused"] for name, r in found.items()} == {"a": 4.0, host.FUSED: 1.0, "b": 4.0}
    of_cold = {name: r["times_torch_fused_cold"] for name, r in found.items()}
    assert of_cold == {"a": 2.0, host.FUSED: 1.0, "b": 2.0}
    assert (found["a"]["host_us"]["median"], found["a"]["cold_us"]["median"]) == (2.0, 20.0)


def test_who_was_not_there_for_a_while_is_cold(monkeypatch):
    """The first step of a turn is told from those after it."""
    steps = []

    def step():
        steps.append(len(steps))
        time.sleep(0.02 if len(steps) > 1 and steps[-1] % (host.WARM_UP + 1) == 1 else 0.0)

    monkeypatch.setattr(host, "WARM_UP_SECONDS", 0.0)
    found = host.sample({"one": host.Provider(step)}, CPU, 0.0)["one"]
    assert len(found.warm) == len(found.cold) == 3
    assert min(found.cold) >= 2e4 > max(found.warm)


def test_steps_on_the_cpu(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(shapes.MODELS, "tiny", lambda: [(256, 128), (256,), (512, 8)])
    path = tmp_path / "cpu.json"
    argv = ["cpu", "--model", "tiny", "--elements", "40000", "--samples", "3", "--json", str(path)]
    with one_thread():
        assert bench.main(argv) == 0
    found = records.read(path)["records"]
    by_case = {}
    for record in found:
        by_case.setdefault(record["case"], []).append(record)
    assert len(by_case) == len(cpu.ROUNDS)
    for of_case, (dtype, names, smaller) in zip(by_case.values(), cpu.ROUNDS, strict=True):
        assert [r["provider"] for r in of_case] == [*(f"adamw_triton {name}" for name in names), *cpu.TORCH]
        (fused,) = (r["wall_ms"]["median"] for r in of_case if r["provider"] == cpu.FUSED)
        for r in of_case:
            assert r["elements"] <= 40000 // smaller and r["wall_ms"]["n"] == 3 and r["threads"] == 1
            assert r["this_over_torch_fused"] == pytest.approx(r["wall_ms"]["median"] / fused)
            assert r["case"].endswith({torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype])
    assert "at most 1.2 is aimed at" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "names"), [(dtype, names) for dtype, names, _ in cpu.ROUNDS], ids=str)
def test_every_step_on_the_cpu_is_one(dtype, names, monkeypatch):
    """Every provider moves every parameter, as torch's for-loop does, and leaves the gradients alone."""
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)
    made = {}
    monkeypatch.setattr(cpu, "problem", lambda *args, new=cpu.problem: made.setdefault(len(made), new(*args)))
    calls = cpu.providers([(8, 128), (5,)], dtype, names)
    before = [param.grad.clone() for param in made[0]]
    for call in calls.values():
        call()
    moved = {
        name: [p.detach().float() - 0.02 for p in params] for name, params in zip(calls, made.values(), strict=True)
    }
    for name, deltas in moved.items():
        for delta, expected in zip(deltas, moved["torch for-loop"], strict=True):
            # One step at the default learning rate; stochastic rounding and bf16 move by whole units.
            torch.testing.assert_close(delta, expected, rtol=0, atol=1e-6 if name.endswith("fp32") else 4e-4, msg=name)
            assert delta.abs().max() > 5e-4
    for param, grad in zip(made[0], before, strict=True):
        assert torch.equal(param.grad, grad)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dist", "--model", "gpt-5"], "invalid choice: 'gpt-5'"),
        (["dist", "--json", "."], "this is a folder"),
        (["dist", "--seconds", "-1"], "allowed: a finite number that is not negative"),
        (["cpu", "--json", "."], "this is a folder"),
        (["cpu", "--policy", "fp16"], "invalid choice: 'fp16'"),
        (["cpu", "--elements", "1000"], "got --elements 1000; allowed: 5276176 or more"),
    ],
)
def test_bad_options_give_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as exit:
        bench.main(argv)
    captured = capsys.readouterr()
    assert exit.value.code == 2 and captured.out == ""
    assert message in captured.err and captured.err.count("\n") == 1
