"""capturable=True: what CUDA graphs need around a step.

Where there is no GPU, graphs cannot be captured, but everything that Python does during a capture can be run, and what
a capture enqueues can be recorded and done at each "replay".
"""

import copy
import gc
import weakref

import pytest
import torch
from pairs import OPTIONS, Pair, assert_same, contents, set_grads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adamw_triton.plan
from adamw_triton import AdamW, launch


def make_params(device, n=2):
    return [nn.Parameter(torch.randn(40, 30, device=device)) for _ in range(n)]


def make_groups(device, n_groups):
    """Two parameters a group, each group with its own learning rate."""
    return [{"params": make_params(device), "lr": 10.0 ** -(i % 3 + 1)} for i in range(n_groups)]


@pytest.mark.fast
@pytest.mark.parametrize("n_groups", [1, 5])
@pytest.mark.parametrize("foreach", [True, False])
def test_same_as_torch(n_groups, foreach, device, path):
    pair = Pair(make_groups(device, n_groups), capturable=True, foreach=foreach, **OPTIONS)
    for _ in range(4):
        pair.step()
        for group in (*pair.mine.param_groups, *pair.reference.param_groups):
            group["lr"] *= 0.5
    assert {float(pair.mine.state[p]["step"]) for p in pair.ours} == {4.0}


def test_counts_lie_on_the_device(device):
    """With and without it: a graph's replays and steps outside count in the same place."""
    for capturable in (True, False):
        params = make_params(device)
        optimizer = AdamW(params, capturable=capturable)
        set_grads(params)
        optimizer.step()
        assert {optimizer.state[p]["step"].device for p in params} == {device}


def test_bitwise_the_steps_of_others(device, path):
    pair = Pair(make_groups(device, 3), against=OPTIONS, capturable=True, **OPTIONS)
    for _ in range(3):
        pair.step()
        assert_same(pair.mine, pair.reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hyper_parameters_in_tensors_change_in_place(dtype, device, path):
    """lr, both betas and weight_decay; as a replay sees them, which runs no Python."""
    tensors = [torch.tensor(x, dtype=dtype, device=device) for x in (1e-2, 0.8, 0.95, 0.1)]
    lr, beta1, beta2, weight_decay = tensors
    pair = Pair(make_params(device), against=OPTIONS, capturable=True)
    pair.mine.param_groups[0].update(lr=lr, betas=(beta1, beta2), weight_decay=weight_decay)
    for i in range(5):
        new_lr, new_beta1, new_beta2, new_decay = map(float, tensors)
        pair.reference.param_groups[0].update(lr=new_lr, betas=(new_beta1, new_beta2), weight_decay=new_decay)
        pair.step()
        values = (1e-2 / (i + 2), 0.1 * i, 0.9 + 0.01 * i, 0.3 / (i + 1))
        for tensor, value in zip(tensors, values, strict=True):
            tensor.fill_(value)


def test_checkpoints_between_capturable_and_not(device, path):
    pair = Pair(make_params(device), capturable=True, **OPTIONS)
    for _ in range(2):
        pair.step()
    for capturable in (False, True):
        fresh = AdamW([{"params": pair.ours}], capturable=capturable, **OPTIONS)
        fresh.load_state_dict(pair.mine.state_dict())
        assert fresh.param_groups[0]["capturable"] is capturable
        pair.mine = fresh
        for _ in range(2):
            pair.step()
    assert {float(pair.mine.state[p]["step"]) for p in pair.ours} == {6.0}


def test_switched_on_between_steps(device, path):
    pair = Pair(make_params(device), **OPTIONS)
    for capturable in (True, False, True):
        pair.mine.param_groups[0]["capturable"] = capturable
        for _ in range(2):
            pair.step()


# What happens in a capture, without one


@pytest.fixture
def capture_of(monkeypatch, device):
    """Capture a function: its launches and copies to the device are recorded, and done where the result is called."""
    recording = None

    def recorded(owner, name, is_enqueued=lambda *args: True):
        real = getattr(owner, name)

        def call(*args, **options):
            if recording is None or not is_enqueued(*args):
                return real(*args, **options)
            recording.append(lambda: real(*args, **options))
            return args[0]

        monkeypatch.setattr(owner, name, call)

    for name in ("launch_table", "launch_tensor", "launch_scalars", "launch_norms"):
        recorded(launch, name)
    recorded(torch.Tensor, "copy_", lambda tensor, source: tensor.device == device)
    monkeypatch.setattr(adamw_triton.plan, "is_capturing", lambda: recording is not None)

    def capture(function):
        nonlocal recording
        recording = calls = []
        try:
            function()
        finally:
            recording = None
        return lambda: [call() for call in calls]

    return capture


def test_capture_without_capturable_is_refused(device, capture_of):
    params = make_params(device)
    optimizer = AdamW(params)
    set_grads(params)
    optimizer.step()
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match="capturable=True"):
        capture_of(optimizer.step)
    assert_same(before, optimizer)


