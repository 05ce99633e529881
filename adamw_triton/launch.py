"""Grid, block size, device: the only place that calls a kernel."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .scalars import Scalars

try:
    import triton
    import triton.language as tl
except ImportError:  # triton is published for Linux only; the reference runs elsewhere
    triton = None
else:
    from .kernels.adamw import adamw_kernel, adamw_table_kernel

# With TRITON_INTERPRET=1 set before this import, kernels run through NumPy, on CPU tensors too.
INTERPRETED = triton is not None and not isinstance(adamw_kernel, triton.JITFunction)

# 128 threads a program, of warps of 32 threads (NVIDIA) or wavefronts of 64 (AMD).
NUM_WARPS = 4 if torch.version.hip is None else 2

_NO_SCALARS = Scalars(*[0.0] * len(Scalars._fields))


class Table(NamedTuple):
    """Several tensors for one launch, on their device; layouts as in `adamw_table_kernel`."""

    tensors: Tensor
    grads: Tensor
    chunks: Tensor
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    exp_avg_dtype: torch.dtype
    exp_avg_sq_dtype: torch.dtype
    amsgrad: bool
    aligned: bool


def has_kernels(device: torch.device) -> bool:
    """Whether tensors on `device` go through the kernels; if not, through the reference."""
    if triton is None and device.type == "cuda":
        warnings.warn(
            "Triton is not installed: AdamW steps as eager PyTorch operations instead of its kernel. "
            "Install triton (published for Linux).",
            stacklevel=2,
        )
    return triton is not None and (device.type == "cuda" or (INTERPRETED and device.type == "cpu"))


def block_size(*dtypes: torch.dtype) -> int:
    """Elements per program of 128 threads, for the dtypes of parameter, gradient and moments.

    Accesses: with one width, 8 elements a thread (4 of float64), two of 128 bits for each fp32 tensor. With mixed
    widths 4, so that the wide side takes 128 bits and the narrow side 64: at 8 the compiler would move the
    narrow values between threads through shared memory.

    Bytes in flight: before its first wait a thread has loaded 80 bytes (fp32) or 48 (bf16), with 48 registers 10
    programs share an SM: 60 to 100 KiB, where CUB asks for 32 on an H100, 48 on an H200 and 64 on a B200.

    Waves: a program is one block, so that 1320 of them, 1.35 M elements, are one wave of an H100. ResNet-50's 25.6 M
    parameters are 19 waves, whose last one costs at most 5 %; in chunks of 64 Ki they would be 508 programs, not
    even half a wave. The price is the table, 8 bytes for each 1024 elements, 0.03 % of what these move.
    """
    sizes = {dtype.itemsize for dtype in dtypes}
    return 1024 if sizes in ({2}, {4}) else 512


def launch_tensor(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    scalars: Scalars | Tensor,
    *,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Step one dense, real parameter; all tensors on its device, with its strides.

    Args:
        scalars: floats, or a float64 row on the device (`device_scalars`).
        grad_scale: one-element device tensor; gradients are divided by it in registers.
        found_inf: one-element device tensor; nothing is written where it is not 0.
    """
    n_elements = param.numel()
    if n_elements == 0:
        return
    size = block_size(param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype)
    row, floats = _split(scalars, param)
    with _on(param.device):
        adamw_kernel[(-(-n_elements // size),)](
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            max_exp_avg_sq,
            n_elements,
            grad_scale,
            found_inf,
            row,
            *floats,
            maximize,
            size,
            num_warps=NUM_WARPS,
        )


def launch_table(
    table: Table,
    scalars: Scalars | Tensor,
    *,
    maximize: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Step every tensor of a table in one launch; other arguments as for `launch_tensor`."""
    n_chunks = table.chunks.shape[0]
    if n_chunks == 0:
        return
    dtypes = (table.param_dtype, table.grad_dtype, table.exp_avg_dtype, table.exp_avg_sq_dtype)
    row, floats = _split(scalars, table.tensors, table.param_dtype)
    with _on(table.tensors.device):
        adamw_table_kernel[(n_chunks,)](
            table.tensors,
            table.grads,
            table.chunks,
            grad_scale,
            found_inf,
            row,
            *floats,
            *map(_triton_dtype, dtypes),
            table.amsgrad,
            table.aligned,
            maximize,
            block_size(*dtypes),
            num_warps=NUM_WARPS,
        )


def _split(scalars: Scalars | Tensor, like: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor | None, Scalars]:
    """The row in memory, if the scalars are or must be there, and the floats."""
    if isinstance(scalars, Tensor):
        return scalars, _NO_SCALARS
    if (dtype or like.dtype) == torch.float64:
        # A float argument reaches the kernel as fp32. A small pageable copy does not wait for the device.
        return torch.tensor(scalars, dtype=torch.float64).to(like.device, non_blocking=True), _NO_SCALARS
    return None, scalars


def _on(device: torch.device) -> AbstractContextManager:
    # Triton launches on the current device's current stream, whatever device its arguments are on.
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def _triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return _TRITON_DTYPES[dtype]


if triton is not None:
    _TRITON_DTYPES = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.float64: tl.float64,
    }
