"""State dicts move between ours and every implementation of torch.optim.AdamW, in the middle of training."""

import copy
import io

import pytest
import torch
from models import assert_same, make_model, set_grads
from torch import nn

from adamw_triton import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
# torch's fused CPU step is not trusted with channels_last gradients; its state dict is what matters here.
TORCH = [{"foreach": False}, {"foreach": True}, {"fused": True}]


def through_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def train(model, optimizer, steps):
    twin = make_model("cpu")
    for step in steps:
        set_grads(model, twin, step)
        optimizer.step()


@pytest.mark.fast
@pytest.mark.parametrize("implementation", TORCH, ids=str)
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("convert", [copy.deepcopy, through_file], ids=["in memory", "file"])
def test_torch_to_ours_and_back(implementation, amsgrad, convert, device, path):
    """Three steps with torch, three with ours, three with torch again, against nine with torch's loop."""
    whole = make_model(device)
    reference = torch.optim.AdamW(whole.parameters(), foreach=False, amsgrad=amsgrad, **OPTIONS)
    train(whole, reference, range(9))

    model = make_model(device)
    first = torch.optim.AdamW(model.parameters(), amsgrad=amsgrad, **OPTIONS, **implementation)
    train(model, first, range(3))
    second = AdamW(model.parameters())
    second.load_state_dict(convert(first.state_dict()))
    assert second.param_groups[0]["lr"] == OPTIONS["lr"] and second.param_groups[0]["amsgrad"] == amsgrad
    train(model, second, range(3, 6))
    third = torch.optim.AdamW(model.parameters(), **implementation)
    third.load_state_dict(convert(second.state_dict()))
    train(model, third, range(6, 9))
    assert_same(model, whole, third, reference)


def test_capturable_checkpoint(device, path):
    """As torch writes one with capturable=True: flags set, and the step count a tensor on the device."""
    model, whole = make_model(device), make_model(device)
    reference = torch.optim.AdamW(whole.parameters(), foreach=False, **OPTIONS)
    train(whole, reference, range(5))
    source = torch.optim.AdamW(model.parameters(), foreach=False, **OPTIONS)
    train(model, source, range(3))
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["param_groups"][0].update(capturable=True, foreach=True, fused=None)
    for state in state_dict["state"].values():
        state["step"] = state["step"].to(device)
    optimizer = AdamW(model.parameters(), foreach=False, fused=True)
    optimizer.load_state_dict(state_dict)
    assert {k: optimizer.param_groups[0][k] for k in ("capturable", "foreach", "fused", "differentiable")} == {
        "capturable": False, "foreach": False, "fused": True, "differentiable": False,
    }  # fmt: skip
    train(model, optimizer, range(3, 5))
    assert_same(model, whole, optimizer, reference)


@pytest.mark.parametrize("kind", [float, int, torch.float64, torch.int64, torch.bfloat16, "one element"], ids=str)
def test_step_counts_of_any_kind(kind, device, path):
    """Python numbers from old checkpoints, any dtype, shape [1]."""
    ours, theirs = make_model(device), make_model(device)
    mine, reference = (
        AdamW(ours.parameters(), **OPTIONS),
        torch.optim.AdamW(theirs.parameters(), foreach=False, **OPTIONS),
    )
    set_grads(ours, theirs, 0)
    mine.step()
    reference.step()
    state_dict = copy.deepcopy(mine.state_dict())
    for state in state_dict["state"].values():
        step = float(state["step"])
        if kind == "one element":
            state["step"] = torch.tensor([step], device=device)
        else:
            state["step"] = torch.tensor(step, dtype=kind) if isinstance(kind, torch.dtype) else kind(step)
    mine.load_state_dict(state_dict)
    assert all(isinstance(state["step"], torch.Tensor) for state in mine.state.values())
    for step in (1, 2):
        set_grads(ours, theirs, step)
        mine.step()
        reference.step()
    assert_same(ours, theirs, mine, reference)
    assert all(state["step"].shape == () and state["step"].dtype == torch.float32 for state in mine.state.values())


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtype_of_state_survives(state_dtype, device, path):
    """torch's own loader would cast fp32 moments of a bf16 parameter to bf16."""
    param = nn.Parameter(torch.randn(100, device=device).bfloat16())
    optimizer = AdamW([param])
    param.grad = torch.randn_like(param)
    optimizer.step()
    state_dict = copy.deepcopy(optimizer.state_dict())
    moments = {name: torch.rand(100, device=device).to(state_dtype) for name in ("exp_avg", "exp_avg_sq")}
    state_dict["state"][0].update({name: value.clone() for name, value in moments.items()})
    optimizer.load_state_dict(through_file(state_dict))
    for name, value in moments.items():
        assert optimizer.state[param][name].dtype == state_dtype
        assert torch.equal(optimizer.state[param][name], value)
    optimizer.step()
    assert {optimizer.state[param][name].dtype for name in moments} == {state_dtype}
    assert optimizer.state_dict()["state"][0]["exp_avg"].dtype == state_dtype


