"""What is replaced, cleared or deleted is freed at once: nothing waits for a next step, which may never come.

torch.optim.AdamW goes through the same tests.
"""

import copy
import gc
import weakref
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from adamw_triton import AdamW, register_gradient_release

VARIANTS = {
    "torch": lambda params: torch.optim.AdamW(params, foreach=False),
    "foreach=None": lambda params: AdamW(params),
    "foreach=False": lambda params: AdamW(params, foreach=False),
    "max_grad_norm": lambda params: AdamW(params, max_grad_norm=1.0),
    "statistics": lambda params: AdamW(params, statistics=True),
    "capturable": lambda params: AdamW(params, capturable=True),
    "small": lambda params: AdamW(params, exp_avg_dtype=torch.int8, exp_avg_sq_dtype=torch.uint8),
    "everything": lambda params: AdamW(params, max_grad_norm=1.0, statistics=True, capturable=True, amsgrad=True),
}


@pytest.fixture(params=VARIANTS.values(), ids=VARIANTS.keys())
def build(request):
    return request.param


class Model(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 10, device=device) for _ in range(2))

    def forward(self, x):
        return sum(layer(x).square().sum() for layer in self.layers)


def backward(model, device):
    model(torch.randn(4, 128, device=device)).backward()


def stepped(build, device):
    model = Model(device)
    optimizer = build(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        backward(model, device)
        optimizer.step()
    return model, optimizer


class Watch:
    """Whether tensors, and the memory that they had when the watch began, are gone."""

    def __init__(self, tensors):
        tensors = list(tensors)
        assert tensors
        self.objects = [weakref.ref(tensor) for tensor in tensors]
        self.memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def assert_memory_is_free(self):
        gc.collect()
        kept = sum(not memory.expired() for memory in self.memory)
        assert kept == 0, f"the memory of {kept} of {len(self.memory)} tensors is kept"

    def assert_gone(self):
        gc.collect()
        kept = sum(tensor() is not None for tensor in self.objects)
        assert kept == 0, f"{kept} of {len(self.objects)} tensors are kept"
        self.assert_memory_is_free()


def of_state(optimizer):
    return [value for entry in optimizer.state.values() for value in entry.values() if isinstance(value, torch.Tensor)]


def replace_all(optimizer):
    for entry in optimizer.state.values():
        for name, value in entry.items():
            entry[name] = value.clone()


def replace_entries(optimizer):
    for param, entry in optimizer.state.items():
        optimizer.state[param] = {name: value.clone() for name, value in entry.items()}


def set_state(optimizer, state):
    optimizer.state = state


CHANGES = {
    "replaced": replace_all,
    "entries replaced": replace_entries,
    "entries cleared": lambda optimizer: [entry.clear() for entry in optimizer.state.values()],
    "cleared": lambda optimizer: optimizer.state.clear(),
    "another dict": lambda optimizer: set_state(optimizer, {}),
    "another defaultdict": lambda optimizer: set_state(optimizer, defaultdict(dict)),
    "loaded": lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_state_is_freed(change, build, device, path):
    _model, optimizer = stepped(build, device)
    old = Watch(of_state(optimizer))
    change(optimizer)
    old.assert_gone()


def test_state_of_one_parameter_is_freed(build, device, path):
    model, optimizer = stepped(build, device)
    entry = optimizer.state[model.layers[1].weight]
    old = Watch(value for name, value in entry.items() if name != "step")
    for name in list(entry):
        entry[name] = entry[name].clone()
    old.assert_gone()


def test_offloaded_memory_is_freed(build, device, path):
    """By `.data`, for which the tensor objects stay."""
    model, optimizer = stepped(build, device)
    optimizer.zero_grad()
    tensors = [*model.parameters(), *(value for value in of_state(optimizer) if value.dim())]
    old = Watch(tensors)
    for tensor in tensors:
        tensor.data = torch.empty(0, device=device)
    old.assert_memory_is_free()


def test_gradients_are_freed(build, device, path):
    model, optimizer = stepped(build, device)
    old = Watch(p.grad for p in model.parameters())
    optimizer.zero_grad()
    old.assert_gone()


def test_gradients_in_other_memory_layouts_are_freed(build, device, path):
    """They go through copies where a norm is wanted, or launches of their own."""
    model, optimizer = stepped(build, device)
    for p in model.parameters():
        p.grad = torch.randn(*p.shape, 2, device=device)[..., 1]
    old = Watch(p.grad for p in model.parameters())
    optimizer.step()
    for p in model.parameters():
        p.grad = None
    old.assert_gone()


def test_a_removed_group_is_freed(build, device, path):
    model, optimizer = stepped(build, device)
    model.layers.append(nn.Linear(128, 10, device=device))
    optimizer.add_param_group({"params": list(model.layers[2].parameters())})
    optimizer.zero_grad()
    backward(model, device)
    optimizer.step()
    params = list(model.layers[2].parameters())
    old = Watch([*params, *(value for p in params for value in optimizer.state[p].values() if value.dim())])
    del params, model.layers[2]
    for p in optimizer.param_groups.pop()["params"]:
        optimizer.state.pop(p)
    del p
    old.assert_gone()


@pytest.mark.parametrize("when", ["before the first step", "between steps"])
def test_exchanged_parameters_are_freed(when, build, device, path):
    """As Accelerate does after fully_shard has put DTensors in their places."""
    if when == "between steps":
        model, optimizer = stepped(build, device)
    else:
        model = Model(device)
        optimizer = build(model.parameters())
    old = Watch(model.parameters())
    others = Model(device)
    optimizer.param_groups[0]["params"][:] = list(others.parameters())
    optimizer.state.clear()
    del model
    old.assert_gone()
    before = [p.detach().clone() for p in others.parameters()]
    backward(others, device)
    optimizer.step()
    assert not any(map(torch.equal, others.parameters(), before))


def test_everything_goes_with_the_optimizer(build, device, path):
    model, optimizer = stepped(build, device)
    old, itself = Watch(of_state(optimizer)), weakref.ref(optimizer)
    del optimizer
    old.assert_gone()
    assert itself() is None
    params = Watch(model.parameters())
    del model
    params.assert_gone()


def test_model_and_optimizer_go_in_the_other_order(build, device, path):
    model, optimizer = stepped(build, device)
    old = Watch([*model.parameters(), *of_state(optimizer)])
    itself = weakref.ref(optimizer)
    del model, optimizer
    old.assert_gone()
    assert itself() is None


RELEASED = {
    "foreach=None": {},
    "foreach=False": {"foreach": False},
    "statistics and norms": {"statistics": True, "skip_grad_norm_above": 1e6},
}


def released(options, device):
    model = Model(device)
    optimizer = AdamW(model.parameters(), **options)
    handle = register_gradient_release(model, optimizer)
    for _ in range(2):
        backward(model, device)
    assert all(optimizer.state[p]["step"] == 2 and p.grad is None for p in model.parameters())
    return model, optimizer, handle


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("options", RELEASED.values(), ids=RELEASED.keys())
def test_state_is_freed_with_gradient_release(options, change, device, path):
    model, optimizer, _handle = released(options, device)
    old = Watch(of_state(optimizer))
    change(optimizer)
    old.assert_gone()
    backward(model, device)
    assert len(optimizer.state) == 4


@pytest.mark.parametrize("options", RELEASED.values(), ids=RELEASED.keys())
def test_released_gradients_are_freed(options, device, path):
    model, _optimizer, handle = released(options, device)
    with handle.accumulate():
        backward(model, device)
    old = Watch(p.grad for p in model.parameters())
    backward(model, device)
    old.assert_gone()


@pytest.mark.parametrize("removed", [False, True])
@pytest.mark.parametrize("options", RELEASED.values(), ids=RELEASED.keys())
def test_everything_goes_with_gradient_release(options, removed, device, path):
    model, optimizer, handle = released(options, device)
    if removed:
        handle.remove()
    state, params = Watch(of_state(optimizer)), Watch(model.parameters())
    itself = weakref.ref(optimizer)
    del optimizer, handle
    state.assert_gone()
    assert itself() is None
    backward(model, device)  # hooks without their optimizer do nothing
    assert all(p.grad is not None for p in model.parameters())
    del model
    params.assert_gone()
