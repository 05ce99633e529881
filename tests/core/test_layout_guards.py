"""Comparing layouts: torch's guards, which are not public, and what stands in for them."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from adamw_triton import signature


def base():
    return torch.randn(4, 4)


OTHERS = {
    "another dtype of the same size": lambda: base().view(torch.int32),
    "another dtype": lambda: base().bfloat16(),
    "another shape": lambda: torch.randn(2, 8),
    "fewer elements": lambda: torch.randn(3, 4),
    "other strides": lambda: base().t(),
    "with gaps": lambda: torch.randn(4, 8)[:, ::2],
    "lazily negated": lambda: torch._neg_view(base()),
    "another type": lambda: nn.Parameter(base()),
    "another device": lambda: base().to("meta"),
    "fake": lambda: FakeTensorMode().from_tensor(base()),
    "None": lambda: None,
}


@pytest.fixture(params=["torch", "python"])
def guards(request):
    if request.param == "python":
        return signature._Layouts
    made = signature._guards([base()])
    assert not isinstance(made, signature._Layouts), "torch no longer has its guards: steps take longer on the host"
    return signature._guards


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("place", [0, 1])
@torch.no_grad()
def test_differences_are_seen(name, place, guards):
    tensors = [base(), base()]
    guard = guards(tensors)
    assert guard.check(*tensors) and guard.check(base(), base())
    tensors[place] = OTHERS[name]()
    assert not guard.check(*tensors)