@pytest.mark.fast
def test_resume_is_bit_exact(device, path):
    model = make_model(device)
    optimizer = AdamW(model.parameters(), amsgrad=True, **OPTIONS)
    train(model, optimizer, range(3))
    resumed = copy.deepcopy(model)
    resumed_optimizer = AdamW(resumed.parameters())
    resumed_optimizer.load_state_dict(through_file(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, resumed_optimizer)):
        train(m, o, range(3, 6))
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_state_in_another_memory_format(device, path):
    """A checkpoint of a contiguous model, loaded into a channels_last one."""
    ours, theirs = nn.Conv2d(3, 5, 3).to(device), nn.Conv2d(3, 5, 3).to(device)
    theirs.load_state_dict(ours.state_dict())
    source = torch.optim.AdamW(theirs.parameters(), foreach=False, **OPTIONS)
    set_grads(ours, theirs, 0)
    source.step()
    state_dict = copy.deepcopy(source.state_dict())
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(q)
    ours.to(memory_format=torch.channels_last)
    optimizer = AdamW(ours.parameters())
    optimizer.load_state_dict(state_dict)
    set_grads(ours, theirs, 1)
    optimizer.step()
    source.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=2e-6, atol=2e-7)


def test_loading_does_not_modify_what_is_loaded(device, path):
    model = make_model(device)
    source = torch.optim.AdamW(model.parameters(), foreach=False)
    train(model, source, range(2))
    state_dict = source.state_dict()
    saved = copy.deepcopy(state_dict)
    AdamW(model.parameters(), foreach=True).load_state_dict(state_dict)
    assert state_dict["param_groups"] == saved["param_groups"]
    for key, state in saved["state"].items():
        assert state.keys() == state_dict["state"][key].keys()
        assert all(torch.equal(state_dict["state"][key][name], value) for name, value in state.items())


def test_hooks_and_extra_entries(device):
    param = nn.Parameter(torch.ones(3, device=device))
    optimizer = AdamW([{"params": [param], "name": "all", "initial_lr": 1.0}])
    seen = []
    optimizer.register_state_dict_post_hook(lambda opt, sd: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda opt, sd: {**sd, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(len(opt.state)))
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["saved", 0]
    assert optimizer.param_groups[0]["name"] == "all" and optimizer.param_groups[0]["initial_lr"] == 1.0


def wrong_shape(sd):
    sd["state"][0]["exp_avg"] = torch.zeros(7)


def no_second_moment(sd):
    del sd["state"][0]["exp_avg_sq"]


def sgd_state(sd):
    sd["state"][0] = {"momentum_buffer": torch.zeros(3)}


def not_a_tensor(sd):
    sd["state"][0]["exp_avg"] = [0.0, 0.0, 0.0]


def too_few_params(sd):
    sd["param_groups"][0]["params"] = [0]


def too_many_groups(sd):
    sd["param_groups"].append(copy.deepcopy(sd["param_groups"][0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_shape, r"'exp_avg' of parameter 0 has shape \(7,\), the parameter \(3,\)"),
        (no_second_moment, "parameter 0 has no exp_avg_sq"),
        (sgd_state, "has no step, exp_avg, exp_avg_sq .it has momentum_buffer."),
        (not_a_tensor, "'exp_avg' of parameter 0 must be a tensor, got list"),
        (too_few_params, r"groups of sizes \[1\], the optimizer of \[2\]"),
        (too_many_groups, r"groups of sizes \[2, 2\], the optimizer of \[2\]"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_broken_state_is_refused_and_nothing_changes(change, message, device):
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    optimizer = AdamW(params, lr=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    state_dict = copy.deepcopy(before)
    state_dict["param_groups"][0]["lr"] = 0.25
    change(state_dict)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(after["state"][i][name], value)
        for i, state in before["state"].items()
        for name, value in state.items()
    )
    optimizer.step()
