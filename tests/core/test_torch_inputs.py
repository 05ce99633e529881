"""torch's own optimizer test inputs, run through our class."""

import pytest
import torch

from adamw_triton import AdamW

pytest.importorskip("expecttest", reason="torch's own test utilities need it")
from helpers import step_both
from torch.testing._internal.common_optimizers import optim_db

INFO = next(info for info in optim_db if info.optim_cls is torch.optim.AdamW)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INPUTS = INFO.optim_inputs_func(device=DEVICE)
ERRORS = INFO.optim_error_inputs_func(device=DEVICE, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("inputs", INPUTS, ids=lambda x: x.desc)
def test_inputs(inputs, dtype, device, path):
    options = dict(inputs.kwargs)
    if options.pop("differentiable", False):
        with pytest.raises(ValueError, match="is not supported"):
            AdamW([torch.zeros(1, requires_grad=True)], **inputs.kwargs)
    ours = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in ((4, 5), (5,), (1,), ())]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    mine = AdamW(ours, **options)
    reference = torch.optim.AdamW(theirs, **{**options, "foreach": False, "fused": None})
    for _ in range(5):
        step_both(ours, theirs, mine, reference)


# Limits of torch's foreach and for-loop that ours does not have.
LIFTED = ("as a Tensor is not supported for capturable=False", "betas must be either both floats or both Tensors")


@pytest.mark.parametrize("inputs", ERRORS, ids=lambda x: x.optimizer_error_input.desc)
def test_error_inputs(inputs):
    given = inputs.optimizer_error_input
    if any(text in inputs.error_regex for text in LIFTED):
        AdamW([torch.zeros(1, requires_grad=True)], **given.kwargs)
    elif issubclass(inputs.error_type, Warning):
        with pytest.warns(inputs.error_type, match=inputs.error_regex):
            AdamW(given.params, **given.kwargs)
    else:
        with pytest.raises(inputs.error_type, match=inputs.error_regex):
            AdamW(given.params, **given.kwargs)
