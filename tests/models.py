"""A model with every kind of parameter, twice: stepped by ours and by torch's optimizer, and compared."""

import torch
from torch import nn

from adamw_triton import AdamW

# Two implementations of the same formula drift apart by roundings: a few units of the larger values a step.
TOLERANCE = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-14},
    torch.float32: {"rtol": 2e-6, "atol": 2e-7},
}


def make_model(device, dtype=torch.float32):
    """Matrices, biases, a channels_last convolution, a norm and a scalar."""
    torch.manual_seed(1)
    model = nn.Module()
    model.linear = nn.Linear(37, 29)
    model.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
    model.norm = nn.LayerNorm(29)
    model.embedding = nn.Embedding(11, 129)
    model.scale = nn.Parameter(torch.tensor(0.7))
    return model.to(device, dtype)


def pair(device, dtype=torch.float32, groups=lambda model: model.parameters(), **options):
    """The same model twice, ours with AdamW, theirs with torch's loop."""
    ours, theirs = make_model(device, dtype), make_model(device, dtype)
    mine = AdamW(groups(ours), **options)
    reference = torch.optim.AdamW(groups(theirs), **{**options, "foreach": False, "fused": None})
    return ours, theirs, mine, reference


def set_grads(ours, theirs, step, skip=()):
    generator = torch.Generator().manual_seed(step)
    for i, (p, q) in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
        grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        p.grad, q.grad = (None, None) if i in skip else (grad.clone(), grad.clone())
        if p.dim() == 4 and p.grad is not None:
            p.grad = p.grad.to(memory_format=torch.channels_last)


def assert_same(ours, theirs, mine, reference, dtype=torch.float32):
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, **TOLERANCE[dtype])
        assert mine.state[p].keys() == reference.state[q].keys()
        for name, value in reference.state[q].items():
            torch.testing.assert_close(mine.state[p][name], value, check_device=False, **TOLERANCE[dtype])
            assert mine.state[p][name].stride() == value.stride()
