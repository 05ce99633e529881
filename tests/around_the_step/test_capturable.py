"""capturable=True: step counts and hyper-parameters on the device, and what CUDA graphs need around them.

Where there is no GPU, graphs cannot be captured, but everything that Python does during a capture can be run.
"""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from helpers import bits, step_both
from torch import nn

from adamw_triton import AdamW, graphs, launch
from adamw_triton.control import Control, Scaling
from adamw_triton.scalars import Hyper, Scalars, host_scalars, scalar_rows
from adamw_triton.upload import Upload

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
HYPERS = [
    Hyper(1e-3, 0.9, 0.999, 1e-8, 1e-2),
    Hyper(0.0, 0.0, 0.0, 0.0, 0.0),
    Hyper(0.5, 0.5, 0.999999, 1e-3, 0.0),
    Hyper(1e-2, 0.3, 0.95, 1e-8, 0.1, 2e-2),
]
STEPS = [1.0, 2.0, 17.0, 1000.0, 123457.0]


def test_rows_are_the_hosts_scalars():
    pairs = [(hyper, step) for hyper in HYPERS for step in STEPS]
    rows = scalar_rows(
        torch.tensor([hyper for hyper, _ in pairs], dtype=torch.float64),
        torch.tensor([step for _, step in pairs], dtype=torch.float64),
    )
    expected = torch.tensor([host_scalars(*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(rows, expected, rtol=1e-13, atol=0)


def packed(hyper, first, end, device):
    """A row as scalars_kernel reads it, and the tensors whose addresses it holds."""
    numbers = torch.tensor([0.0 if isinstance(x, torch.Tensor) else x for x in hyper], dtype=torch.float64)
    kept = (hyper.lr, hyper.beta1, hyper.beta2, hyper.weight_decay)
    addresses = [x.data_ptr() + (x.dtype == torch.float64) if isinstance(x, torch.Tensor) else 0 for x in kept]
    return torch.cat((numbers.view(torch.int64), torch.tensor([*addresses, first, end]))).to(device)


@pytest.mark.parametrize("tensors", [None, torch.float32, torch.float64], ids=str)
def test_scalars_kernel(tensors, device):
    """Against the host's numbers, rows of one, several and many counts, with hyper-parameters here and in memory."""
    sizes = [1, 3, 2500, 1, 2]
    rows, expected, hypers = [], [], []
    steps = torch.full((sum(sizes) + 2,), -7.0, device=device)
    first = 1
    for size, hyper, step in zip(sizes, HYPERS + HYPERS[:1], STEPS, strict=True):
        if tensors is not None:
            hyper = Hyper(
                *(torch.tensor(x, dtype=tensors, device=device) for x in hyper[:3]),
                hyper.eps,
                torch.tensor(hyper.weight_decay, dtype=tensors, device=device),
                hyper.decay_lr,
            )
        hypers.append(hyper)
        rows.append(packed(hyper, first, first + size, device))
        steps[first : first + size] = step - 1
        expected.append(host_scalars(hyper, step))
        first += size
    before = steps.clone()
    scalars = torch.full((len(rows), 8), -7.0, dtype=torch.float64, device=device)
    launch.launch_scalars(torch.stack(rows), steps, scalars, None, Scaling(), known=False)
    torch.testing.assert_close(scalars.cpu(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert torch.equal(steps[1:-1], before[1:-1] + 1) and steps[0] == steps[-1] == -7


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_scalars_kernel_counts_unless_skipped(known, skip, device):
    control = Control(device)
    control.values[1] = float(skip and known)
    rows = torch.stack([packed(HYPERS[0], i, i + 1, device) for i in range(3)])
    steps, scalars = torch.tensor([4.0, 0.0, 9.0], device=device), torch.zeros(3, 8, dtype=torch.float64, device=device)
    scaling = Scaling(torch.tensor([8.0], device=device), torch.tensor([float(skip and not known)], device=device))
    launch.launch_scalars(rows, steps, scalars, control, scaling, known=known)
    assert steps.tolist() == ([4, 0, 9] if skip else [5, 1, 10])
    assert scalars[:, 7].tolist() == [5, 1, 10]
    if known:
        assert control.values[:2].tolist() == [1, float(skip)] and control.skipped == 0
    else:
        assert control.values[:2].tolist() == [1 / 8, float(skip)] and control.skipped == int(skip)


def pair(device, *, n_groups=1, **options):
    """Our optimizer with capturable=True and torch's on copies: two parameters a group, each group with its own lr."""
    ours = [nn.Parameter(torch.randn(40, 30, device=device)) for _ in range(2 * n_groups)]
    theirs = copy.deepcopy(ours)

    def groups(params):
        return [{"params": params[2 * i : 2 * i + 2], "lr": 10.0 ** -(i % 3 + 1)} for i in range(n_groups)]

    mine = AdamW(groups(ours), capturable=True, **OPTIONS, **options)
    return ours, theirs, mine, torch.optim.AdamW(groups(theirs), foreach=False, **OPTIONS)


@pytest.mark.parametrize("n_groups", [1, 5])
@pytest.mark.parametrize("foreach", [True, False])
def test_same_as_torch(n_groups, foreach, device, path):
    ours, theirs, mine, reference = pair(device, n_groups=n_groups, foreach=foreach)
    for _ in range(4):
        step_both(ours, theirs, mine, reference)
        for optimizer in (mine, reference):
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    assert {float(mine.state[p]["step"]) for p in ours} == {4.0}
    assert {mine.state[p]["step"].device for p in ours} == {device}


def test_device_mode_is_bitwise_the_hosts(device):
    ours, _, mine, _ = pair(device, n_groups=3)
    others = copy.deepcopy(ours)
    groups = [{"params": others[2 * i : 2 * i + 2], "lr": 10.0 ** -(i % 3 + 1)} for i in range(3)]
    host = AdamW(groups, **OPTIONS)
    for _ in range(5):
        for p, q in zip(ours, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        mine.step()
        host.step()
        assert all(map(torch.equal, map(bits, ours), map(bits, others)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_hyper_parameters_in_tensors_change_in_place(dtype, device, path):
    """lr, both betas and weight_decay; as a replay sees them, which runs no Python."""

    def number(x):
        return torch.tensor(x, dtype=dtype, device=device)

    ours, theirs, _, reference = pair(device)
    lr, beta1, beta2, weight_decay = map(number, (1e-2, 0.8, 0.95, 0.1))
    mine = AdamW(ours, lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, capturable=True)
    reference.param_groups[0]["lr"] = 1e-2
    for i in range(5):
        step_both(ours, theirs, mine, reference)
        known = mine._plan if i else None
        assert known is None or known is mine._plan
        values = (1e-2 / (i + 2), 0.1 * i, 0.9 + 0.01 * i, 0.3 / (i + 1))
        for tensor, value in zip((lr, beta1, beta2, weight_decay), values, strict=True):
            tensor.fill_(value)
        new_lr, new_beta1, new_beta2, new_decay = (float(t) for t in (lr, beta1, beta2, weight_decay))
        reference.param_groups[0].update(lr=new_lr, betas=(new_beta1, new_beta2), weight_decay=new_decay)


def test_tensors_are_read_where_they_are_when_the_step_runs(device):
    """A plan that stands uploads nothing, though the learning rate changes."""
    ours, _, _, _ = pair(device)
    lr = torch.tensor(1e-2, device=device)
    mine = AdamW(ours, lr=lr, capturable=True)
    for p in ours:
        p.grad = torch.randn_like(p)
    mine.step()
    rows = mine._plan.parts[0].rows
    known = rows._table.tensor.clone()
    lr.fill_(0.5)
    mine.step()
    assert torch.equal(rows._table.tensor, known)
    assert rows._scalars[0, 0] == 1 - float(lr) * 0.01


def test_checkpoint_between_capturable_and_host(device, path):
    ours, theirs, mine, reference = pair(device)
    for _ in range(2):
        step_both(ours, theirs, mine, reference)
    for capturable in (False, True):
        fresh = AdamW([{"params": ours}], capturable=capturable, **OPTIONS)
        fresh.load_state_dict(mine.state_dict())
        assert fresh.param_groups[0]["capturable"] is capturable
        mine = fresh
        for _ in range(2):
            step_both(ours, theirs, mine, reference)
    assert {float(mine.state[p]["step"]) for p in ours} == {6.0}


def test_switched_on_between_steps(device, path):
    ours, theirs, mine, reference = pair(device)
    for capturable in (True, False, True):
        mine.param_groups[0]["capturable"] = capturable
        for _ in range(2):
            step_both(ours, theirs, mine, reference)


# What happens in a capture, without one


@pytest.fixture
def capture(monkeypatch):
    """Makes what runs within it believe that it is captured."""

    class Capture:
        active = False

        def __enter__(self):
            self.active = True

        def __exit__(self, *_):
            self.active = False

    capture = Capture()
    monkeypatch.setattr(graphs, "is_capturing", lambda: capture.active)
    return capture


def backward(params):
    sum((p * torch.randn_like(p)).sum() for p in params).backward()


def test_capture_without_capturable_is_refused(device, capture):
    params = [nn.Parameter(torch.ones(3, device=device))]
    optimizer = AdamW(params)
    backward(params)
    optimizer.step()
    before = [bits(t) for t in (*params, *optimizer.state[params[0]].values())]
    with capture, pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    assert all(map(torch.equal, before, [bits(t) for t in (*params, *optimizer.state[params[0]].values())]))


@pytest.mark.parametrize("missing", ["any step", "this parameter's gradient", "the scaler", "the norm"])
def test_capture_without_a_step_like_it_is_refused(missing, device, capture):
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = AdamW(params, capturable=True, fused=True)
    backward(params)
    if missing == "this parameter's gradient":
        params[0].grad = None
    if missing != "any step":
        optimizer.step()
    backward(params)
    if missing == "the scaler":
        optimizer.found_inf = torch.zeros(1, device=device)
    if missing == "the norm":
        optimizer.max_grad_norm = 1.0
    before = [bits(p) for p in params]
    with capture, pytest.raises(RuntimeError, match="warm-up step"):
        optimizer.step()
    assert all(map(torch.equal, before, map(bits, params)))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_a_captured_step_uses_only_what_was_there(clip, device, capture, monkeypatch):
    """Its launches' arguments are memory that the optimizer keeps, or the gradients; nothing is read on the host."""
    params = [nn.Parameter(torch.randn(40, 30, device=device)) for _ in range(3)]
    optimizer = AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 0.1}], capturable=True, max_grad_norm=clip)
    backward(params)
    optimizer.step()
    for p in params:
        p.grad = p.grad.clone()  # as in a graph's own memory
    for name in ("launch_table", "launch_scalars", "launch_norms"):
        monkeypatch.setattr(launch, name, lambda *args, **options: None)

    def fail(self, *args):
        raise AssertionError("a tensor was read on the host")

    created = []

    class Created(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.device == device and device.type == "cuda":
                created.append(function)
            return result

    with capture, Created(), monkeypatch.context() as patch:
        for name in ("item", "__bool__", "__float__", "__int__", "numpy"):
            patch.setattr(torch.Tensor, name, fail)
        optimizer.step()
    assert not [f for f in created if "copy_" not in str(f) and "add_" not in str(f)]


def test_two_captures_need_a_step_between(device, capture):
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = AdamW(params, capturable=True)
    backward(params)
    optimizer.step()
    for again in range(2):
        with capture:
            optimizer.step()
        if not again:
            with capture, pytest.raises(RuntimeError, match="outside of CUDA graphs between two captures"):
                optimizer.step()
            optimizer.step()
    assert float(optimizer.state[params[0]]["step"]) == 4.0


def test_gradients_from_outside_of_the_graph_must_stay(device, capture):
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = AdamW(params, capturable=True)
    backward(params)
    optimizer.step()
    backward(params)
    with capture:
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    backward(params)  # into the same memory
    with pytest.raises(RuntimeError, match=r"zero_grad\(set_to_none=True\) after step\(\) was captured"):
        optimizer.zero_grad()
    assert all(p.grad is not None for p in params)
    params[1].grad = None
    with pytest.raises(RuntimeError, match="allocated anew after step"):
        backward(params)
    optimizer.forget_graphs()
    optimizer.zero_grad()
    backward(params)
    optimizer.step()


def test_gradients_of_a_captured_backward_pass_may_go(device, capture):
    """The graph writes them itself, at every replay: what `.grad` is meanwhile does not matter."""
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = AdamW(params, capturable=True)
    backward(params)
    optimizer.step()
    optimizer.zero_grad()
    with capture:
        backward(params)
        optimizer.step()
    optimizer.zero_grad()
    backward(params)


def test_what_a_graph_uses_outlives_the_optimizers_interest(device, capture):
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = AdamW(params, capturable=True)
    backward(params)
    optimizer.step()
    with capture:
        optimizer.step()
    used = weakref.ref(optimizer._plan), *(weakref.ref(p.grad) for p in params)
    with pytest.warns(UserWarning, match="state was loaded after step"):
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.warns(UserWarning, match="were changed after step.*Capture again"):
        optimizer.step()
    gc.collect()
    assert all(ref() is not None for ref in used)
    optimizer.forget_graphs()
    gc.collect()
    assert all(ref() is None for ref in used)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_gradients_that_moved_are_uploaded_for_every_capture(device, capture):
    """A replay reads the table again from a copy of its own, whatever steps outside have written to it since."""
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = AdamW(params, capturable=True)
    backward(params)
    optimizer.step()
    for p in params:
        p.grad = p.grad.clone()
    with capture:
        optimizer.step()
    upload = optimizer._plan.parts[0].addresses
    (kept,) = upload._captured
    assert kept.tolist() == [p.grad.data_ptr() for p in params] == upload.tensor.tolist()
    grads = [p.grad for p in params]
    for p in params:
        p.grad = p.grad.clone()
    optimizer._graphs.forget()
    optimizer.step()
    assert kept.tolist() == [g.data_ptr() for g in grads] != upload.tensor.tolist()


# Graphs that are replayed, simulated: what a capture enqueues is recorded, and done at each replay


@pytest.fixture
def capture_of(monkeypatch):
    """Records launches and copies to the device instead of doing them; calling the result does them."""
    recording = None

    def recorded(owner, name):
        real = getattr(owner, name)

        def call(*args, **options):
            if recording is None:
                real(*args, **options)
            else:
                recording.append(lambda: real(*args, **options))

        monkeypatch.setattr(owner, name, call)

    for name in ("launch_table", "launch_tensor", "launch_scalars", "launch_norms"):
        recorded(launch, name)
    recorded(Upload, "_copy")
    monkeypatch.setattr(graphs, "is_capturing", lambda: recording is not None)

    def capture(function):
        nonlocal recording
        recording = calls = []
        try:
            function()
        finally:
            recording = None
        return lambda: [call() for call in calls]

    return capture


def unit_steps(device, **options):
    """Two parameters that each step moves by lr, against the sign of the gradient."""
    params = [nn.Parameter(torch.zeros(8, device=device)) for _ in range(2)]
    options = {"lr": 0.1, "weight_decay": 0.0, "betas": (0.0, 0.0), "eps": 0.0, "capturable": True, **options}
    return params, AdamW(params, **options)


def set_grads(params, value):
    for p in params:
        p.grad = torch.full_like(p, value)


def moved(params, step):
    before = params[0][0].item()
    step()
    assert all((p == params[0][0]).all() for p in params)
    return pytest.approx(params[0][0].item() - before, rel=1e-5)


def test_learning_rates_outside_of_a_graph_are_not_those_in_it(device, capture_of):
    params, optimizer = unit_steps(device)
    set_grads(params, 1.0)
    optimizer.step()
    replay = capture_of(optimizer.step)
    optimizer.param_groups[0]["lr"] = 0.01
    assert moved(params, optimizer.step) == -0.01
    assert moved(params, replay) == -0.1
    assert moved(params, optimizer.step) == -0.01
    assert float(optimizer.state[params[0]]["step"]) == 4


def test_a_learning_rate_that_changed_before_a_capture(device, capture_of):
    params, optimizer = unit_steps(device)
    set_grads(params, 1.0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.01
    replay = capture_of(optimizer.step)
    assert moved(params, optimizer.step) == moved(params, replay) == -0.01


@pytest.mark.parametrize("clip", [None, 1e9])
def test_gradients_outside_of_a_graph_are_not_those_in_it(clip, device, capture_of):
    params, optimizer = unit_steps(device, max_grad_norm=clip)
    set_grads(params, 1.0)
    optimizer.step()
    set_grads(params, -1.0)
    inside = [p.grad for p in params]
    replay = capture_of(optimizer.step)
    assert moved(params, optimizer.step) == 0.1  # captured, but not yet replayed
    set_grads(params, 2.0)
    outside = [p.grad for p in params]
    for _ in range(2):
        assert moved(params, optimizer.step) == -0.1
        assert clip is None or optimizer.grad_norm == pytest.approx(8)
        assert moved(params, replay) == 0.1
        assert clip is None or optimizer.grad_norm == pytest.approx(4)
    assert all((g == -1).all() for g in inside) and all((g == 2).all() for g in outside)


def test_the_learning_rate_of_a_graph_stays_where_it_was(device, capture_of):
    lr = torch.tensor(0.1, device=device)
    params, optimizer = unit_steps(device, lr=lr)
    set_grads(params, 1.0)
    optimizer.step()
    replay = capture_of(optimizer.step)
    kept = weakref.ref(lr)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01, device=device)
    del lr
    assert moved(params, optimizer.step) == -0.01
    gc.collect()
    assert kept() is not None and moved(params, replay) == -0.1
    optimizer.param_groups[0]["lr"].data = torch.tensor(0.02, device=device)  # the same object elsewhere
    assert moved(params, optimizer.step) == -0.02


@pytest.mark.parametrize("captured", [False, True])
def test_hooks_do_not_outlive_the_optimizer(captured, device, capture_of):
    params, optimizer = unit_steps(device)
    backward(params)
    optimizer.step()
    if captured:
        capture_of(optimizer.step)
    alive = weakref.ref(optimizer), weakref.ref(optimizer._graphs)
    del optimizer
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    for p in params:
        p.grad = None
        assert not p._post_accumulate_grad_hooks
    backward(params)


def test_scalars_have_the_order_of_the_kernels():
    assert Scalars._fields == (
        "decay", "lerp_weight", "beta2", "one_minus_beta2", "neg_step_size", "inv_bias_correction2_sqrt", "eps", "step",
    )  # fmt: skip
