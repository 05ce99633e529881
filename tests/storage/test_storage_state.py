"""What a user does with stored state: memory, master weights, checkpoints, options, and what is refused."""

import copy
import itertools

import pytest
import torch
from helpers import bits, fp32_from_bits
from torch import nn

from adamw_triton import AdamW, adamw_, storage
from adamw_triton.storage.policies import POLICIES

OPTIONS = {"lr": 3e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
CODED = [policy for policy in POLICIES if not policy.is_plain]


def copies(params):
    made = [nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, made, strict=True):
        q.grad = p.grad.clone()
    return made


# What a user does with it


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_state_bytes_are_the_table(policy, device, path):
    n = 128 * 64
    param = nn.Parameter(torch.zeros(16, n // 16, device=device, dtype=policy.param))
    param.grad = torch.zeros_like(param)
    optimizer = AdamW([param], **policy.options)
    optimizer.step()
    found = optimizer.state_bytes()
    assert found.n_params == n and found.total - found.by_name["step"] == policy.state_bytes * n
    assert found.total == sum(t.untyped_storage().nbytes() for t in optimizer.state[param].values())
    lines = str(found).splitlines()
    assert lines[-1].split()[0] == "total" and f"{found.total:,}" in lines[-1]


@pytest.mark.parametrize("policy", CODED, ids=lambda policy: policy.name)
def test_master_weights_in_and_out(policy, device, path):
    params = [nn.Parameter(torch.zeros(n, device=device, dtype=policy.param)) for n in (3, (5, 128))]
    optimizer = AdamW(params, lr=0.0, weight_decay=0.0, **policy.options)
    weights = [torch.randn(n, device=device) for n in (3, (5, 128))]
    weights[1][0, :4] = fp32_from_bits([0x3F808000, 0x3F818000, 0xBF808000, 0x3F807FFF]).to(device)  # ties
    optimizer.load_master_params(weights)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        got = optimizer.master_params()
        for weight, master, param in zip(weights, got, params, strict=True):
            assert master.dtype == torch.float32
            if policy.master_weight_bits == 32:
                assert torch.equal(bits(master), bits(weight))
            elif policy.master_weight_bits == 24:
                assert (master - weight).abs().div(weight.abs()).max() <= 2.0**-16
            else:
                assert torch.equal(master, param.float())
            assert (param.float() - weight).abs().div(weight.abs()).max() <= 2.0**-8
        if not policy.stochastic_rounding:
            optimizer.step()  # a step of nothing changes nothing
    before = optimizer.master_params()
    with pytest.raises(ValueError, match="shapes"):
        optimizer.load_master_params(weights[::-1])
    assert all(map(torch.equal, before, optimizer.master_params()))


SAME_MODEL = [(a, b) for a, b in itertools.product(POLICIES, repeat=2) if a.param == b.param]


@pytest.mark.parametrize(("source", "target"), SAME_MODEL, ids=lambda policy: policy.name)
def test_state_of_any_policy_loads_into_any_other(source, target, device):
    """Where parameters have the same dtype; what the target can hold survives."""
    params = [nn.Parameter(torch.randn(n, device=device).to(source.param)) for n in (5, (3, 128))]
    optimizer = AdamW(params, **OPTIONS, **source.options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    other = AdamW(copies(params), **OPTIONS, **target.options)
    if source.amsgrad and target.exp_avg_sq == torch.uint8:
        with pytest.raises(ValueError, match="amsgrad=True needs"):
            other.load_state_dict(optimizer.state_dict())
        return
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for name in ("exp_avg", "exp_avg_sq"):
        for p, q in zip(params, other.param_groups[0]["params"], strict=True):
            a, b = optimizer.state[p], other.state[q]
            wish = target.options[f"{name}_dtype"]
            has_codes = wish == storage.CODED[name].dtype and p.dim() == 2
            assert has_codes == (f"{name}_codes" in b)
            assert has_codes or wish is None or b[name].dtype == (wish if wish.is_floating_point else torch.float32)
            values = [storage.moment(name, s).float() for s in (a, b)]
            # A code's step is largest at the top: 2 / 127 of m, 4 / 255 of v.
            torch.testing.assert_close(*values, rtol=0.02, atol=1e-3 * values[0].abs().max().item())
    for a, b in zip(optimizer.master_params(), other.master_params(), strict=True):
        exact = target.master_weight_bits == 32 or source.master_weight_bits is None
        torch.testing.assert_close(a, b, rtol=0 if exact else 2.0**-8, atol=0)
    wish = target.options["exp_avg_dtype"]
    assert other.group_options[0]["exp_avg_dtype"] == (wish and str(wish).removeprefix("torch."))
    for p in other.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    other.step()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_torch_loads_it(policy, device, path):
    params = [nn.Parameter(torch.randn(n, device=device).to(policy.param)) for n in (5, (3, 128))]
    optimizer = AdamW(params, **OPTIONS, **policy.options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    theirs = torch.optim.AdamW(copies(params), **OPTIONS, amsgrad=policy.amsgrad, foreach=False)
    state_dict = optimizer.torch_state_dict()
    names = {"step", "exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if policy.amsgrad else [])}
    assert all(entries.keys() == names for entries in state_dict["state"].values())
    assert state_dict["param_groups"][0].keys() <= theirs.param_groups[0].keys()
    theirs.load_state_dict(state_dict)
    theirs.step()
    back = AdamW(copies(params), **OPTIONS, **policy.options)
    back.load_state_dict(state_dict)
    assert back.state_dict()["state"][1].keys() == optimizer.state_dict()["state"][1].keys()
    back.step()


BROKEN = {
    "no scale": (lambda s: s.pop("exp_avg_scale"), "exp_avg_scale"),
    "short scale": (lambda s: s.update(exp_avg_sq_scale=torch.ones(2)), "of 3 elements"),
    "scale of blocks of 256": (lambda s: s.update(exp_avg_scale=torch.ones(2)), "one for each 128"),
    "fp16 scale": (lambda s: s.update(exp_avg_scale=torch.ones(3).half()), "must be float32"),
    "scale without codes": (lambda s: s.pop("exp_avg_codes"), "exp_avg"),
    "a moment twice": (lambda s: s.update(exp_avg=torch.zeros(3, 128)), "one of them"),
    "codes of the other moment": (lambda s: s.update(exp_avg_codes=s["exp_avg_sq_codes"].clone()), "torch.int8"),
    "remainder of another shape": (lambda s: s.update(param_remainder=torch.zeros(7, dtype=torch.int8)), r"\(7,\)"),
    "remainder that is a float": (lambda s: s.update(param_remainder=torch.zeros(3, 128)), "must be int8, or uint8"),
    "no exp_avg": (lambda s: (s.pop("exp_avg_codes"), s.pop("exp_avg_scale")), "no exp_avg"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_inconsistent_state_is_refused_before_anything_changes(name, device):
    change, message = BROKEN[name]
    options = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8, "master_weight_bits": 24}
    param = nn.Parameter(torch.randn(3, 128, device=device).bfloat16())
    optimizer = AdamW([param], **options)
    param.grad = torch.randn_like(param)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    broken = copy.deepcopy(saved)
    change(broken["state"][0])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken)
    now = optimizer.state_dict()["state"][0]
    assert all(torch.equal(now[key], value) for key, value in saved["state"][0].items())
    state, before = optimizer.state[param], param.detach().clone()
    if name != "no exp_avg":  # which is created anew
        change(state)
        with pytest.raises(RuntimeError, match=message.replace("no exp_avg", "exp_avg")):
            optimizer.step()
        assert torch.equal(param, before)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
REFUSED = [
    (BF16, {"exp_avg_dtype": torch.uint8}, "exp_avg_dtype must be None or one of"),
    (BF16, {"exp_avg_sq_dtype": torch.int8}, "exp_avg_sq_dtype must be None or one of"),
    (BF16, {"exp_avg_dtype": "int9"}, "got 'int9'"),
    (BF16, {"exp_avg_sq_dtype": FP16}, "for float16 parameters"),
    (BF16, {"exp_avg_sq_dtype": torch.uint8, "amsgrad": True}, "amsgrad"),
    (BF16, {"master_weight_bits": 16}, "None, 24 or 32; got 16"),
    (FP32, {"master_weight_bits": 32}, "param_groups_master_weights"),
    (FP32, {"master_weight_bits": 24}, "its own master"),
    (FP16, {"master_weight_bits": 24}, "Use master_weight_bits=32"),
    (FP32, {"stochastic_rounding": True}, "Leave it out"),
    (FP16, {"stochastic_rounding": True}, "Leave it out"),
    (BF16, {"stochastic_rounding": True, "master_weight_bits": 32}, "Leave it out"),
    (BF16, {"stochastic_rounding": "yes"}, "None, True or False; got 'yes'"),
    (BF16, {"seed": 5}, "stochastic_rounding=True"),
    (BF16, {"seed": -1, "stochastic_rounding": True}, "got -1"),
    (BF16, {"seed": 0.5, "stochastic_rounding": True}, "got 0.5"),
    (torch.float64, {"exp_avg_dtype": torch.int8}, "float32, bfloat16 and float16"),
    (torch.complex64, {"exp_avg_dtype": torch.bfloat16}, "float32, bfloat16 and float16"),
]


@pytest.mark.parametrize(("dtype", "options", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_work_is_refused(dtype, options, message):
    param = nn.Parameter(torch.zeros(3, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        AdamW([param], **options)
    with pytest.raises(ValueError, match=message):
        AdamW([nn.Parameter(torch.zeros(2))]).add_param_group({"params": [param], **options})


FUNCTION_REFUSES = [
    (BF16, {"param_remainder": torch.int16, "master_param": FP32}, ValueError, "one of them"),
    (FP32, {"param_remainder": torch.int16}, RuntimeError, "of a bfloat16 parameter"),
    (FP16, {"master_param": BF16}, RuntimeError, "must be float32"),
    (torch.float64, {"master_param": FP32}, RuntimeError, "float32, bfloat16 and float16 parameters"),
    (BF16, {"seed": 3}, ValueError, "give it with stochastic_rounding=True"),
    (BF16, {"element_offset": 8}, ValueError, "give it with stochastic_rounding=True"),
    (BF16, {"element_offset": -8, "stochastic_rounding": True}, ValueError, "got -8"),
    (BF16, {"stream": 2**31, "stochastic_rounding": True}, ValueError, "stream must be"),
    (FP32, {"stochastic_rounding": True}, ValueError, "got a parameter of torch.float32"),
    (torch.float64, {"stochastic_rounding": True}, ValueError, "torch.float64"),
]


@pytest.mark.parametrize(("dtype", "options", "error", "message"), FUNCTION_REFUSES)
def test_what_the_function_refuses(dtype, options, error, message, device, path):
    tensors = [torch.ones(5, dtype=dtype, device=device) for _ in range(4)]
    entries = {
        name: torch.zeros(5, dtype=value, device=device) if isinstance(value, torch.dtype) else value
        for name, value in options.items()
    }
    with pytest.raises(error, match=message):
        adamw_(*tensors, step=1, lr=0.1, **entries)
    assert all(torch.equal(t, torch.ones_like(t)) for t in tensors)


def test_codes_of_a_float64_parameter_are_refused(device, path):
    param, grad = (torch.ones(5, dtype=torch.float64, device=device) for _ in range(2))
    codes, scale = torch.zeros(5, dtype=torch.int8, device=device), torch.zeros(1, device=device)
    with pytest.raises(RuntimeError, match="float32, bfloat16 and float16 parameters"):
        adamw_(param, grad, codes, torch.zeros_like(param), step=1, lr=0.1, exp_avg_scale=scale)


def test_random_bits_of_a_step_counted_on_the_device(device, path):
    """With GradScaler's attributes the step reaches the kernel through memory; the bits are the same."""
    start = torch.randn(2000, device=device).bfloat16()
    results = []
    for scaled in (False, True):
        param = nn.Parameter(start.clone())
        optimizer = AdamW([param], stochastic_rounding=True, seed=11, fused=True, **OPTIONS)
        generator = torch.Generator(device).manual_seed(2)
        for step in range(4):
            param.grad = torch.randn(2000, device=device, generator=generator).bfloat16()
            if scaled:
                optimizer.grad_scale = torch.ones((), device=device)
                optimizer.found_inf = torch.zeros((), device=device)
                if step == 2:  # a skipped step draws no bits
                    optimizer.found_inf += 1
                    optimizer.step()
                    optimizer.found_inf -= 1
            optimizer.step()
        results.append((param, optimizer.state[param]))
    (one, state), (other, other_state) = results
    # The scalars are the same to an fp32 rounding, which stochastic rounding can turn into one of bf16.
    assert (one != other).float().mean() < 0.01
    assert state["step"] == other_state["step"] == 4


@pytest.mark.parametrize("master", [None, 24, 32])
@pytest.mark.parametrize("exp_avg_dtype", [None, BF16, FP32, FP16, torch.int8])
@pytest.mark.parametrize("exp_avg_sq_dtype", [None, BF16, FP32, torch.uint8])
def test_options_combine(master, exp_avg_dtype, exp_avg_sq_dtype, device):
    """m and v independently, with maximize, a tensor lr, weight decay and, where v is a float, amsgrad."""
    options = {"exp_avg_dtype": exp_avg_dtype, "exp_avg_sq_dtype": exp_avg_sq_dtype, "master_weight_bits": master}
    param = nn.Parameter(torch.randn(7, 128, device=device).bfloat16())
    exact = nn.Parameter(param.detach().double())
    amsgrad = exp_avg_sq_dtype != torch.uint8
    mine = AdamW([param], lr=torch.tensor(0.01), maximize=True, amsgrad=amsgrad, weight_decay=0.1, **options)
    reference = torch.optim.AdamW([exact], lr=0.01, maximize=True, amsgrad=amsgrad, weight_decay=0.1, foreach=False)
    for _ in range(3):
        param.grad = torch.randn_like(param)
        exact.grad = param.grad.double()
        mine.step()
        reference.step()
    torch.testing.assert_close(mine.master_params()[0].double(), exact, rtol=3 * 2.0**-7, atol=3e-3)


def test_mixed_models_through_groups(device, path):
    from adamw_triton import param_groups_master_weights, param_groups_weight_decay

    model = nn.Sequential(nn.Linear(128, 8).bfloat16(), nn.LayerNorm(8)).to(device)
    groups = param_groups_master_weights(
        param_groups_weight_decay(model, 0.1), 24, exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8
    )
    assert [(g["master_weight_bits"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (24, 0.1, 1), (24, 0.0, 1), (None, 0.0, 2),
    ]  # fmt: skip
    optimizer = AdamW(groups)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state[model[0].weight]["exp_avg_codes"].dtype == torch.int8
    assert optimizer.state[model[0].bias]["exp_avg"].dtype == torch.float32
    assert optimizer.state[model[1].weight]["exp_avg"].dtype == torch.float32
    named = param_groups_master_weights(model.named_parameters())
    assert [len(group["params"]) for group in named] == [2, 2] and AdamW(named)


def test_grad_scaler_and_layouts_with_coded_state(device, path):
    """A transposed parameter, a gradient in another order, one with gaps, a skipped and an unscaled step."""
    options = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8, "master_weight_bits": 24}
    values = torch.randn(40, 128, device=device).bfloat16()
    layouts = {
        "contiguous": values.clone(),
        "transposed": values.t().contiguous().t(),
        "gaps": torch.zeros(40, 256, device=device).bfloat16()[:, :128].copy_(values),
    }
    gradients = [torch.randn(40, 128, device=device).bfloat16() for _ in range(3)]
    results = {}
    for name, value in layouts.items():
        param = nn.Parameter(value)
        optimizer = AdamW([param], **OPTIONS, **options, fused=True)
        for step, gradient in enumerate(gradients):
            param.grad = gradient.t().contiguous().t() if name == "contiguous" else gradient * 4
            optimizer.grad_scale = torch.tensor(1.0 if name == "contiguous" else 4.0, device=device)
            optimizer.found_inf = torch.tensor(1.0 if step == 1 else 0.0, device=device)
            before = param.detach().clone()
            optimizer.step()
            assert torch.equal(before, param) == (step == 1)
        assert optimizer.state[param]["step"] == 2
        results[name] = param.detach().float()
    # Rows that do not lie together have their moments in floats.
    torch.testing.assert_close(results["contiguous"], results["gaps"], rtol=0, atol=2.0**-7 * 4)
    torch.testing.assert_close(results["contiguous"], results["transposed"], rtol=0.02, atol=4e-3)
