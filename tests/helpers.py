"""The float64 oracle, what each rounding may cost, and buffers with guarded borders."""

import functools

import numpy as np
import pytest
import torch

from adamw_triton import launch
from adamw_triton.hyperparams import Hyperparams, kernel_scalars
from adamw_triton.storage import StateTensors
from bench.codegen.machine_code import Failure

# Unit roundoff: the largest relative error of rounding to nearest.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Half the distance of the smallest denormals: the largest absolute error below the normal range.
QUANTUM = {torch.float64: 2.0**-1075, torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
DTYPES = list(UNIT)


def scalars_row(hyperparams, step, device, dtype=torch.float32):
    """What kernels/scalars.py writes for one parameter."""
    return torch.tensor(kernel_scalars(hyperparams, step), dtype=dtype, device=device)


@functools.cache
def truncates_bf16():
    """Whether kernels truncate fp32 -> bf16 here, as Triton's interpreter does, where a GPU rounds to nearest.

    With beta1 = 0 the new exp_avg is the gradient, stored.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    grad = torch.linspace(1, 2, 1000, device=device)
    exp_avg = torch.zeros(1000, dtype=torch.bfloat16, device=device)
    scalars = scalars_row(Hyperparams(lr=0.0, beta1=0.0, beta2=0.9, eps=1e-8, weight_decay=0.0), 1, device)
    # Not through adamw_, which a test may have sent to the reference.
    state = StateTensors(exp_avg, torch.zeros_like(grad))
    launch.launch_tensor(torch.zeros_like(grad), grad, state, scalars, maximize=False)
    if torch.equal(exp_avg, grad.bfloat16()):
        return False
    assert torch.equal(exp_avg, (grad.view(torch.int32) >> 16 << 16).view(torch.float32).bfloat16())
    assert launch.INTERPRETED, "only the interpreter may truncate"
    return True


def storage_units(dtype):
    """Rounding of one store, in units."""
    return 2 if dtype == torch.bfloat16 and truncates_bf16() else 1


def exact(tensor):
    """The values on the CPU in extended precision (64 bits of mantissa on x86): the oracle of float64 too."""
    return tensor.detach().cpu().to(torch.float64).numpy().astype(np.longdouble)


def oracle(param, grad, moments, *, step, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=1e-2, maximize=False):
    """The definition of AdamW. Returns the new param and moments, and what 1 of exp_avg moves the param."""
    p, g, m, v, *rest = map(exact, (param, grad, *moments))
    lr, beta1, beta2, eps, weight_decay = map(np.longdouble, (lr, *betas, eps, weight_decay))
    if maximize:
        g = -g
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    second = v
    if rest:
        second = rest[0] = np.maximum(rest[0], v)
    slope = lr / (1 - beta1**step) / (np.sqrt(second / (1 - beta2**step)) + eps)
    return p * (1 - lr * weight_decay) - slope * m, [m, v, *rest], slope


def assert_step(before, after, **options):
    """Check one step of one tensor against the oracle.

    Args:
        before, after: param, grad, exp_avg, exp_avg_sq (, max_exp_avg_sq) around the step.
        options: of `oracle`.

    The bounds: one rounding of the result to its storage, and the arithmetic before that, in units u of
    its precision. exp_avg: 3 roundings of the larger of m and g. exp_avg_sq: 4. param: 2 of the old
    parameter (decay, sum), and the update with the error of m in it and 8 roundings of its own (three
    scalars, sqrt, sum, quotient, product, and one to spare for an emulated fma).
    """
    assert torch.equal(bits(before[1]), bits(after[1])), "the gradient was modified"
    param, moments, slope = oracle(*before[:2], before[2:], **options)
    u = UNIT[torch.float64] if before[0].dtype == torch.float64 else UNIT[torch.float32]
    old_param, grad, old_exp_avg = (abs(exact(t)) for t in before[:3])
    error_of_m = 3 * u * np.maximum(old_exp_avg, grad)
    arithmetic = [
        u * (2 * old_param + 8 * slope * abs(moments[0])) + slope * error_of_m,
        error_of_m,
        *(4 * u * moment for moment in moments[1:]),
    ]
    names = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    for name, actual, expected, bound in zip(
        names, (after[0], *after[2:]), (param, *moments), arithmetic, strict=False
    ):
        dtype = actual.dtype
        stored = storage_units(dtype) * (UNIT[dtype] * (abs(expected) + bound) + QUANTUM[dtype])
        error = abs(exact(actual) - expected)
        excess = np.max(error - bound - stored - QUANTUM[torch.float32], initial=-1)
        assert excess <= 0, f"{name} ({dtype}) is off by {error.max():.3e}, {excess:.3e} more than allowed"


def bits(tensor):
    """A copy of the tensor's bytes, in which NaNs are equal and zeros have a sign."""
    copy = tensor.detach().resolve_conj().clone(memory_format=torch.contiguous_format)
    return copy.cpu().reshape(-1).view(torch.uint8)


def step_both(ours, theirs, mine, reference):
    """Step with the same random gradients, and compare."""
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    mine.step()
    reference.step()
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-7)


class Guarded:
    """Tensors inside buffers whose borders must stay as they were."""

    def __init__(self):
        self.buffers = []

    def place(self, values, offset=0, border=64):
        """A copy of `values` as a view, `offset` elements after a 16-byte boundary."""
        buffer = torch.full(
            (border + offset + values.numel() + border,), -77.0, dtype=values.dtype, device=values.device
        )
        inside = slice(border + offset, border + offset + values.numel())
        assert buffer.data_ptr() % 64 == 0 or values.device.type == "cpu"
        view = buffer[inside].view(values.shape)
        view.copy_(values)
        self.buffers.append((buffer, inside))
        return view

    def assert_untouched(self):
        for buffer, inside in self.buffers:
            assert (buffer[: inside.start] == -77).all(), "written before the tensor"
            assert (buffer[inside.stop :] == -77).all(), "written after the tensor"


def random_state(shape, dtypes, device, *, amsgrad=False, scale=1.0):
    """Random param, grad and moments as after some steps: (param, grad, exp_avg, exp_avg_sq (, max_exp_avg_sq))."""
    param, grad, exp_avg = (torch.randn(shape, device=device).mul(s) for s in (0.5, scale, 0.3 * scale))
    exp_avg_sq = torch.rand(shape, device=device).mul(scale * scale)
    values = [param, grad, exp_avg, exp_avg_sq]
    if amsgrad:
        values.append(exp_avg_sq * torch.rand(shape, device=device).mul(2))
    dtypes = (*dtypes, dtypes[-1])[: len(values)]
    return [value.to(dtype) for value, dtype in zip(values, dtypes, strict=True)]


def fp32_from_bits(values):
    return torch.tensor(values, dtype=torch.int64).to(torch.int32).view(torch.float32)


def allow_any_grad_dtype(param):
    if not hasattr(param, "grad_dtype"):
        pytest.skip("this torch refuses gradients of another dtype than their parameter's")
    param.grad_dtype = None


# Why a compiler can refuse a target without a fault of the kernels.
CANNOT_COMPILE = ("is not defined for option 'gpu-name'", "ROCm linker", "'nvdisasm'")


def compiled_or_skipped(variant, result):
    """The machine code of a variant; the test is skipped where this machine cannot compile for its target."""
    if isinstance(result, Failure):
        for line in result.reason.splitlines():
            if any(reason in line for reason in CANNOT_COMPILE):
                pytest.skip(f"{variant.target}: {line}")
        pytest.fail(f"{variant}: {result.reason}", pytrace=False)
    return result
