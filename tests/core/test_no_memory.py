"""Tensors without memory of their own are refused, and DTensors where their parameter is none.

A kernel would get their address, which is 0.
"""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import bits
from torch import nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from adamw_triton import AdamW, adamw_

SHAPE = (16, 130)  # several blocks
MESSAGE = "memory of its own|DTensor"


class Wrapper(torch.Tensor):
    """Works through another tensor, as quantized and distributed tensors do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self):
        return f"{type(self).__name__}({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        unwrapped, unwrapped_kwargs = tree_map_only(Wrapper, lambda wrapper: wrapper.inner, (args, kwargs))
        result = tree_map_only(torch.Tensor, cls, func(*unwrapped, **unwrapped_kwargs))
        return return_and_correct_aliasing(func, args, kwargs, result)


class FlatWrapper(Wrapper):
    """One that torch.compile and FSDP can take apart."""

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner_tensors, _, outer_size, outer_stride):
        return FlatWrapper(inner_tensors["inner"])


def make_dtensor(values):
    mesh = init_device_mesh("cpu", (2,))
    return DTensor.from_local(values[: len(values) // 2].clone(), mesh, [Shard(0)])


MAKERS = {
    "DTensor": make_dtensor,
    "TwoTensor": lambda values: TwoTensor(values.clone(), values.clone()),
    "Wrapper": lambda values: Wrapper(values.clone()),
    "FlatWrapper": lambda values: FlatWrapper(values.clone()),
}


@pytest.fixture(params=MAKERS)
def kind(request):
    if request.param == "DTensor":
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield request.param
    if request.param == "DTensor":
        dist.destroy_process_group()


def memory_of(tensor):
    if isinstance(tensor, Wrapper):
        return [tensor.inner]
    if isinstance(tensor, DTensor):
        return [tensor._local_tensor]
    return [tensor.a, tensor.b] if isinstance(tensor, TwoTensor) else [tensor]


def everything(optimizer):
    """Parameters, gradients, state and options, to the bit."""
    content = []
    for group in optimizer.param_groups:
        content.append(repr({name: value for name, value in group.items() if name != "params"}))
        for param in group["params"]:
            tensors = {"param": param, "grad": param.grad, **optimizer.state.get(param, {})}
            for name, value in tensors.items():
                is_tensor = isinstance(value, torch.Tensor)
                content.append((name, [bits(t).numpy().tobytes() for t in memory_of(value)] if is_tensor else value))
    return content


def random_param(device):
    return nn.Parameter(torch.randn(SHAPE, device=device))


def assert_refused(optimizer, kind):
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=MESSAGE) as refusal:
        optimizer.step()
    assert kind in str(refusal.value) and "\n" not in str(refusal.value)
    assert everything(optimizer) == before


def assert_steps(optimizer, param):
    before = param.detach().clone()
    optimizer.step()
    assert not torch.equal(before, param)


@pytest.mark.fast
@pytest.mark.parametrize("kind", sorted(MAKERS.keys() - {"DTensor"}), indirect=True)
@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("first", [True, False], ids=["first of two", "second of two"])
def test_parameters(kind, foreach, first, device, path):
    good, bad = random_param(device), nn.Parameter(MAKERS[kind](torch.randn(SHAPE, device=device)))
    optimizer = AdamW([bad, good] if first else [good, bad], foreach=foreach)
    good.grad = torch.randn_like(good)
    bad.grad = MAKERS[kind](torch.randn(SHAPE, device=device))
    assert_refused(optimizer, kind)
    assert not optimizer.state.get(good) and not optimizer.state.get(bad)
    bad.grad = None
    assert_steps(optimizer, good)
    bad.grad = MAKERS[kind](torch.randn(SHAPE, device=device))
    assert_refused(optimizer, kind)
    assert optimizer.state[good]["step"] == 1


OPTIONS = [
    {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8},
    {"exp_avg_dtype": torch.bfloat16, "stochastic_rounding": True},
    {"amsgrad": True},
    {"max_grad_norm": 1.0},
    {"skip_nonfinite": True},
    {"statistics": True},
    {"capturable": True},
    {"lr": torch.tensor(1e-3)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize(
    ("kind", "role"),
    [(kind, role) for kind in MAKERS for role in ("parameter", "gradient") if (kind, role) != ("DTensor", "parameter")],
    indirect=["kind"],
)
def test_with_every_option(kind, options, role, device, path):
    good = random_param(device)
    values = torch.randn(SHAPE, device=device)
    bad = nn.Parameter(MAKERS[kind](values) if role == "parameter" else values)
    optimizer = AdamW([good, bad], **options)
    good.grad = torch.randn_like(good)
    bad.grad = MAKERS[kind](torch.randn(SHAPE, device=device))
    assert_refused(optimizer, kind)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("first_step", [True, False])
def test_gradients(kind, foreach, first_step, device, path):
    params = [random_param(device) for _ in range(3)]
    optimizer = AdamW(params, foreach=foreach)
    for p in params:
        p.grad = torch.randn_like(p)
    if not first_step:
        optimizer.step()
    params[1].grad = MAKERS[kind](torch.randn(SHAPE, device=device))
    assert_refused(optimizer, kind)
    params[1].grad = torch.randn_like(params[1])
    assert_steps(optimizer, params[1])
    assert {int(optimizer.state[p]["step"]) for p in params} == {1 if first_step else 2}


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
def test_state(kind, foreach, name, device, path):
    params = [random_param(device) for _ in range(3)]
    optimizer = AdamW(params, foreach=foreach, amsgrad=True)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    good_state = optimizer.state[params[1]][name]
    optimizer.state[params[1]][name] = MAKERS[kind](torch.rand(SHAPE, device=device))
    assert_refused(optimizer, kind)
    optimizer.state[params[1]][name] = good_state
    assert_steps(optimizer, params[1])


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"])
@pytest.mark.parametrize("stepped", [True, False])
def test_loaded_state(kind, name, stepped, device, path):
    params = [random_param(device) for _ in range(2)]
    optimizer = AdamW(params, amsgrad=True)
    other = AdamW([p.detach().clone() for p in params], amsgrad=True, lr=0.5)
    for p in (*params, *other.param_groups[0]["params"]):
        p.grad = torch.randn_like(p)
    other.step()
    if stepped:
        optimizer.step()
    state_dict = other.state_dict()
    spoiled = copy.deepcopy(state_dict)
    spoiled["state"][1][name] = MAKERS[kind](torch.rand(SHAPE, device=device))
    before = everything(optimizer)
    with pytest.raises(ValueError, match=MESSAGE) as refusal:
        optimizer.load_state_dict(spoiled)
    assert kind in str(refusal.value)
    assert everything(optimizer) == before
    optimizer.load_state_dict(state_dict)
    assert_steps(optimizer, params[1])


def test_function(kind, device, path):
    def tensors():
        return {name: torch.rand(SHAPE, device=device) for name in ("param", "grad", "exp_avg", "exp_avg_sq")}

    for name in tensors():
        given = tensors()
        given[name] = MAKERS[kind](given[name])
        before = [bits(inner) for tensor in given.values() for inner in memory_of(tensor)]
        with pytest.raises(RuntimeError, match=MESSAGE):
            adamw_(**given, step=1, lr=0.1)
        after = [bits(inner) for tensor in given.values() for inner in memory_of(tensor)]
        assert all(map(torch.equal, before, after))


# What is not refused


def test_a_parameter_that_never_has_a_gradient(kind, device, path):
    good, listed = random_param(device), nn.Parameter(MAKERS[kind](torch.randn(SHAPE, device=device)))
    optimizer = AdamW([listed])
    optimizer.add_param_group({"params": [good], "lr": 0.1})
    before = [bits(inner) for inner in memory_of(listed)]
    for _ in range(2):
        good.grad = torch.randn_like(good)
        assert_steps(optimizer, good)
        optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    good.grad = torch.randn_like(good)
    assert_steps(optimizer, good)
    assert not optimizer.state.get(listed)
    assert all(map(torch.equal, before, map(bits, memory_of(listed))))


class MarkedParameter(nn.Parameter):
    pass


class MarkedTensor(torch.Tensor):
    pass


def marked(values):
    return torch.Tensor._make_subclass(MarkedTensor, values)


SUBCLASSES = {
    "Parameter subclass": MarkedParameter,
    "Tensor subclass": lambda values: torch.Tensor._make_subclass(MarkedTensor, values, True),
    "Tensor subclass in a Parameter": lambda values: nn.Parameter(marked(values)),
}


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("name", SUBCLASSES)
def test_subclasses_with_memory(name, foreach, device, path):
    """The parameter, its gradients and its state may be any subclass that has memory."""
    values = [torch.randn(SHAPE, device=device) for _ in range(2)]
    plain = [nn.Parameter(v.clone()) for v in values]
    special = [SUBCLASSES[name](v.clone()) for v in values]
    assert type(special[0]) is not nn.Parameter and special[0].data_ptr() != 0
    optimizers = [AdamW(params, foreach=foreach, max_grad_norm=1.0) for params in (plain, special)]
    for step in range(3):
        for p, q in zip(plain, special, strict=True):
            p.grad = torch.randn(SHAPE, device=device)
            q.grad = marked(p.grad.clone())
        for optimizer in optimizers:
            optimizer.step()
        if step == 0:
            state = optimizers[1].state[special[1]]
            state["exp_avg"] = marked(state["exp_avg"])
    for p, q in zip(plain, special, strict=True):
        assert torch.equal(bits(p), bits(q))
        assert optimizers[1].state[q]["step"] == 3


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_empty_parameters(foreach, max_grad_norm, device, path):
    """Their address is 0 as well."""
    empty, other = nn.Parameter(torch.empty(0, 3, device=device)), random_param(device)
    assert empty.data_ptr() == 0
    optimizer = AdamW([empty, other], foreach=foreach, max_grad_norm=max_grad_norm)
    for _ in range(2):
        for p in (empty, other):
            p.grad = torch.randn_like(p)
        assert_steps(optimizer, other)
    assert optimizer.state[empty]["step"] == 2 and optimizer.state[empty]["exp_avg"].shape == (0, 3)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_steps(optimizer, other)
