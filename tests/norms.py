"""Exact norms of gradients, what kernel and reference may be off, and gradients that are hard to square."""

import math

import numpy as np
import torch
from helpers import exact

from adamw_triton import launch

DOCUMENTED = 8e-7  # of the norm: kernel, fp32, bf16 and fp16 gradients, what kernels/grad_norm.py says
DOUBLE = 1e-14  # kernel, fp64 gradients, and the reference: at most 40 roundings of 2^-53 from an element to the sum
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128]
INF, NAN = math.inf, math.nan


def real(tensor):
    tensor = tensor.detach().resolve_conj().resolve_neg()
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def sum_of_squares(grads):
    return sum((np.square(exact(real(g))).sum() for g in grads), np.longdouble(0))


def bound_of(path, grads):
    return DOUBLE if path == "reference" or all(g.dtype.to_real() == torch.float64 for g in grads) else DOCUMENTED


def hard_values(device):
    """Where squares in fp32 under- or overflow, or nearly; by name."""
    randn = torch.randn(1500, device=device)
    sign = randn.sign()
    mixed = torch.where(randn > 0.3, 1e30, 1e-30)
    needle = randn * 1e-3
    needle[777] = 1e25
    info = torch.finfo
    cases = {
        "zeros": [randn * 0, (randn * 0).bfloat16()],
        "negative zeros": [randn * 0 * -1],
        "denormals": [randn * 1e-40],
        # The interpreter reads bf16 denormals as 0.
        "smallest": [sign * 2.0**-149, sign.bfloat16() * 2.0 ** (-126 if launch.INTERPRETED else -133)],
        "smallest fp16": [sign.half() * 2.0**-24],
        "one denormal": [torch.zeros(1, device=device) + 1e-40],
        "1e-30": [randn * 1e-30],
        "1e-25": [randn * 1e-25],
        "denormal squares": [randn * 3e-22, (randn * 3e-22).bfloat16()],
        "smallest normal squares": [randn * 1e-18],
        "1e30": [randn * 1e30],
        "1e30 bf16": [randn.bfloat16() * 1e30],
        "largest": [sign * info(torch.float32).max, sign.bfloat16() * info(torch.bfloat16).max],
        "largest fp16": [sign.half() * info(torch.float16).max],
        "mixed in a tensor": [mixed * sign, mixed.bfloat16()],
        "mixed over tensors": [randn * 1e-30, randn * 1e30, randn * 1e-40, randn],
        "denormals and largest": [torch.where(randn > 0, 1e-40, 3e38)],
        "needle": [needle],
        "fp64": [randn.double() * 1e100, randn.double() * 1e99],
        "small fp64": [randn.double() * 1e-100],
        "fp64 and fp32": [randn.double() * 1e35, randn * 1e36],
        "complex": [torch.complex(randn * 1e30, randn.flip(0) * 1e-30), torch.complex(randn * 1e30, randn * 2e30)],
    }
    # Around the sums below and above which a span is summed a second time, scaled.
    for exponent in (-46, -45, -44, -40, 57, 58, 59, 63, 64):
        cases[f"around 2^{exponent}"] = [sign * 2.0**exponent, (sign * (1 - 2.0**-24) * 2.0**exponent)[:16]]
    return cases


HARD = list(hard_values(torch.device("cpu")))
