"""What is refused: with which sentence, at which point, and that nothing has changed."""

import copy

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, adamw_, param_groups_weight_decay


def param(device="cpu"):
    return nn.Parameter(torch.ones(3, device=device))


BAD_HYPER = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0; it must be at least 0"),
    ({"lr": float("nan")}, "Invalid learning rate: nan"),
    ({"lr": torch.tensor([1e-3, 1e-3])}, r"Tensor lr must be 1-element, got shape \(2,\)"),
    ({"eps": -1e-8}, "Invalid epsilon value: -1e-08; it must be at least 0"),
    ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1; it must be at least 0"),
    ({"betas": (1.0, 0.999)}, r"Invalid beta parameter at index 0: 1.0; it must be in \[0, 1\)"),
    ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    ({"betas": (torch.tensor([0.9, 0.8]), 0.99)}, r"Tensor betas\[0\] must be 1-element, got shape \(2,\)"),
]


@pytest.mark.fast
@pytest.mark.parametrize(("options", "message"), BAD_HYPER, ids=lambda x: str(x)[:40])
def test_hyper_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([param()], **options)
    with pytest.raises(ValueError, match=message):
        AdamW([{"params": [param()], **options}])
    optimizer = AdamW([param()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [param()], **options})
    assert len(optimizer.param_groups) == 1
    p, g, m, v = (torch.ones(3) for _ in range(4))
    with pytest.raises(ValueError, match=message):
        adamw_(p, g, m, v, step=1, **{"lr": 0.1, **options})
    assert all(torch.equal(t, torch.ones(3)) for t in (p, g, m, v))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"differentiable": True}, r"differentiable=True is not supported.*Use torch.optim.AdamW"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_options_that_are_not_supported(options, message):
    with pytest.raises(ValueError, match=message):
        AdamW([param()], **options)
    optimizer = AdamW([param()])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [param()], **options})
    assert len(optimizer.param_groups) == 1


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


BAD_PARAMS = [
    (lambda: frozen(torch.ones(3, dtype=torch.int64)), TypeError, "dtype torch.int64 .*use float32, bfloat16"),
    (lambda: frozen(torch.ones(3, dtype=torch.bool)), TypeError, "dtype torch.bool"),
    (lambda: frozen(torch.ones(3).to(torch.float8_e4m3fn)), TypeError, "dtype torch.float8_e4m3fn"),
    (
        lambda: nn.Parameter(torch.ones(1).expand(3)),
        ValueError,
        r"share memory \(shape \(3,\), strides \(0,\)\).*clone",
    ),
    (lambda: nn.Parameter(torch.ones(9).as_strided((3, 3), (2, 1))), ValueError, "share memory"),
    (lambda: nn.Parameter(torch.ones(3, dtype=torch.complex64).conj()), ValueError, "conjugated or negated view"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_PARAMS, ids=lambda x: x if isinstance(x, str) else "")
def test_parameters(make, error, message, path):
    """They may be listed, as in torch, and are refused when they have a gradient."""
    good, bad = param(), make()
    optimizer = AdamW([good])
    optimizer.add_param_group({"params": [bad]})
    for _ in range(2):
        good.grad = torch.ones(3)
        optimizer.step()
    bad.grad = torch.zeros(bad.shape, dtype=bad.dtype)
    before = good.detach().clone()
    with pytest.raises(error, match=message):
        optimizer.step()
    assert torch.equal(good, before) and optimizer.state[good]["step"] == 2
    assert not optimizer.state.get(bad)
    with pytest.raises(error, match=message):
        adamw_(make().detach(), *(torch.zeros(bad.shape) for _ in range(3)), step=1, lr=0.1)


def test_what_torch_refuses_at_construction():
    with pytest.raises(ValueError, match="empty parameter list"):
        AdamW([])
    with pytest.raises(TypeError, match="iterable of Tensors or dicts"):
        AdamW(torch.ones(3))
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        AdamW([param() * 2])
    p = param()
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        AdamW([{"params": [p]}, {"params": [p]}])
    with pytest.raises(TypeError, match="param_group must be a dict"):
        AdamW([p]).add_param_group([p])


def sparse_gradient(p):
    p.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), device=p.device, check_invariants=True)


