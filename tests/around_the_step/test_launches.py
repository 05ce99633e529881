"""What a step does on the host: no more launches than it says, and no waiting for the device."""

import contextlib

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adamw_triton.plan
from adamw_triton import AdamW, launch


def several(device, n_groups, **options):
    params = [nn.Parameter(torch.randn(40, 30, device=device)) for _ in range(max(n_groups, 3))]
    groups = [{"params": [p], "lr": 10.0 ** -(1 + i % 5)} for i, p in enumerate(params)]
    optimizer = AdamW(groups if n_groups > 1 else params, betas=(0.8, 0.95), **options)
    for p in params:
        p.grad = torch.randn_like(p)
    return params, optimizer


READS = ("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "numpy", "__array__")


ALL = {"max_grad_norm": 5.0, "skip_nonfinite": True, "skip_grad_norm_above": 1e3, "statistics": True}


@pytest.mark.fast
@pytest.mark.parametrize("n_groups", [1, 4])
@pytest.mark.parametrize("capturable", [False, True], ids=["", "capturable"])
@pytest.mark.parametrize("scaler", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 5.0}, {"max_grad_norm": 5.0, "statistics": True}, {"skip_nonfinite": True}, ALL],
    ids=lambda options: "+".join(options) or "plain",
)
def test_no_step_reads_a_tensor_on_the_host(options, scaler, capturable, n_groups, device, monkeypatch):
    """Once a plan stands: that would be a synchronisation on a GPU. Nor does looking at the results."""
    params, optimizer = several(device, n_groups, capturable=capturable, fused=scaler, **options)
    rates = [torch.tensor(1e-3, device=device) for _ in optimizer.param_groups]
    if capturable:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    if scaler:
        optimizer.found_inf = torch.zeros(1, device=device)
        optimizer.grad_scale = torch.full((1,), 4.0, device=device)
    optimizer.step()
    calls = []

    def fail(self, *args, **kwargs):
        raise AssertionError("a tensor was read on the host, or a table was made")

    with monkeypatch.context() as patch:
        for name in ("launch_table", "launch_scalars", "launch_norms"):
            patch.setattr(launch, name, lambda *args, name=name, **kwargs: calls.append(name))
        for name in READS:
            patch.setattr(torch.Tensor, name, fail)
        patch.setattr(torch.cuda, "synchronize", fail)
        patch.setattr(launch.Table, "of", fail)
        # It looks at learning rates in tensors on the CPU, as they are here, and on no others.
        patch.setattr(adamw_triton.plan, "check_hyperparams", lambda group: None)
        for step in range(3):
            for i, p in enumerate(params):  # gradients elsewhere, some missing, and another learning rate
                p.grad = None if i == step else torch.ones_like(p)
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                rate.mul_(0.5)
                if not capturable:
                    group["lr"] = 1e-3 / (step + 1)
            optimizer.step()
            _ = optimizer.grad_norm, optimizer.skipped_steps, optimizer.update_norm, optimizer.param_norm
    need_norm = options.keys() & {"max_grad_norm", "skip_nonfinite"}
    assert calls == [*["launch_norms"] * bool(need_norm), "launch_scalars", "launch_table"] * 3


UPDATE, NORMS, SCALARS = "adamw_table_kernel", "grad_norm_kernel", "scalars_kernel"


@pytest.mark.parametrize("n_groups", [1, 20])
@pytest.mark.parametrize("scaler", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize(
    "options", [{}, {"capturable": True}, {"statistics": True}, {"max_grad_norm": 5.0}, ALL], ids=str
)
def test_launches_of_a_step(options, scaler, n_groups, device, launches):
    """As many for 20 groups, with learning rates of their own, as for one; the norm costs one more."""
    params, optimizer = several(device, n_groups, fused=scaler, **options)
    if scaler:
        optimizer.found_inf = torch.zeros(1, device=device)
        optimizer.grad_scale = torch.full((1,), 4.0, device=device)
    need_norm = options.keys() & {"max_grad_norm", "skip_nonfinite"}
    for _ in range(3):  # the step that makes the plan, one that has it, and one without some of the gradients
        launches.clear()
        optimizer.step()
        assert [name for name, _ in launches] == [*[NORMS] * bool(need_norm), SCALARS, UPDATE]
        params[1].grad = None


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 5.0}], ids=str)
def test_launches_of_each_tensor(options, device, launches):
    """With foreach=False: one for each gradient, counted and measured together."""
    params, optimizer = several(device, 1, foreach=False, **options)
    for _ in range(2):
        launches.clear()
        optimizer.step()
        n_grads = sum(p.grad is not None for p in params)
        names = [name for name, _ in launches]
        assert names == [*[NORMS] * bool(options), SCALARS, *["adamw_kernel"] * n_grads]
        params[1].grad = None


def test_one_lane_counts_a_parameter(device, launches):
    """129 parameters take a second program, which is still one launch."""
    params = [nn.Parameter(torch.ones(1, device=device)) for _ in range(129)]
    optimizer = AdamW([{"params": params[:100]}, {"params": params[100:], "lr": 0.1}])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert launches == [(SCALARS, 2), (UPDATE, 129)]


def test_no_launch_without_gradients(device, launches):
    _, optimizer = several(device, 2, **ALL)
    optimizer.step()
    launches.clear()
    optimizer.zero_grad()
    optimizer.step()
    assert not launches


class EveryOperation(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


MODES = {
    "no mode": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "dispatch": EveryOperation,
}


@pytest.mark.parametrize("mode", MODES)
def test_tables_are_kept_in_any_mode(mode, device, monkeypatch):
    """Made once, and perhaps once more when the mode is entered; not at every step in it."""
    _, optimizer = several(device, 2)
    made = []
    real = launch.Table.of
    monkeypatch.setattr(launch.Table, "of", lambda *args, **options: made.append(args) or real(*args, **options))
    optimizer.step()
    with MODES[mode]():
        for _ in range(3):
            optimizer.step()
    n_made = len(made)
    assert n_made <= 2
