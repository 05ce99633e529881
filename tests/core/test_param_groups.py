"""param_groups_weight_decay: what decays, what does not, tied parameters once."""

import pytest
import torch
from torch import nn

from adamw_triton import AdamW, param_groups_weight_decay


class RMSNorm(nn.Module):
    def __init__(self, *shape):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*shape))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte = nn.Embedding(7, 4)
        self.conv = nn.Conv2d(2, 3, 3)
        self.norm_2d = nn.LayerNorm((4, 4))
        self.batch_norm = nn.BatchNorm1d(3)
        self.rms = RMSNorm(2, 4)
        self.renormalise = nn.Linear(4, 4)  # a name is not a type
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.wte.weight


def names(model, groups):
    known = {id(p): name for name, p in model.named_parameters()}
    return [{known[id(p)] for p in group["params"]} for group in groups]


@pytest.mark.fast
def test_split():
    model = Model()
    groups = param_groups_weight_decay(model, 0.1, lr=3e-4)
    assert [(g["weight_decay"], g["lr"]) for g in groups] == [(0.1, 3e-4), (0.0, 3e-4)]
    decay, no_decay = names(model, groups)
    assert decay == {"wte.weight", "conv.weight", "renormalise.weight"}
    assert no_decay == {
        "conv.bias", "norm_2d.weight", "norm_2d.bias", "batch_norm.weight", "batch_norm.bias", "rms.weight",
        "renormalise.bias", "scale", "head.bias",
    }  # fmt: skip
    assert sum(len(g["params"]) for g in groups) == len(decay) + len(no_decay), "tied parameters are listed once"


@pytest.mark.parametrize("given", ["wte", "wte.weight", "head.weight"])
def test_exempt_by_name_of_module_or_parameter(given):
    """A tied parameter is exempt under either of its names."""
    model = Model()
    decay, no_decay = names(model, param_groups_weight_decay(model, 0.1, no_decay=[given, "conv"]))
    assert decay == {"renormalise.weight"}
    assert {"wte.weight", "conv.weight"} <= no_decay


def test_groups_are_never_empty():
    assert [g["weight_decay"] for g in param_groups_weight_decay(nn.LayerNorm(3), 0.1)] == [0.0]
    assert [g["weight_decay"] for g in param_groups_weight_decay(nn.Linear(3, 3, bias=False), 0.1)] == [0.1]


def test_with_the_optimizer(device, path):
    model = Model().to(device)
    optimizer = AdamW(param_groups_weight_decay(model, 0.5), lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        decays = name in ("wte.weight", "conv.weight", "renormalise.weight")
        torch.testing.assert_close(p, before[name] * (0.95 if decays else 1), rtol=1e-6, atol=0)
