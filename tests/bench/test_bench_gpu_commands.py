import argparse
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from adamw_triton import AdamW, launch, launch_group
from adamw_triton.storage import StateTensors
from adamw_triton.storage.policies import BY_NAME, POLICIES
from bench import common, cpu, dist, models, peers, records, throughput, timing
from bench.codegen import roofs, tune

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(not launch.INTERPRETED, reason="on CPU tensors kernels need TRITON_INTERPRET=1")


class Time:
    """A clock that only moves when a call says that it takes time."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def provider(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


def fake_events(clock):
    class Event:
        def record(self):
            self.at = clock.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    return Event


@pytest.fixture
def clock():
    return Time()


@pytest.fixture
def providers(clock):
    return {"quick": clock.provider("quick", 0.001), "slow": clock.provider("slow", 0.003)}


# timing


def test_a_slower_call_shows_as_slower(clock, providers):
    device = timing.device_ms(providers, CPU, samples=4, event=fake_events(clock), flush=lambda: None)
    wall = timing.wall_ms(providers, CPU, samples=4, clock=clock)
    host = timing.host_us(providers, CPU, samples=4, clock=clock)
    for taken, unit in ((device, 1), (wall, 1), (host, 1000)):
        assert taken == {"quick": [pytest.approx(unit)] * 4, "slow": [pytest.approx(3 * unit)] * 4}


def test_providers_take_turns_after_the_warm_up(clock, providers):
    timing.wall_ms(providers, CPU, samples=3, warmup=2, clock=clock)
    assert clock.calls == ["quick"] * 2 + ["slow"] * 2 + ["quick", "slow"] * 3
    clock.calls.clear()
    timing.device_ms(providers, CPU, samples=2, warmup=1, event=fake_events(clock), flush=lambda: None)
    assert clock.calls == ["quick", "slow"] + ["quick", "slow"] * 2


def test_the_cache_is_flushed_outside_of_the_time(clock, providers):
    flush = clock.provider("flush", 1.0)
    taken = timing.device_ms(providers, CPU, samples=2, warmup=0, event=fake_events(clock), flush=flush)
    assert clock.calls == ["flush", "quick", "flush", "slow"] * 2
    assert max(taken["quick"]) < 2
    assert max(timing.wall_ms(providers, CPU, samples=2, flush=flush, clock=clock)["quick"]) < 2


def test_slow_providers_get_fewer_samples_but_three(clock):
    providers = {"quick": clock.provider("quick", 0.001), "slow": clock.provider("slow", 1.0)}
    taken = timing.wall_ms(providers, CPU, samples=20, seconds=0.01, clock=clock)
    assert (len(taken["quick"]), len(taken["slow"])) == (10, 3)


def test_spreads():
    assert records.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"p20": 2.0, "median": 3.5, "p80": 5.0, "n": 6}


def event(name, us, device_type=DeviceType.CUDA, annotation=False):
    duration = SimpleNamespace(elapsed_us=lambda: us)
    return SimpleNamespace(name=name, time_range=duration, device_type=device_type, is_user_annotation=annotation)


def test_only_kernels_are_counted():
    events = [
        event("adamw_table_kernel", 1000.0),
        event("adamw_table_kernel", 3000.0),
        event("Memcpy HtoD (Pageable -> Device)", 500.0),
        event("Memset (Device)", 500.0),
        event("Optimizer.step#AdamW.step", 9000.0, annotation=True),
        event("cudaLaunchKernel", 7000.0, device_type=DeviceType.CPU),
    ]
    assert timing.count_kernels(events, steps=2) == {"kernel_ms": 2.0, "launches": 1.0}
    assert timing.count_kernels(events[2:], steps=2) == {"kernel_ms": None, "launches": None}


def test_nothing_is_invented_without_a_gpu():
    assert timing.kernels(lambda: None, CPU) == {"kernel_ms": None, "launches": None}
    assert timing.added_bytes(lambda: None, CPU) is None
    timing.Flush(CPU)()


# roofs


@needs_kernels
@pytest.mark.parametrize("n_bytes", [1, 4000, 2 * 4 * (2 * roofs.COPY_BLOCK_SIZE + 12)])
def test_copy(n_bytes):
    source, target = roofs.copy_bytes(n_bytes, CPU)
    assert 2 * source.nbytes >= n_bytes and source.nbytes % 16 == 0
    target.zero_()
    roofs.copy(source, target)
    assert torch.equal(source, target)


@needs_kernels
@pytest.mark.parametrize("n_elements", [1, 1024, 3000])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_skeleton(policy, n_elements):
    (param,), (moments,) = peers.problem([(n_elements,)], policy, CPU)
    param.grad.mul_(64).round_().div_(64)  # every dtype holds it, so that no store rounds
    tensors = [param.detach(), param.grad, moments["exp_avg"], moments["exp_avg_sq"]]
    expected = [torch.maximum(t.double(), param.grad.double()).to(t.dtype) for t in tensors]
    expected[1] = param.grad.clone()
    roofs.skeleton(*tensors)
    assert all(torch.equal(*pair) for pair in zip(tensors, expected, strict=True))


# throughput


@needs_kernels
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_throughput_case(policy):
    case = throughput.Case(policy, 1152, CPU)
    assert throughput.TENSOR in case.calls and throughput.TABLE in case.calls
    assert (throughput.SKELETON in case.calls) == policy.is_plain
    assert case.calls.keys() | case.errors.keys() >= set(throughput.PROVIDERS) - {throughput.OUR_COPY}
    assert case.bytes[throughput.TENSOR] == round(1152 * policy.bytes_per_element)
    if policy.is_plain:
        assert case.bytes[throughput.SKELETON] == 1152 * (policy.bytes_per_element - 2 * 4 * policy.amsgrad)
    assert abs(case.bytes[throughput.OUR_COPY] - case.bytes[throughput.TENSOR]) <= 32
    before = case.param.detach().clone()
    for name in (throughput.TENSOR, throughput.TABLE):
        case.calls[name]()
    if policy.param == torch.float32:
        assert not torch.equal(before, case.param)


@needs_kernels
@pytest.mark.parametrize(("name", "foreach"), [(throughput.TENSOR, False), (throughput.TABLE, True)])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_throughput_launches_what_the_optimizer_would(policy, name, foreach, monkeypatch):
    """The same kernel in the same form: all that a launch is compiled for, and its grid."""
    launched = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: launched.append((self.kernel, grid, list(map(form, args)), options))

    def form(argument):
        if isinstance(argument, torch.Tensor):
            return argument.dtype, argument.shape[-1:], argument.data_ptr() % launch_group.ALIGNMENT
        return argument

    for kernel in ("adamw_kernel", "adamw_table_kernel"):
        monkeypatch.setattr(launch, kernel, Recorder(kernel))
    case = throughput.Case(policy, 1152, CPU)
    launched.clear()
    case.calls[name]()
    optimizer = AdamW([case.param], **peers.HYPER, **policy.options, foreach=foreach)
    peers.share(optimizer, [case.param], [case.moments])
    optimizer.step()
    of_case, of_optimizer = launched
    assert of_case == of_optimizer


def test_rates():
    policy = BY_NAME["fp32"]
    moved = dict.fromkeys(throughput.PROVIDERS, 28_000_000)
    samples = {
        throughput.TENSOR: [0.02, 0.02],
        throughput.TORCH_COPY: [0.01, 0.01],
        throughput.OUR_COPY: [0.014, 0.014],
        throughput.SKELETON: [0.016, 0.016],
    }
    errors = {peers.FUSED: "refused"}
    rows = throughput.rates(policy, 10**6, moved, samples, errors, nominal=4e12)
    by_provider = {row["provider"]: row for row in rows}
    ours = by_provider[throughput.TENSOR]
    assert ours["gb_per_s"]["median"] == pytest.approx(1400)  # 28 MB in 20 µs
    assert ours["us"]["median"] == pytest.approx(20)
    ratios = [ours[key] for key in ("of_nominal", "of_copy", "of_skeleton")]
    assert ratios == pytest.approx([0.35, 0.5, 0.8])
    assert by_provider[peers.FUSED]["error"] == "refused"
    assert by_provider[throughput.TABLE]["error"] == "not measured"


def test_sizes():
    assert [throughput.size(text) for text in ("2^10", "1000")] == [1024, 1000]
    assert [throughput.size_name(n) for n in (1024, 1000)] == ["2^10", "1000"]


# tune


def test_every_thread_of_a_configuration_has_elements():
    every = tune.configurations()
    assert all(1 <= tune.elements_per_thread(one) <= tune.MAX_ELEMENTS_PER_THREAD for one in every)
    assert all(tune.configuration_of(policy) in every for policy in POLICIES)
    assert {one.eviction for one in every} == set(tune.EVICTIONS)


@needs_kernels
@pytest.mark.parametrize("entry", tune.ENTRIES)
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_configurations_step_alike(policy, entry):
    configurations = [tune.Configuration(256, 4), tune.Configuration(512, 8, "evict_first")]
    results = []
    for one in configurations:
        torch.manual_seed(1)
        (param,), (moments,) = peers.problem([(6, 128)], policy, CPU)
        tensors = [param.detach(), param.grad, *moments.values()]
        before = [tensor.clone() for tensor in tensors]
        state = StateTensors.from_entries(moments, policy.amsgrad)
        made = tune.calls(param.detach(), param.grad, state, entry, configurations, throughput.noise_key(policy))
        made[tune.name_of(one)]()
        assert not torch.equal(before[2], tensors[2]) and torch.equal(before[1], tensors[1])
        results.append(tensors)
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_tune_rows_are_sorted_and_mark_what_is_used():
    used = launch.configuration_of(*[torch.float32] * 4)
    samples = {tune.name_of(one): [1.0] for one in tune.configurations()}
    samples[tune.name_of(used)] = [0.5]
    first, second, *_ = tune.rows(BY_NAME["fp32"], "table", 2**20, samples)
    assert first["chosen"] and first["of_best"] == 1 and first["gb_per_s"]["median"] == pytest.approx(2**20 * 28 / 5e5)
    assert not second["chosen"] and second["of_best"] == 0.5


@pytest.fixture
def as_if_on_a_gpu(monkeypatch):
    """Lets throughput and tune run on the CPU, with times that are made up."""

    def device_ms(calls, device, *, samples, flush):
        for call in calls.values():
            call()
        return {name: [1.0 + i] * samples for i, name in enumerate(calls)}

    for module in (throughput, tune):
        monkeypatch.setattr(module, "can_measure", lambda device: True)
        monkeypatch.setattr(module, "free_bytes", lambda device: 10**6)
    monkeypatch.setattr(timing, "device_ms", device_ms)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


@needs_kernels
def test_throughput_from_end_to_end(as_if_on_a_gpu, tmp_path, monkeypatch):
    for_loop = peers.BY_NAME["torch for-loop"]
    missing = peers.Peer("missing", "no-such-package", "nothing", for_loop.factory)
    large = peers.Peer("large", "torch", "", for_loop.factory, own_state=lambda policy: 10**6)
    monkeypatch.setattr(throughput, "STEPPED", [for_loop, missing, large])
    path = tmp_path / "result.json"
    argv = ["--sizes", "2^10", "2^20", "--dtype", "fp32", "--dtype", "bf16-param-grad", "--json", str(path)]
    assert throughput.main([*argv, "--samples", "2", "--device", "cpu"]) == 0
    found = records.read(path)["records"]
    providers = [*throughput.PROVIDERS, "torch for-loop", "missing", "large"]
    # What does not fit at all is a row of those that are always there.
    assert len(found) == 2 * (len(providers) + len(throughput.PROVIDERS))
    for row in found:
        if row["case"].endswith("2^20"):
            assert row["error"].startswith("needs 0.0 GB")
        elif row["provider"] == "missing":
            assert row["error"] == "no-such-package is not installed" and row["differs"] == "nothing"
        elif row["provider"] == "large":
            assert row["error"].startswith("its state needs 1.0 GB, 0.0 are left")
        elif row["provider"] in (peers.FUSED, "torch for-loop") and row["policy"] == "bf16-param-grad":
            assert row["error"]  # torch refuses
        else:
            assert row["gb_per_s"]["n"] == 2 and row["of_copy"] > 0 and row["of_skeleton"] > 0


@needs_kernels
def test_tune_from_end_to_end(as_if_on_a_gpu, tmp_path):
    path = tmp_path / "result.json"
    argv = ["--size", "2^10", "--dtype", "fp32", "--samples", "2", "--device", "cpu", "--json", str(path)]
    assert tune.main(argv) == 0
    found = records.read(path)["records"]
    assert len(found) == 2 * len(tune.configurations())
    assert sum(row["chosen"] for row in found) == 2
    assert tune.main([*argv, "--size", "2^20"]) == 0
    assert records.read(path)["records"][0]["error"] == "does not fit"


# models


def test_compiling_has_a_limit(clock):
    def slow(params, policy, moments):
        clock.now += 100
        return SimpleNamespace(step=lambda: None)

    peer = peers.Peer("compiles", "torch", "", slow, compiles=True)
    starter = peers.Starter(60, clock)
    chosen = [peer, peers.BY_NAME["torch for-loop"]]
    params, moments = peers.problem([(3,)], BY_NAME["fp32"], CPU)
    steps, errors = starter.start(chosen, params, BY_NAME["fp32"], moments)
    assert steps.keys() == {"compiles", "torch for-loop"} and not errors
    steps, errors = starter.start(chosen, params, BY_NAME["fp32"], moments)
    assert steps.keys() == {"torch for-loop"} and errors["compiles"].startswith("not compiled: 60 s")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a machine without a GPU says")
@pytest.mark.parametrize(("module", "count"), [(throughput, len(POLICIES)), (models, None), (tune, 1)])
def test_commands_mark_what_they_cannot_measure(module, count, tmp_path, capsys):
    path = tmp_path / "result.json"
    assert module.main(["--json", str(path)]) == 0
    found = records.read(path)["records"]
    command = module.__name__.split(".")[-1]
    assert len(found) == count or module is models
    assert all(row["error"].startswith("no GPU") and row["command"] == command for row in found)
    assert not any(isinstance(value, float) for row in found for value in row.values())
    assert json.loads(path.read_text())["conditions"]["command"].startswith(
        f"python -m bench {module.__name__.split('.')[-1]}"
    )
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "argv", "named"),
    [
        (throughput, ["--sizes", "0"], "2^20"),
        (throughput, ["--sizes", "2^99"], "2^20"),
        (throughput, ["--dtype", "int8"], "fp32"),
        (throughput, ["--samples", "-1"], "positive integer"),
        (models, ["--model", "alexnet"], "resnet-50"),
        (models, ["--peer", "sgd"], "torch fused"),
        (models, ["--seconds", "nan"], "finite"),
        (models, ["--modle", "resnet-50"], "--model"),
        (models, ["--with", "clip,sgd"], "clip, amp, graph, release"),
        (models, ["--with", "clip+release"], "release alone"),
        (models, ["--with", "amp+graph"], "amp or graph"),
        (tune, ["--entry", "both"], "table"),
        (tune, ["--size", "many"], "2^20"),
        (tune, ["--device", "tpu"], "cpu"),
    ],
)
def test_bad_options_are_one_line_and_status_2(module, argv, named, capsys):
    with pytest.raises(SystemExit) as exit:
        module.main(argv)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and named in message and message.startswith("python -m bench ")


def test_defaults_are_what_suite_parses():
    for module in (throughput, models, tune, dist, cpu):
        parser = common.Parser("suite", "")
        module.add_options(parser)
        assert isinstance(parser.parse([]), argparse.Namespace)
