"""Storage options and parameters that change after construction, and what of them is refused."""

import copy

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, adamw_, storage

OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
FP32, BF16 = torch.float32, torch.bfloat16


def test_amsgrad_switched_on_later_is_refused(device, path):
    param = nn.Parameter(torch.ones(2, 128, device=device))
    optimizer = AdamW([param], exp_avg_sq_dtype=torch.uint8)
    param.grad = torch.full_like(param, 0.01)
    optimizer.step()
    before, state = param.detach().clone(), dict(optimizer.state[param])
    optimizer.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad=True needs"):
        optimizer.step()
    assert torch.equal(param, before) and optimizer.state[param] == state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_parameter_that_a_group_cannot_have_is_refused_when_appended(dtype, device, path):
    param = nn.Parameter(torch.ones(3, device=device, dtype=BF16))
    optimizer = AdamW([param], master_weight_bits=32)
    fresh = nn.Parameter(torch.ones(3, device=device, dtype=dtype))
    for p in (param, fresh):
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["params"].append(fresh)
    with pytest.raises(ValueError, match=str(dtype)):
        optimizer.step()
    assert fresh not in optimizer.state and torch.equal(fresh, torch.ones_like(fresh))


@pytest.mark.parametrize(
    ("name", "value"),
    [("master_weight_bits", 16), ("master_weight_bits", 24.0), ("exp_avg_dtype", torch.int16)],
)
def test_option_changed_to_what_cannot_be_is_refused(name, value, device, path):
    param = nn.Parameter(torch.ones(3, device=device, dtype=BF16))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param])
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=name):
        optimizer.step()
    assert not optimizer.state and torch.equal(param, torch.ones_like(param))


@pytest.mark.fast
def test_option_changed_to_what_can_be_converts_the_state(device, path):
    param = nn.Parameter(torch.randn(3, 128, device=device).bfloat16())
    optimizer = AdamW([param])
    for options in ({}, {"exp_avg_dtype": torch.int8}, {"master_weight_bits": 24}, {"exp_avg_dtype": FP32}):
        optimizer.param_groups[0].update(options)
        param.grad = torch.randn_like(param)
        optimizer.step()
    state = optimizer.state[param]
    assert state["step"] == 4 and state["exp_avg"].dtype == FP32 and state["param_remainder"].dtype == torch.int8
    assert "exp_avg_codes" not in state and "exp_avg_scale" not in state


def test_strided_scales(device, path):
    """Refused where they are given, packed where they are loaded."""
    shape = (4, 128)
    param, grad = torch.randn(shape, device=device), torch.randn(shape, device=device)
    codes = torch.zeros(shape, dtype=torch.int8, device=device), torch.zeros(shape, dtype=torch.uint8, device=device)
    both = torch.zeros(4, 2, device=device)
    before = param.clone()
    with pytest.raises(RuntimeError, match="contiguous"):
        adamw_(param, grad, *codes, step=1, lr=0.1, exp_avg_scale=both[:, 0], exp_avg_sq_scale=both[:, 1])
    assert torch.equal(param, before)

    params = [nn.Parameter(param.clone()) for _ in range(2)]
    optimizers = [AdamW([p], exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8) for p in params]
    params[0].grad = grad
    optimizers[0].step()
    params[1].data.copy_(params[0])
    state_dict = copy.deepcopy(optimizers[0].state_dict())
    entries = state_dict["state"][0]
    both = torch.stack([entries["exp_avg_scale"], entries["exp_avg_sq_scale"]], dim=2)
    entries.update(exp_avg_scale=both[..., 0], exp_avg_sq_scale=both[..., 1])
    optimizers[1].load_state_dict(state_dict)
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = grad
        optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("where", ["loaded", "live"])
def test_codes_with_gaps(where, device, path):
    """Columns cut by hand out of a wider state: the values of the codes, each with its own scale."""
    wide = nn.Parameter(torch.randn(4, 256, device=device))
    source = AdamW([wide], exp_avg_dtype="int8", exp_avg_sq_dtype="uint8", stochastic_rounding=False)
    wide.grad = torch.randn_like(wide) * torch.logspace(-2, 0, 256, device=device)
    source.step()
    expected = {name: storage.moment(name, source.state[wide])[:, :128] for name in ("exp_avg", "exp_avg_sq")}
    state_dict = copy.deepcopy(source.state_dict())
    for name, entry in state_dict["state"][0].items():
        if name != "step":
            state_dict["state"][0][name] = entry[:, :128] if "codes" in name else entry[:, :1].contiguous()
    narrow = nn.Parameter(wide.detach()[:, :128].clone())
    optimizer = AdamW([narrow], lr=0.0, exp_avg_dtype="int8", exp_avg_sq_dtype="uint8", betas=(0.0, 0.0))
    if where == "loaded":
        optimizer.load_state_dict(state_dict)
    else:
        optimizer.state[narrow] = dict(state_dict["state"][0])
    for name, value in expected.items():
        assert torch.equal(storage.moment(name, optimizer.state[narrow]), value)
    floats = optimizer.torch_state_dict()["state"][0]
    assert torch.equal(floats["exp_avg"], expected["exp_avg"])


