"""Hooks of a step and its record in a profile: as torch's optimizers have them."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from adamw_triton import AdamW

REGISTER = {
    "before": lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
    "after": lambda optimizer, hook: optimizer.register_step_post_hook(hook),
    "before, of all optimizers": lambda optimizer, hook: register_optimizer_step_pre_hook(hook),
    "after, of all optimizers": lambda optimizer, hook: register_optimizer_step_post_hook(hook),
}
PROFILERS = {
    "torch.profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True),
    "torch.autograd.profiler": lambda: torch.autograd.profiler.profile(),
    "its older form": lambda: torch.autograd.profiler.profile(use_kineto=False),
}
BOTH = {"ours": AdamW, "torch's": torch.optim.AdamW}


class Named(AdamW):
    """A subclass with a step of its own."""

    def step(self, closure=None):
        self.seen = True
        return super().step(closure)


def with_gradient(make, device, **options):
    param = nn.Parameter(torch.arange(5.0, device=device))
    param.grad = torch.ones_like(param)
    return param, make([param], lr=0.1, **options)


def closure_of(param):
    def closure():
        param.grad = 2 * torch.ones_like(param)
        return "loss"

    return closure


@pytest.mark.fast
@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
def test_each_hook_alone(register, make, device):
    """It sees the optimizer, its arguments and the parameters of before or after, until it is removed."""
    param, optimizer = with_gradient(make, device)
    before = param.detach().clone()
    seen = []
    optimizer.step()  # before it is there
    after_one = param.detach().clone()
    handle = register(optimizer, lambda *given: seen.append((given, param.detach().clone())))
    closure = closure_of(param)
    assert optimizer.step(closure) == "loss"
    handle.remove()
    optimizer.step()
    [((of, args, kwargs), value)] = seen
    assert of is optimizer
    assert args == (optimizer, closure)
    assert kwargs == {}
    is_before = register in (REGISTER["before"], REGISTER["before, of all optimizers"])
    assert torch.equal(value, after_one) == is_before
    assert not torch.equal(value, before)


@pytest.mark.parametrize("make", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("register", [REGISTER["before"], REGISTER["before, of all optimizers"]])
def test_what_a_hook_returns_is_what_step_is_called_with(register, make, device):
    param, optimizer = with_gradient(make, device)
    handle = register(optimizer, lambda of, args, kwargs: ((of,), {"closure": closure_of(param)}))
    assert optimizer.step() == "loss"
    handle.remove()
    assert optimizer.step() is None
    handle = register(optimizer, lambda *_: "neither")
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    handle.remove()
    assert torch.equal(param, before)


@pytest.mark.parametrize("profiler", PROFILERS.values(), ids=PROFILERS)
@pytest.mark.parametrize("make", [*BOTH.values(), Named], ids=[*BOTH, "subclass"])
def test_profiles_name_the_step(make, profiler, device):
    _, optimizer = with_gradient(make, device)
    optimizer.step()
    with profiler() as profile:
        optimizer.step()
        optimizer.step()
    name = f"Optimizer.step#{make.__name__}.step"
    [event] = [event for event in profile.key_averages() if event.key == name]
    assert event.count >= 2
    optimizer.step()


def test_a_subclass_has_its_hooks(device):
    _, optimizer = with_gradient(Named, device)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert optimizer.seen
    assert (seen[0], seen[-1]) == ("before", "after")


def test_a_step_without_hooks_and_profiler_makes_no_record(device):
    """What makes a record costs the host as much as 15 parameters."""
    _, optimizer = with_gradient(AdamW, device)
    with mock.patch("torch.autograd.profiler.record_function") as record:
        optimizer.step()
        assert not record.called
        optimizer.register_step_pre_hook(lambda *_: None)
        optimizer.step()
        assert record.called
