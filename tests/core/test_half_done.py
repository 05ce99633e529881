"""A step that is refused, or that fails in the middle, leaves nothing half done: neither values nor counts."""

import copy

import pytest
import torch
from helpers import bits
from torch import nn

from adamw_triton import AdamW, launch, reference

SHAPES = [(3, 5), (1100,), (2, 700), (7,)]
LR = 3e-2  # large enough to move every bfloat16 parameter


# Parameters that are joined on the CPU get the same bits alone where they fill whole vectors.
WHOLE_VECTORS = [(4, 16), (1088,), (2, 704), (64,)]


def make_params(device, dtypes=(torch.float32,), shapes=SHAPES):
    return [
        nn.Parameter(torch.randn(shape, device=device).to(dtype))
        for shape, dtype in zip(shapes, dtypes * len(shapes), strict=False)
    ]


def give_gradients(*lists):
    for params in zip(*lists, strict=True):
        grad = torch.randn_like(params[0])
        for p in params:
            p.grad = grad.clone()


def bytes_of(value):
    return bits(value).numpy().tobytes() if isinstance(value, torch.Tensor) else value


def content(optimizer, param):
    """A parameter and its state to the bit."""
    tensors = {"param": param, **optimizer.state.get(param, {})}
    return {name: bytes_of(tensor) for name, tensor in tensors.items()}


def everything(optimizer):
    params = [p for group in optimizer.param_groups for p in group["params"]]
    counters = [getattr(optimizer, name) for name in ("grad_norm", "skipped_steps", "update_norm", "param_norm")]
    return [[content(optimizer, p) for p in params], [bytes_of(p.grad) for p in params], list(map(bytes_of, counters))]


def count_of(optimizer, param):
    return float(optimizer.state[param]["step"]) if "step" in optimizer.state.get(param, {}) else 0.0


# Options changed to what the constructor refuses

BAD_VALUES = [
    ("lr", -1.0, "Invalid learning rate: -1.0"),
    ("lr", float("nan"), "Invalid learning rate: nan"),
    ("lr", torch.tensor(-0.5), "Invalid learning rate"),
    ("lr", torch.tensor(float("nan")), "Invalid learning rate"),
    ("lr", torch.tensor([1e-3, 1e-3]), "Tensor lr must be 1-element"),
    ("eps", -1.0, "Invalid epsilon value: -1.0"),
    ("weight_decay", -1.0, "Invalid weight_decay value: -1.0"),
    ("betas", (0.9, 1.0), "Invalid beta parameter at index 1: 1.0"),
    ("betas", (1.5, 0.9), "Invalid beta parameter at index 0: 1.5"),
    ("betas", (0.9, float("nan")), "Invalid beta parameter at index 1: nan"),
    ("betas", [0.9, 1.0], "Invalid beta parameter at index 1: 1.0"),
]
OF_ALL = [{}, {"max_grad_norm": 1.0, "skip_nonfinite": True, "statistics": True}]


@pytest.mark.parametrize("of_all", OF_ALL, ids=["plain", "control"])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(("name", "value", "message"), BAD_VALUES, ids=lambda value: str(value)[:24])
def test_changed_options(name, value, message, foreach, of_all, device, path):
    """In either of two groups, before the first step and later; then the optimizer goes on as if nothing had been."""
    ours, theirs = (make_params(device) for _ in range(2))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p)
    optimizer, undisturbed = (
        AdamW([{"params": params[:2]}, {"params": params[2:], "lr": 1e-2}], foreach=foreach, **of_all)
        for params in (ours, theirs)
    )
    for which in (1, 0, 1):
        give_gradients(ours, theirs)
        before = everything(optimizer)
        group = optimizer.param_groups[which]
        good_value, group[name] = group[name], value
        for _ in range(2):  # the second time, no plan is left
            with pytest.raises(ValueError, match=message):
                optimizer.step()
            assert everything(optimizer) == before
        group[name] = good_value
        optimizer.step()
        undisturbed.step()
        assert everything(optimizer) == everything(undisturbed)


