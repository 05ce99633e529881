"""What no longer fits its parameter is refused between two steps as at the first: before anything is written."""

import re

import pytest
import torch
from helpers import bits, step_both
from torch import nn

from adamw_triton import AdamW

SHAPES = [(40, 30), (7,), (33, 33), (1100,)]
# Which parameter, and how it is launched.
WHERE = [
    pytest.param(0, None, id="first"),
    pytest.param(2, None, id="another"),
    pytest.param(2, False, id="another-foreach=False"),
]


class Guard:
    """A tensor inside of much more memory, which shows a write beyond the tensor (and survives it)."""

    def __init__(self, shape, device):
        self.memory = torch.randn(8192, device=device)
        self.tensor = self.memory[: torch.Size(shape).numel()].view(shape)
        self.before = bits(self.memory)

    def assert_untouched(self):
        assert torch.equal(bits(self.memory), self.before)


def snapshot(params, optimizer):
    state = {p: {name: (value, bits(value)) for name, value in optimizer.state[p].items()} for p in params}
    return [bits(p) for p in params], state


def assert_nothing_happened(params, optimizer, before):
    values, state = before
    assert all(torch.equal(bits(p), value) for p, value in zip(params, values, strict=True))
    for p in params:
        assert optimizer.state[p].keys() == state[p].keys()
        for name, (value, old) in state[p].items():
            assert optimizer.state[p][name] is value and torch.equal(bits(value), old), f"state {name!r} was changed"


def grad_data(param, state, wrong):
    param.grad.data = wrong


def grad_resized(param, state, wrong):
    param.grad = wrong.new_empty(8192)[: param.numel()].view(param.shape).copy_(param.grad)
    param.grad.resize_(wrong.shape)


def param_data(param, state, wrong):
    param.grad = None
    param.data = wrong
    param.grad = torch.randn_like(param)


def state_data(name):
    def event(param, state, wrong):
        state[name].data = wrong

    return event


def state_replaced(name):
    def event(param, state, wrong):
        state[name] = wrong

    return event


EVENTS = {
    "grad repointed": grad_data,
    "grad resized in place": grad_resized,
    "param repointed": param_data,
    **{f"{name} repointed": state_data(name) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")},
    **{f"{name} replaced": state_replaced(name) for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")},
}
WRONG_SHAPES = {
    "smaller": lambda shape: (5,),
    "larger": lambda shape: (1300,),
    "as large": lambda shape: (shape.numel() // 3, 3),
    "without elements": lambda shape: (0,),
}


@pytest.mark.parametrize("i, foreach", WHERE)
@pytest.mark.parametrize("wrong", WRONG_SHAPES.values(), ids=WRONG_SHAPES.keys())
@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS.keys())
def test_another_shape_is_refused_and_nothing_has_happened(event, wrong, i, foreach, device, path):
    ours = [nn.Parameter(torch.randn(shape, device=device)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    mine = AdamW(ours, amsgrad=True, foreach=foreach, lr=1e-2)
    reference = torch.optim.AdamW(theirs, amsgrad=True, foreach=False, lr=1e-2)
    for _ in range(2):
        step_both(ours, theirs, mine, reference)

    param, shape = ours[i], ours[i].shape
    state = mine.state[param]
    whole, of_state = param.data, {name: (value, value.data) for name, value in state.items()}
    guard = Guard(wrong(shape), device)
    event(param, state, guard.tensor)
    before = snapshot(ours, mine)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(RuntimeError) as refusal:
            mine.step()
        for named in (shape, wrong(shape)):
            assert re.search(re.escape(str(tuple(named))), str(refusal.value)), f"does not name {tuple(named)}"
        assert_nothing_happened(ours, mine, before)
        guard.assert_untouched()

    param.grad = None
    param.data = whole
    for name, (tensor, memory) in of_state.items():
        tensor.data = memory
        state[name] = tensor
    step_both(ours, theirs, mine, reference)  # set right, it goes on
    assert [float(mine.state[p]["step"]) for p in ours] == [3.0] * 4
