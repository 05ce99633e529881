"""What is listed and has no gradient is accepted as torch accepts it; steps without memory (meta, fake) work."""

import copy

import pytest
import torch
from helpers import bits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adamw_triton import AdamW


class PackedWeight(nn.Parameter):
    """Codes, as quantized models hold them."""


def frozen(tensor):
    return nn.Parameter(tensor, requires_grad=False)


LISTED = {
    "int64": lambda: frozen(torch.randint(9, (3, 500))),
    "int8": lambda: frozen(torch.randint(9, (3, 500), dtype=torch.int8)),
    "bool": lambda: frozen(torch.rand(3, 500) > 0.5),
    "float8": lambda: frozen(torch.randn(3, 500).to(torch.float8_e4m3fn)),
    "packed": lambda: PackedWeight(torch.randint(255, (750,), dtype=torch.uint8), requires_grad=False),
    "quantized": lambda: frozen(torch.quantize_per_tensor(torch.randn(3, 500), 0.1, 0, torch.qint8)),
    "expanded": lambda: frozen(torch.randn(1).expand(1500)),
    "overlapping": lambda: frozen(torch.randn(99).as_strided((9, 9), (2, 1))),
    "conjugated": lambda: frozen(torch.randn(30, dtype=torch.complex64).conj()),
    "sparse": lambda: frozen(torch.eye(30).to_sparse()),
    "sparse csr": lambda: frozen(torch.eye(30).to_sparse_csr()),
    "uninitialized": nn.UninitializedParameter,
    "fp32": lambda: frozen(torch.randn(3, 500)),
    "meta": lambda: frozen(torch.empty(3, 500, device="meta")),
}
STORAGE = [
    {},
    {"master_weight_bits": 32},
    {"master_weight_bits": 24, "exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8},
    {"stochastic_rounding": True},
    {"max_grad_norm": 1.0, "skip_nonfinite": True, "statistics": True},
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*[Ss]parse CSR tensor support is in beta:UserWarning"),
]


def content(param):
    if isinstance(param, nn.UninitializedParameter) or param.is_meta:
        return None
    if param.is_quantized:
        return param.int_repr().tolist()
    if param.layout != torch.strided:
        return param.to_dense().tolist()
    return bits(param).tolist()


def trained_param(device, options, n=1100):
    needs_bf16 = "master_weight_bits" in options or "stochastic_rounding" in options
    return nn.Parameter(torch.randn(n, device=device).to(torch.bfloat16 if needs_bf16 else torch.float32))


def everything(optimizer):
    """Parameters, gradients and state to the bit."""
    found = []
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        tensors = {"param": p, "grad": p.grad, **optimizer.state.get(p, {})}
        found.append({k: bits(v).tolist() if isinstance(v, torch.Tensor) else v for k, v in tensors.items()})
    return found


@pytest.mark.parametrize("options", STORAGE, ids=str)
@pytest.mark.parametrize("name", LISTED)
def test_listed(name, options, device, path):
    """At construction, in a group of its own, and through steps and a checkpoint; the others are stepped."""
    first, second, alone = LISTED[name](), LISTED[name](), trained_param(device, options)
    trained = trained_param(device, options)
    alone.data.copy_(trained)
    optimizer = AdamW([first, trained], lr=0.1, **options)
    optimizer.add_param_group({"params": [second, trained_param(device, options)]})
    undisturbed = AdamW([torch.zeros_like(alone), alone], lr=0.1, **options)  # the same number for its random bits
    torch.optim.AdamW([first, second])  # torch accepts it
    before = content(first), content(second)
    for step in range(3):
        trained.grad = torch.randn_like(trained)
        alone.grad = trained.grad.clone()
        optimizer.step()
        undisturbed.step()
        optimizer.zero_grad()
        assert torch.equal(bits(trained), bits(alone))
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.state[trained]["step"] == 3
    assert not optimizer.state.get(first) and not optimizer.state.get(second)
    assert (content(first), content(second)) == before


@pytest.mark.parametrize("name", LISTED)
def test_listed_alone(name, device, path):
    listed = LISTED[name]()
    before = content(listed)
    optimizer = AdamW([listed], max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert content(listed) == before and not optimizer.state.get(listed)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("options", STORAGE, ids=str)
def test_lazy_layer(options, foreach, device, path):
    """Listed before its first forward pass, stepped after it."""
    dtype = trained_param(device, options).dtype
    model = nn.Sequential(nn.Linear(7, 130, device=device, dtype=dtype), nn.LazyLinear(11, device=device, dtype=dtype))
    optimizer = AdamW(model.parameters(), lr=0.1, foreach=foreach, **options)
    optimizer.step()
    inputs = torch.randn(5, 7, device=device, dtype=dtype)
    model(inputs)
    eager = copy.deepcopy(model)
    expected = AdamW(eager.parameters(), lr=0.1, foreach=foreach, **options)
    for _ in range(2):
        for net in (model, eager):
            net(inputs).square().sum().backward()
        for opt in (optimizer, expected):
            opt.step()
            opt.zero_grad()
    before = everything(optimizer)
    assert len(before) == 4 and before == everything(expected)
    assert optimizer.state[model[1].weight]["step"] == 2


# What has a gradient and cannot be stepped


def unfreeze(param):
    param.requires_grad_()
    param.grad = torch.randn(param.shape).to(param.dtype)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("expanded", {}, ValueError, "share memory"),
        ("overlapping", {}, ValueError, "share memory"),
        ("conjugated", {}, ValueError, "conjugated or negated view"),
        ("float8", {}, TypeError, "dtype torch.float8_e4m3fn"),
        ("fp32", {"master_weight_bits": 32}, ValueError, "master_weight_bits=32 is for bfloat16 and float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_once_it_has_a_gradient(name, options, error, message, foreach, path):
    listed, trained = LISTED[name](), trained_param("cpu", options)
    optimizer = AdamW([trained, listed], foreach=foreach, **options)
    trained.grad = torch.randn_like(trained)
    optimizer.step()
    unfreeze(listed)
    for _ in range(2):
        trained.grad = torch.randn_like(trained)
        before = everything(optimizer)
        with pytest.raises(error, match=message):
            optimizer.step()
        assert everything(optimizer) == before
        assert not optimizer.state.get(listed)
    listed.grad = None
    optimizer.step()
    assert optimizer.state[trained]["step"] == 2


# Steps that have no memory to write to

EIGHT_BITS = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
WITHOUT_MEMORY = {
    "plain": (torch.float32, {}),
    "amsgrad": (torch.float32, {"amsgrad": True}),
    "cautious": (torch.float32, {"cautious": True}),
    "max_grad_norm": (torch.float32, {"max_grad_norm": 1.0}),
    "skip_nonfinite": (torch.float32, {"skip_nonfinite": True}),
    "skip_grad_norm_above": (torch.float32, {"skip_grad_norm_above": 9.0}),
    "statistics": (torch.float32, {"statistics": True}),
    "8 bits": (torch.float32, EIGHT_BITS),
    "8 bits of bf16": (torch.bfloat16, EIGHT_BITS),
    "masters 32": (torch.bfloat16, {"master_weight_bits": 32}),
    "masters 24": (torch.bfloat16, {"master_weight_bits": 24}),
    "masters fp16": (torch.float16, {"master_weight_bits": 32}),
    "stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "all": (
        torch.bfloat16,
        {**EIGHT_BITS, "master_weight_bits": 24, "stochastic_rounding": True, "max_grad_norm": 1.0}
        | {"skip_nonfinite": True, "statistics": True},
    ),
}


def formats(optimizer):
    """Of every state entry of every parameter, but devices, in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [{k: (v.dtype, tuple(v.shape)) for k, v in optimizer.state[p].items()} for p in params]


def train(cls, device, dtype, options, n_steps=2):
    where = {"device": device, "dtype": dtype}
    model = nn.Sequential(nn.Linear(7, 200, **where), nn.ReLU(), nn.Linear(200, 9, **where))
    optimizer = cls(model.parameters(), **options)
    versions = [p._version for p in model.parameters()]
    for step in range(n_steps):
        model(torch.randn(3, 7, **where)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            optimizer.load_state_dict(optimizer.state_dict())
    if device == "meta":  # fake tensors have no versions under torch's foreach either
        assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))
    return optimizer, model


def assert_like_a_real_run(optimizer, model, device, dtype, options):
    assert formats(optimizer) == formats(train(AdamW, "cpu", dtype, options)[0])
    for p in model.parameters():
        entries = {name: entry for name, entry in optimizer.state[p].items() if name != "step"}
        assert {entry.device for entry in entries.values()} == {torch.device(device)}
    if options.keys() <= {"amsgrad"}:
        theirs, _ = train(torch.optim.AdamW, device, dtype, options)
        assert formats(optimizer) == formats(theirs)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_meta_tensors(name, foreach, path):
    dtype, options = WITHOUT_MEMORY[name]
    optimizer, model = train(AdamW, "meta", dtype, {"foreach": foreach, **options})
    assert_like_a_real_run(optimizer, model, "meta", dtype, options)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_fake_tensors(name, foreach, path):
    dtype, options = WITHOUT_MEMORY[name]
    with FakeTensorMode():
        optimizer, model = train(AdamW, "cpu", dtype, {"foreach": foreach, **options})
        counters = [optimizer.grad_norm, optimizer.skipped_steps, optimizer.update_norm, optimizer.param_norm]
        theirs = train(torch.optim.AdamW, "cpu", dtype, options)[0] if options.keys() <= {"amsgrad"} else None
    assert all(counter is None or counter.shape == () for counter in counters)
    assert_like_a_real_run(optimizer, model, "cpu", dtype, options)
    if theirs is not None:
        assert formats(optimizer) == formats(theirs)


@pytest.mark.parametrize("name", ["plain", "max_grad_norm", "8 bits", "all"])
@pytest.mark.parametrize("foreach", [None, False])
def test_meta_next_to_real_parameters(name, foreach, device, path):
    """Real ones listed beside them are not disturbed."""
    dtype, options = WITHOUT_MEMORY[name]
    meta = nn.Parameter(torch.empty(1100, device="meta", dtype=dtype))
    ours, alone = (nn.Parameter(torch.randn(1100, device=device).to(dtype)) for _ in range(2))
    alone.data.copy_(ours)
    optimizer = AdamW([ours, meta], foreach=foreach, **options)
    expected = AdamW([alone], foreach=foreach, **options)
    for _ in range(3):
        ours.grad = torch.randn_like(ours)
        alone.grad = ours.grad.clone()
        optimizer.step()
        expected.step()
        assert torch.equal(bits(ours), bits(alone))
    assert not optimizer.state.get(meta)


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("cls", [AdamW, torch.optim.AdamW])
def test_a_model_that_leaves_the_meta_device(cls, foreach, device, path):
    """Steps on meta tensors count as torch's do; a model that gets its memory starts with a new optimizer."""
    optimizer, model = train(cls, "meta", torch.float32, {"foreach": foreach}, n_steps=3)
    assert [float(optimizer.state[p]["step"]) for p in model.parameters()] == [3.0] * 4
    model.to_empty(device=device)
    for p in model.parameters():
        nn.init.normal_(p)
    optimizer = cls(model.parameters(), foreach=foreach)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randn(3, 7, device=device)).square().sum().backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