@pytest.mark.parametrize("missing", ["any step", "this parameter's gradient", "the norm", "the statistics", "amsgrad"])
def test_capture_without_a_step_like_it_is_refused(missing, device, capture_of):
    params = make_params(device)
    optimizer = AdamW(params, capturable=True, fused=True)
    set_grads(params)
    if missing == "this parameter's gradient":
        params[0].grad = None
    if missing != "any step":
        optimizer.step()
    set_grads(params)
    if missing == "the norm":
        optimizer.max_grad_norm = 1.0
    optimizer.statistics = missing == "the statistics"
    optimizer.param_groups[0]["amsgrad"] = missing == "amsgrad"
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match="warm-up step"):
        capture_of(optimizer.step)
    assert_same(before, optimizer)
    optimizer.step()
    capture_of(optimizer.step)


class Created(TorchDispatchMode):
    """Notes operations."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("scaler", ["no scaler", "a scaler", "a scaler that the warm-up had not"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_captured_step_makes_and_reads_no_tensor(clip, scaler, device, capture_of, monkeypatch):
    """Its launches' arguments are memory that the optimizer has, or the gradients."""
    params = make_params(device, 3)
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], capturable=True, max_grad_norm=clip)

    def set_scaler():
        optimizer.grad_scale, optimizer.found_inf = (torch.ones(1, device=device) for _ in range(2))

    seen = []
    set_grads(params)
    if scaler == "a scaler":
        set_scaler()
    with Created(seen):
        optimizer.step()
    seen.clear()
    if scaler != "no scaler":
        set_scaler()
    set_grads(params)  # elsewhere, as in a graph's own memory

    def fail(self, *args):
        raise AssertionError("a tensor was read on the host")

    with Created(seen), monkeypatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy"):
            patch.setattr(torch.Tensor, name, fail)
        capture_of(optimizer.step)
    made = {name for name in seen if name.startswith("aten")}
    assert made <= {"aten.clone.default"}, "a copy of the table, on the host"


def test_what_a_graph_reads_stays_until_it_is_forgotten(device, capture_of, monkeypatch):
    """Though the optimizer has other tables by then."""
    params = make_params(device, 3)
    optimizer = AdamW(params, capturable=True, max_grad_norm=1.0, statistics=True)
    set_grads(params)
    optimizer.step()
    used = []

    def look(real):
        def call(*args, **options):
            tensors = [*args, *options.values(), *(args[0] if isinstance(args[0], tuple) else ())]
            used.extend(weakref.ref(t) for t in tensors if isinstance(t, torch.Tensor))
            real(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("launch_table", "launch_scalars", "launch_norms"):
            patch.setattr(launch, name, look(getattr(launch, name)))
        replay = capture_of(optimizer.step)
    of_step = {id(t) for entries in optimizer.state.values() for t in entries.values()}
    used = [ref for ref in used if id(ref()) not in of_step]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.statistics = False
    set_grads(params)
    optimizer.step()
    del replay
    gc.collect()
    assert len(used) >= 8 and all(ref() is not None for ref in used)
    optimizer.forget_graphs()
    gc.collect()
    left = [ref() for ref in used if ref() is not None]
    decision = optimizer._decision_on(device).values
    assert all(t.data_ptr() == decision.data_ptr() for t in left), "but the decision, which is for all"


def test_no_table_is_kept_for_a_graph_that_was_none(device, capture_of):
    """A refused capture, and steps outside: a weak reference to a table dies with the next plan."""
    params = make_params(device, 3)
    optimizer = AdamW(params, capturable=True)
    set_grads(params)
    tables = []
    real = launch.Table.of

    def made(*args, **options):
        table = real(*args, **options)
        tables.append(weakref.ref(table.tensors))
        return table

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Table, "of", made)
        for amsgrad in (False, True):
            optimizer.param_groups[0]["amsgrad"] = amsgrad
            with pytest.raises(RuntimeError, match="warm-up"):
                capture_of(optimizer.step)
            optimizer.step()
    gc.collect()
    assert [ref() is None for ref in tables] == [True, False]


# Replays


def unit_steps(device, **options):
    """Two parameters that each step moves by lr, against the sign of the gradient."""
    params = [nn.Parameter(torch.zeros(8, device=device)) for _ in range(2)]
    options = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.0, 0.0), "eps": 0.0, "capturable": True, **options}
    optimizer = AdamW(params, **options)
    set_all(params, 1.0)
    optimizer.step()
    return params, optimizer


