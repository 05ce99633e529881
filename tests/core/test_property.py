"""Random optimizers, shapes, strides, groups, missing and changing gradients, against torch's loop."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from adamw_triton import AdamW

SIZES = st.sampled_from([0, 1, 2, 3, 5, 16, 33, 64])
SHAPES = st.lists(SIZES, max_size=3).filter(lambda shape: torch.Size(shape).numel() <= 3000)
LAYOUTS = st.sampled_from(["contiguous", "reversed", "gaps", "offset"])


@st.composite
def tensors(draw, dtype, shape):
    """A tensor of the shape: contiguous, in reversed dimension order, with gaps, or off a boundary."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 1000))), dtype=dtype)
    layout = draw(LAYOUTS)
    if layout == "reversed":
        backwards = list(reversed(range(values.dim())))
        return values.permute(backwards).contiguous().permute(backwards)
    if layout == "gaps":
        return torch.stack((values, torch.zeros_like(values)), dim=-1)[..., 0]
    if layout == "offset":
        return torch.cat((torch.zeros(1, dtype=dtype), values.reshape(-1)))[1:].view(shape)
    return values


@st.composite
def groups(draw):
    made = []
    for _ in range(draw(st.integers(1, 3))):
        dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64]))
        params = [draw(tensors(dtype, draw(SHAPES))) for _ in range(draw(st.integers(1, 4)))]
        options = {
            "lr": draw(st.sampled_from([0.0, 1e-3, 0.1])),
            "betas": (draw(st.sampled_from([0.0, 0.4, 0.9])), draw(st.sampled_from([0.0, 0.5, 0.999]))),
            "eps": draw(st.sampled_from([1e-8, 1e-3])),
            "weight_decay": draw(st.sampled_from([0.0, 0.1])),
            "amsgrad": draw(st.booleans()),
            "maximize": draw(st.booleans()),
        }
        made.append((params, options, draw(st.sampled_from([None, True, False]))))
    return made


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data(), layout=groups())
def test_any_optimizer(path, device, data, layout):
    ours = [
        {"params": [nn.Parameter(p.to(device)) for p in params], "foreach": foreach, **options}
        for params, options, foreach in layout
    ]
    theirs = [
        {"params": [nn.Parameter(p.clone().to(device)) for p in params], "foreach": False, **options}
        for params, options, _ in layout
    ]
    mine, reference = AdamW(ours), torch.optim.AdamW(theirs)
    pairs = [pair for a, b in zip(ours, theirs, strict=True) for pair in zip(a["params"], b["params"], strict=True)]
    for _ in range(data.draw(st.integers(1, 4))):
        for p, q in pairs:
            change = data.draw(st.sampled_from(["keep", "new", "new", "none"]))
            if change == "none":
                p.grad = q.grad = None
            elif change == "new" or p.grad is None:
                p.grad = data.draw(tensors(p.dtype, tuple(p.shape))).to(device)
                q.grad = p.grad.clone()
        mine.step()
        reference.step()
        for p, q in pairs:
            tolerance = {"rtol": 2e-5, "atol": 2e-6} if p.dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-13}
            torch.testing.assert_close(p, q, **tolerance)
            assert mine.state[p].keys() == reference.state[q].keys() if q in reference.state else p not in mine.state