@pytest.mark.parametrize("foreach", [None, True, False])
def test_learning_rate_tensor_that_becomes_negative_in_place(foreach, device, path):
    ours, theirs = (make_params(device) for _ in range(2))
    for p, q in zip(ours, theirs, strict=True):
        q.data.copy_(p)
    lr = torch.tensor(1e-2)
    optimizer, undisturbed = AdamW(ours, lr=lr, foreach=foreach), AdamW(theirs, lr=lr.clone(), foreach=foreach)
    for _ in range(2):
        give_gradients(ours, theirs)
        optimizer.step()
        undisturbed.step()
    give_gradients(ours, theirs)
    before = everything(optimizer)
    lr.neg_()
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.step()
    assert everything(optimizer) == before
    lr.neg_()
    optimizer.step()
    undisturbed.step()
    assert everything(optimizer) == everything(undisturbed)


# Launches that fail


class LaunchFailed(Exception):
    pass


def fail_on_call(monkeypatch, module, name, number):
    """Make the `number`th call from now on raise, before it has done anything."""
    function, calls = getattr(module, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            raise LaunchFailed(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


def make_twin(optimizer, params):
    """An optimizer of its own in the same state, with the same gradients."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, copies, strict=True):
        q.grad = p.grad.clone()
    group, options = optimizer.param_groups[0], optimizer.group_options[0]
    twin = AdamW(
        copies,
        lr=LR,
        foreach=group["foreach"],
        max_grad_norm=optimizer.max_grad_norm,
        skip_nonfinite=optimizer.skip_nonfinite,
        statistics=optimizer.statistics,
        **{name: options[name] for name in ("cautious", "exp_avg_dtype", "exp_avg_sq_dtype")},
    )
    if optimizer.state:
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return twin, copies


CONTROLS = [{}, {"skip_nonfinite": True}, {"max_grad_norm": 0.5}]
MIXED = (torch.float32, torch.bfloat16)


def check_failing_step(optimizer, params, monkeypatch, module, name, number, n_updated):
    """One step that fails: who was updated is a whole step further, all others where they were; then it goes on.

    Args:
        n_updated: how many parameters have been updated when it fails.
    """
    give_gradients(params)
    twin, copies = make_twin(optimizer, params)
    twin.step()
    counts = [count_of(optimizer, p) for p in params]
    moments = [{k: bytes_of(v) for k, v in optimizer.state.get(p, {}).items()} for p in params]
    before = [bytes_of(p) for p in params]
    with monkeypatch.context() as context:
        fail_on_call(context, module, name, number)
        with pytest.raises(LaunchFailed):
            optimizer.step()
    updated = [bytes_of(p) != old for p, old in zip(params, before, strict=True)]
    assert sum(updated) == n_updated
    for p, copied, count, old, is_updated in zip(params, copies, counts, moments, updated, strict=True):
        assert count_of(optimizer, p) == count + is_updated
        if is_updated:
            assert content(optimizer, p) == content(twin, copied)
        elif old:
            assert content(optimizer, p) == {"param": bytes_of(p), **old}
        else:  # a failure in the first step may leave state that has not been used
            entries = {k: v for k, v in optimizer.state.get(p, {}).items() if k != "step"}
            assert not any(torch.as_tensor(value).any() for value in entries.values())

    give_gradients(params)
    twin, copies = make_twin(optimizer, params)
    for _ in range(2):
        optimizer.step()
        twin.step()
    for p, copied, count, is_updated in zip(params, copies, counts, updated, strict=True):
        assert count_of(optimizer, p) == count + is_updated + 2
        assert content(optimizer, p) == content(twin, copied)


@pytest.mark.parametrize("control", CONTROLS, ids=str)
@pytest.mark.parametrize("n_steps_before", [0, 2])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_one_launch_for_each(number, n_steps_before, control, device, path, monkeypatch):
    params = make_params(device)
    # On the CPU parameters are stepped one by one where statistics are wanted.
    optimizer = AdamW(params, lr=LR, foreach=False, statistics=path == "reference", **control)
    for _ in range(n_steps_before):
        give_gradients(params)
        optimizer.step()
    module, name = (launch, "launch_tensor") if path == "kernel" else (reference, "adamw_")
    check_failing_step(optimizer, params, monkeypatch, module, name, number, n_updated=number - 1)


@pytest.mark.parametrize("control", CONTROLS, ids=str)
@pytest.mark.parametrize("n_steps_before", [0, 2])
@pytest.mark.parametrize("number", [1, 2])
def test_one_launch_for_each_dtype(number, n_steps_before, control, device, path, monkeypatch):
    params = make_params(device, MIXED, SHAPES if path == "kernel" else WHOLE_VECTORS)
    # On the CPU parameters are joined where their storage is not torch's.
    storage = {"exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.bfloat16} if path == "reference" else {}
    optimizer = AdamW(params, lr=LR, foreach=True, **storage, **control)
    for _ in range(n_steps_before):
        give_gradients(params)
        optimizer.step()
    if path == "kernel":
        n_updated = (number - 1) * sum(p.dtype == torch.float32 for p in params)
        check_failing_step(optimizer, params, monkeypatch, launch, "launch_table", number, n_updated)
    else:
        n_updated = (number - 1) * sum(p.dtype == torch.float32 for p in params)  # in one piece
        check_failing_step(optimizer, params, monkeypatch, reference, "adamw_", number, n_updated)


@pytest.mark.parametrize("control", CONTROLS, ids=str)
@pytest.mark.parametrize("n_steps_before", [0, 2])
def test_torchs_step_on_the_cpu(n_steps_before, control, monkeypatch):
    monkeypatch.setattr(launch, "has_kernels", lambda device: False)
    params = make_params(torch.device("cpu"))
    optimizer = AdamW(params, lr=LR, **control)
    for _ in range(n_steps_before):
        give_gradients(params)
        optimizer.step()
    check_failing_step(optimizer, params, monkeypatch, torch, "_fused_adamw_", 1, n_updated=0)


@pytest.mark.parametrize("n_steps_before", [0, 2])
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("launch_scalars", {"skip_nonfinite": True}),
        ("launch_scalars", {"max_grad_norm": 0.5, "skip_nonfinite": True}),
        ("launch_norms", {"max_grad_norm": 0.5}),
        ("launch_norms", {"skip_nonfinite": True}),
    ],
    ids=str,
)
def test_launches_before_the_update(name, options, foreach, n_steps_before, device, monkeypatch):
    params = make_params(device, MIXED)
    optimizer = AdamW(params, lr=LR, foreach=foreach, **options)
    for _ in range(n_steps_before):
        give_gradients(params)
        optimizer.step()
    check_failing_step(optimizer, params, monkeypatch, launch, name, 1, n_updated=0)


@pytest.mark.parametrize("control", [{"skip_nonfinite": True}, {"skip_nonfinite": True, "max_grad_norm": 0.5}], ids=str)
@pytest.mark.parametrize("foreach", [None, True, False])
def test_a_failure_around_skipped_steps(foreach, control, device, path, monkeypatch):
    """A skipped step counts nothing, so there is no count to take back when the next one fails."""
    params = make_params(device)
    optimizer = AdamW(params, lr=LR, foreach=foreach, **control)
    give_gradients(params)
    optimizer.step()
    give_gradients(params)
    params[1].grad[3] = torch.inf
    optimizer.step()
    assert [count_of(optimizer, p) for p in params] == [1.0] * len(params)
    if path == "reference":
        module, name = torch, "_fused_adamw_"
    else:
        module, name = launch, "launch_tensor" if foreach is False else "launch_table"
    check_failing_step(optimizer, params, monkeypatch, module, name, 1, n_updated=0)
    assert optimizer.skipped_steps == 1
