"""As test_events.py, where the events change dtypes, or state that torch does not have."""

import pytest
import torch
from helpers import allow_any_grad_dtype, assert_step, bits
from torch import nn

from adamw_triton import AdamW

OPTIONS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
SHAPES = [(10, 128), (128,), (9, 128), (3, 128)]  # whole groups of 128, so that all moments can have 8 bits
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MOMENTS = ("exp_avg", "exp_avg_sq")
# Which parameter, and how it is launched.
WHERE = [
    pytest.param(0, None, id="first"),
    pytest.param(2, None, id="another"),
    pytest.param(2, False, id="another-foreach=False"),
]


def make(dtype, device, **options):
    params = [nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in SHAPES]
    return params, AdamW(params, **OPTIONS, **options)


def give_grads(params):
    """Random gradients, in the memory and dtype of the former ones."""
    for p in params:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        p.grad.copy_(torch.randn(p.shape, device=p.device))


def step(params, optimizer, times=1):
    for _ in range(times):
        give_grads(params)
        optimizer.step()


class Discarded:
    """Memory that must not be used any more: NaN where it is floats, unlikely numbers where it is codes."""

    def __init__(self):
        self.memory = []

    def add(self, tensor):
        tensor = tensor.detach()
        tensor.view(torch.uint8).fill_(255)
        self.memory.append((tensor, bits(tensor)))

    def assert_untouched(self):
        assert all(torch.equal(bits(tensor), poison) for tensor, poison in self.memory)


def param_as_fp32(param, state, discarded):
    old = param.data
    param.grad = None
    param.data = old.float()
    discarded.add(old)


def param_viewed_as_fp16(param, state, discarded):
    """The same address: its bits are other numbers."""
    grad = param.grad.data.view(FP16)
    param.grad = None
    param.data = param.data.view(FP16)
    param.grad = grad


def viewed_as_fp16(name):
    def event(param, state, discarded):
        state[name].data = state[name].data.view(FP16)

    return event


def as_fp32(name):
    def event(param, state, discarded):
        old = state[name].data
        state[name].data = old.float()
        discarded.add(old)

    return event


def replaced_by_fp32(name):
    def event(param, state, discarded):
        old = state[name]
        state[name] = old.float()
        discarded.add(old)

    return event


def grad_viewed_as_fp16(param, state, discarded):
    """The same address again."""
    allow_any_grad_dtype(param)
    param.grad = param.grad.data.view(FP16)


def grad_as_fp32(param, state, discarded):
    allow_any_grad_dtype(param)
    old = param.grad
    param.grad = old.float()
    discarded.add(old)


def grad_data_viewed_as_fp16(param, state, discarded):
    """What `.grad.data = ` sets, no torch looks at."""
    param.grad.data = param.grad.data.view(FP16)


def grad_data_as_fp32(param, state, discarded):
    old = param.grad.data
    param.grad.data = old.float()
    discarded.add(old)


DTYPE_EVENTS = {
    "param from bf16 to fp32": param_as_fp32,
    "param viewed as fp16": param_viewed_as_fp16,
    **{f"{name} viewed as fp16": viewed_as_fp16(name) for name in MOMENTS},
    **{f"{name} repointed to fp32": as_fp32(name) for name in MOMENTS},
    **{f"{name} replaced by fp32": replaced_by_fp32(name) for name in MOMENTS},
    "grad viewed as fp16": grad_viewed_as_fp16,
    "grad in fp32": grad_as_fp32,
    "grad.data viewed as fp16": grad_data_viewed_as_fp16,
    "grad.data in fp32": grad_data_as_fp32,
}


def assert_steps(params, optimizer, first_step, times=2):
    """Steps of all parameters against the oracle, which starts from what is visible before each."""
    for number in range(first_step, first_step + times):
        give_grads(params)
        tensors = [[p, p.grad, *(optimizer.state[p][name] for name in MOMENTS)] for p in params]
        before = [[t.detach().clone() for t in of_param] for of_param in tensors]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            after = [p, p.grad, *(optimizer.state[p][name] for name in MOMENTS)]
            assert_step(old, after, step=number, **OPTIONS)