@pytest.mark.parametrize("form", ["odd address", "bytes apart", "gaps"])
def test_remainders_in_any_memory_are_loaded(form, device, path):
    params = [nn.Parameter(torch.randn(3, 5, device=device).bfloat16()) for _ in range(2)]
    optimizers = [AdamW([p], master_weight_bits=32) for p in params]
    params[0].grad = torch.randn_like(params[0])
    optimizers[0].step()
    params[1].data.copy_(params[0])
    state_dict = copy.deepcopy(optimizers[0].state_dict())
    bytes_ = state_dict["state"][0]["param_remainder"]
    if form == "odd address":
        buffer = torch.zeros(1 + bytes_.numel(), dtype=torch.uint8, device=device)
        given = buffer[1:].view(bytes_.shape)
    elif form == "bytes apart":
        given = torch.zeros(2, 3, 5, dtype=torch.uint8, device=device).permute(1, 2, 0)
    else:
        given = torch.zeros(3, 5, 2, 2, dtype=torch.uint8, device=device)[..., 0]
    state_dict["state"][0]["param_remainder"] = given.copy_(bytes_)
    optimizers[1].load_state_dict(state_dict)
    assert torch.equal(optimizers[0].master_params()[0], optimizers[1].master_params()[0])
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_frozen_parameters_that_cannot_have_the_storage_keep_their_state(dtype, device, path):
    param = nn.Parameter(torch.randn(4, 128, dtype=dtype, device=device))
    param.grad = torch.randn_like(param)
    theirs = torch.optim.AdamW([param])
    theirs.step()
    param.requires_grad_(False)
    options = {"exp_avg_dtype": "int8", "exp_avg_sq_dtype": "uint8", "master_weight_bits": 32}
    optimizer = AdamW([param], **options)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for name, value in theirs.state[param].items():
        assert torch.equal(optimizer.state[param][name], value) and len(optimizer.state[param]) == 3
    AdamW([param], **options).load_state_dict(optimizer.state_dict())


def test_scale_on_another_device_is_refused(device, path):
    param, grad, v = (torch.ones(5, device=device) for _ in range(3))
    codes, scale = torch.zeros(5, dtype=torch.int8, device=device), torch.zeros(1, device="meta")
    with pytest.raises(RuntimeError, match="exp_avg_scale"):
        adamw_(param, grad, codes, v, step=1, lr=0.1, exp_avg_scale=scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_master_params_of_wide_parameters_lose_nothing(dtype, device):
    param = nn.Parameter(torch.randn(5, dtype=dtype, device=device))
    optimizer = AdamW([param])
    before = param.detach().clone()
    (master,) = optimizer.master_params()
    assert torch.equal(master, before)
    optimizer.load_master_params([master])
    assert torch.equal(param, before)


@pytest.mark.parametrize("master", [24, 32])
def test_checkpoint_of_masters_before_the_first_step(master, device, path):
    weights = torch.randn(300, device=device)
    params = [nn.Parameter(torch.zeros(300, device=device, dtype=BF16)) for _ in range(2)]
    optimizers = [AdamW([p], master_weight_bits=master) for p in params]
    optimizers[0].load_master_params([weights])
    params[1].data.copy_(params[0])
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    assert torch.equal(optimizers[0].master_params()[0], optimizers[1].master_params()[0])
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(*params)


@pytest.mark.parametrize("step", [None, "x", torch.ones(2)])
def test_a_step_that_is_no_number_is_refused_before_anything_changes(step, device):
    param = nn.Parameter(torch.ones(3, device=device))
    param.grad = torch.ones_like(param)
    optimizer = AdamW([param])
    optimizer.step()
    broken = copy.deepcopy(optimizer.state_dict())
    broken["state"][0]["step"] = step
    with pytest.raises(ValueError, match="'step' of parameter 0"):
        optimizer.load_state_dict(broken)
    assert optimizer.state[param]["step"] == 1
    optimizer.step()


def test_grad_scale_of_shape_one(device, path):
    tensors = [torch.tensor(value, device=device) for value in (1.0, 1.0, 0.0, 0.0)]
    adamw_(*tensors, step=1, lr=0.1, weight_decay=0.0, grad_scale=torch.tensor([2.0], device=device))
    assert tensors[2].item() == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["seed", "stream", "element_offset"])
def test_numbers_of_stochastic_rounding_are_integers(name, device, path):
    tensors = [torch.ones(3, dtype=BF16, device=device) for _ in range(4)]
    with pytest.raises(ValueError, match=f"{name} must be an integer"):
        adamw_(*tensors, step=1, lr=0.1, stochastic_rounding=True, **{name: 1.5})
    assert all(torch.equal(t, torch.ones_like(t)) for t in tensors)


def test_a_group_may_leave_stochastic_rounding_out(device):
    low, wide = nn.Parameter(torch.ones(3, device=device, dtype=BF16)), nn.Parameter(torch.ones(3, device=device))
    AdamW([{"params": [low]}, {"params": [wide], "stochastic_rounding": False}], stochastic_rounding=True, seed=3)
    with pytest.raises(ValueError, match="seed=3"):
        AdamW([{"params": [wide], "seed": 3}])


def test_groups_of_a_single_tensor_are_refused():
    from adamw_triton import param_groups_master_weights

    with pytest.raises(TypeError, match=r"got a tensor of \(3, 2\)"):
        param_groups_master_weights(torch.ones(3, 2))