def set_all(params, value):
    set_grads(params, [torch.full_like(p, value) for p in params])


def moved(params, step):
    before = params[0][0].item()
    step()
    assert all((p == params[0][0]).all() for p in params)
    return pytest.approx(params[0][0].item() - before, rel=1e-5)


@pytest.mark.parametrize("foreach", [None, False])
def test_learning_rates_outside_of_a_graph_are_not_those_in_it(foreach, device, capture_of):
    params, optimizer = unit_steps(device, foreach=foreach)
    replay = capture_of(optimizer.step)
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        assert moved(params, optimizer.step) == -0.01
        assert moved(params, replay) == -0.1
        assert moved(params, replay) == -0.1
    assert float(optimizer.state[params[0]]["step"]) == 7


def test_a_learning_rate_that_changed_before_a_capture(device, capture_of):
    params, optimizer = unit_steps(device)
    optimizer.param_groups[0]["lr"] = 0.01
    replay = capture_of(optimizer.step)
    assert moved(params, optimizer.step) == moved(params, replay) == -0.01


def test_a_learning_rate_in_a_tensor_is_read_at_each_replay(device, capture_of):
    lr = torch.tensor(0.1, device=device)
    params, optimizer = unit_steps(device, lr=lr)
    replay = capture_of(optimizer.step)
    for value in (0.1, 0.03):
        lr.fill_(value)
        assert moved(params, optimizer.step) == moved(params, replay) == -value
    optimizer.param_groups[0]["lr"] = 0.01
    assert moved(params, optimizer.step) == -0.01
    assert moved(params, replay) == pytest.approx(-0.03, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 1e9])
def test_gradients_outside_of_a_graph_are_not_those_in_it(clip, device, capture_of):
    params, optimizer = unit_steps(device, max_grad_norm=clip)
    set_all(params, -1.0)
    inside = [p.grad for p in params]
    replay = capture_of(optimizer.step)
    assert moved(params, optimizer.step) == 0.1  # captured, but not yet replayed
    set_all(params, 2.0)
    outside = [p.grad for p in params]
    for _ in range(2):
        assert moved(params, optimizer.step) == -0.1
        assert clip is None or optimizer.grad_norm == pytest.approx(8)
        assert moved(params, replay) == 0.1
        assert clip is None or optimizer.grad_norm == pytest.approx(4)
    assert all((g == -1).all() for g in inside) and all((g == 2).all() for g in outside)


def test_a_missing_gradient_is_missing_at_each_replay(device, capture_of):
    """And one that is missing outside is still there in the graph."""
    params, optimizer = unit_steps(device)
    both = capture_of(optimizer.step)
    kept, params[1].grad = params[1].grad, None
    first = capture_of(optimizer.step)
    optimizer.step()
    for step, which in ((both, (0, 1)), (first, (0,)), (optimizer.step, (0,)), (both, (0, 1))):
        before = [p[0].item() for p in params]
        step()
        assert [i for i, p in enumerate(params) if p[0].item() != before[i]] == list(which)
    assert [float(optimizer.state[p]["step"]) for p in params] == [6, 3] and kept is not None


def test_sixteen_captures_in_a_row(device, capture_of):
    """Each with gradients and a learning rate of its own; on a GPU, one more is refused."""
    params, optimizer = unit_steps(device)
    replays, kept = [], []
    for i in range(16):
        set_all(params, -1.0 if i % 2 else 1.0)
        kept += [p.grad for p in params]
        optimizer.param_groups[0]["lr"] = 0.01 * (i + 1)
        replays.append(capture_of(optimizer.step))
    if device.type == "cuda":
        with pytest.raises(RuntimeError, match=r"after 16 captures.*take a step outside"):
            capture_of(optimizer.step)
    for i in (3, 15, 0, 3, 8):
        assert moved(params, replays[i]) == (0.01 if i % 2 else -0.01) * (i + 1)
        assert moved(params, optimizer.step) == 0.16
    capture_of(optimizer.step)


def test_a_graph_skips_for_itself(device, capture_of):
    """What it decided is not what the next step outside decides."""
    params, optimizer = unit_steps(device, skip_nonfinite=True)
    set_all(params, float("nan"))
    inside = [p.grad for p in params]
    replay = capture_of(optimizer.step)
    set_all(params, 1.0)
    assert moved(params, replay) == 0 and optimizer.skipped_steps == 1
    assert moved(params, optimizer.step) == -0.1 and optimizer.skipped_steps == 1
    inside[0].fill_(1.0), inside[1].fill_(1.0)
    assert moved(params, replay) == -0.1 and optimizer.skipped_steps == 1