@pytest.mark.parametrize("i, foreach", WHERE)
@pytest.mark.parametrize("event", DTYPE_EVENTS.values(), ids=DTYPE_EVENTS.keys())
def test_another_dtype_is_noticed(event, i, foreach, device, path):
    params, optimizer = make(BF16, device, foreach=foreach)
    step(params, optimizer, 2)
    discarded = Discarded()
    event(params[i], optimizer.state[params[i]], discarded)
    dtypes = params[i].dtype, {name: optimizer.state[params[i]][name].dtype for name in MOMENTS}
    assert_steps(params, optimizer, first_step=3)
    discarded.assert_untouched()
    assert dtypes == (params[i].dtype, {name: optimizer.state[params[i]][name].dtype for name in MOMENTS})


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("name", MOMENTS)
def test_another_storage_option_is_noticed(name, foreach, device, path):
    params, optimizer = make(BF16, device, foreach=foreach)
    step(params, optimizer, 2)
    values = {p: optimizer.state[p][name].clone() for p in params}
    optimizer.param_groups[0][f"{name}_dtype"] = FP32
    for p in params:
        p.grad = None
    give_grads(params[2:])  # conversion is part of a parameter's next update
    beta = OPTIONS["betas"][MOMENTS.index(name)]
    optimizer.step()
    assert [optimizer.state[p][name].dtype for p in params] == [BF16, BF16, FP32, FP32]
    for p in params[2:]:
        new = p.grad.float() if name == "exp_avg" else p.grad.float().square()
        expected = beta * values[p].float() + (1 - beta) * new
        torch.testing.assert_close(optimizer.state[p][name], expected, rtol=2e-6, atol=2e-7)


def twin_of(params, optimizer, **options):
    """An optimizer that sees equal parameters and state for the first time."""
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    twin = AdamW(copies, **OPTIONS, **options)
    for p, q in zip(params, copies, strict=True):
        twin.state[q] = {name: value.clone() for name, value in optimizer.state[p].items()}
    return copies, twin


def assert_steps_as_its_twin(params, optimizer, times=2, **options):
    copies, twin = twin_of(params, optimizer, **options)
    for _ in range(times):
        give_grads(params)
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        twin.step()
    for p, q in zip(params, copies, strict=True):
        assert torch.equal(bits(p), bits(q)) and p.isfinite().all()
        assert optimizer.state[p].keys() == twin.state[q].keys()
        for name, value in twin.state[q].items():
            assert torch.equal(bits(optimizer.state[p][name]), bits(value)), name


@pytest.mark.parametrize("foreach", [None, False])
def test_cautious_switched_on(foreach, device, path):
    params, optimizer = make(FP32, device, foreach=foreach)
    step(params, optimizer, 2)
    optimizer.param_groups[0]["cautious"] = True
    before = [p.detach().clone() for p in params]
    assert_steps_as_its_twin(params, optimizer, foreach=foreach, cautious=True)
    assert not any(map(torch.equal, params, before))


def repointed(*names):
    def event(state, discarded):
        for name in names or [name for name in state if name != "step"]:
            old = state[name].data
            state[name].data = old.clone()
            discarded.add(old)

    return event


def replace_all(state, discarded):
    for name in [name for name in state if name != "step"]:
        old = state[name]
        state[name] = old.clone()
        discarded.add(old)


def other_values(name):
    def event(state, discarded):
        old = state[name]
        state[name] = old.clone().mul_(2) if old.is_floating_point() else old.flip(0)
        discarded.add(old)

    return event


EIGHT_BITS = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
STORED = {
    "8-bit moments": (FP32, EIGHT_BITS, ("exp_avg_scale", "exp_avg_sq_scale")),
    "remainder": (BF16, {"master_weight_bits": 32}, ("param_remainder",)),
    "short remainder": (BF16, {"master_weight_bits": 24}, ("param_remainder",)),
    "fp16 master": (FP16, {"master_weight_bits": 32}, ("master_param",)),
    "all small": (BF16, {"master_weight_bits": 24, **EIGHT_BITS}, ("param_remainder", "exp_avg_scale")),
}
STATE_EVENTS = [
    pytest.param(dtype, options, event, id=f"{title}: {what}")
    for title, (dtype, options, names) in STORED.items()
    for what, event in [
        ("all repointed", repointed()),
        ("all replaced", replace_all),
        *[(f"{name} repointed", repointed(name)) for name in names],
        *[(f"{name} of other values", other_values(name)) for name in names if name != "master_param"],
    ]
]


@pytest.mark.parametrize("i, foreach", WHERE)
@pytest.mark.parametrize("dtype, options, event", STATE_EVENTS)
def test_other_memory_of_small_state_is_noticed(dtype, options, event, i, foreach, device, path):
    params, optimizer = make(dtype, device, foreach=foreach, **options)
    step(params, optimizer, 2)
    discarded = Discarded()
    event(optimizer.state[params[i]], discarded)
    assert discarded.memory
    assert_steps_as_its_twin(params, optimizer, foreach=foreach, **options)
    discarded.assert_untouched()