def other_shape(p):
    p.grad = torch.ones_like(p)
    p.grad.data = torch.ones(4, device=p.device)


def parameter_of_another_shape(p):
    p.grad = torch.ones_like(p)
    p.data = torch.ones(2, device=p.device)


def state_of_another_shape(p):
    p.grad = torch.ones_like(p)
    return {"exp_avg": torch.zeros(5, device=p.device)}


def state_on_another_device(p):
    p.grad = torch.ones_like(p)
    return {"exp_avg_sq": torch.zeros(3, device="meta")}


def state_of_integers(p):
    p.grad = torch.ones_like(p)
    return {"exp_avg": torch.zeros(3, dtype=torch.int32, device=p.device)}


def state_that_is_no_tensor(p):
    p.grad = torch.ones_like(p)
    return {"exp_avg": 0.0}


@pytest.mark.fast
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch 2.11
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (sparse_gradient, "does not support sparse gradients.*SparseAdam"),
        (other_shape, r"gradient \(\(4,\), torch.float32, on .*\) does not match its parameter \(\(3,\)"),
        (parameter_of_another_shape, r"gradient \(\(3,\).*does not match its parameter \(\(2,\)"),
        (state_of_another_shape, r"state 'exp_avg' \(\(5,\).*does not match its parameter"),
        (state_on_another_device, "state 'exp_avg_sq' .*on meta.*does not match its parameter .*move the model before"),
        (state_of_integers, "state 'exp_avg' of dtype torch.int32"),
        (state_that_is_no_tensor, "state 'exp_avg' must be a tensor, got float"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
@pytest.mark.parametrize("first_step", [True, False])
def test_a_step_that_is_refused_changes_nothing(spoil, message, first_step, device, path):
    """The bad parameter is the second of two: the first must not have been stepped either."""
    good, bad = param(device), param(device)
    optimizer = AdamW([good, bad], lr=0.1)
    if not first_step:
        for p in (good, bad):
            p.grad = torch.ones_like(p)
        optimizer.step()
    good.grad = torch.ones_like(good)
    extra = spoil(bad)
    if extra:
        optimizer.state[bad].update(extra)
    before = copy.deepcopy([good.detach(), bad.detach(), dict(optimizer.state)])
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    after = [good.detach(), bad.detach(), dict(optimizer.state)]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert len(before[2]) == len(after[2])
    for old, new in zip(before[2].values(), after[2].values(), strict=True):
        assert old.keys() == new.keys()
        for name, value in old.items():
            same = (
                torch.equal(value, new[name])
                if isinstance(value, torch.Tensor) and value.device.type != "meta"
                else True
            )
            assert same, name
    # and it goes on where it was as soon as the fault is gone
    bad.data = torch.ones(3, device=device)
    bad.grad = torch.ones_like(bad)
    optimizer.state.pop(bad, None)
    optimizer.step()
    assert not torch.equal(good, before[0])


def test_function_checks_its_tensors(device, path):
    p, g, m, v = (torch.ones(3, device=device) for _ in range(4))
    with pytest.raises(RuntimeError, match=r"gradient \(\(4,\)"):
        adamw_(p, torch.ones(4, device=device), m, v, step=1, lr=0.1)
    with pytest.raises(RuntimeError, match=r"state 'exp_avg_sq' \(\(1,\)"):
        adamw_(p, g, m, torch.ones(1, device=device), step=1, lr=0.1)
    with pytest.raises(RuntimeError, match="state 'max_exp_avg_sq'"):
        adamw_(p, g, m, v, max_exp_avg_sq=torch.ones(1, device=device), step=1, lr=0.1)
    with pytest.raises(ValueError, match="step must be at least 1, the number of this update; got 0"):
        adamw_(p, g, m, v, step=0, lr=0.1)
    assert all(torch.equal(t, torch.ones(3, device=device)) for t in (p, g, m, v))


def test_no_decay_names():
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no_decay must list names.*wieght"):
        param_groups_weight_decay(model, 0.1, no_decay=["wieght"])
    with pytest.raises(ValueError, match="no_decay must list names"):
        param_groups_weight_decay(model, 0.1, no_decay="weight")
