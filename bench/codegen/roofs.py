"""Kernels that only move bytes: what the optimizer's speed is compared with.

Like the optimizer's kernels they have an unmasked branch for full blocks, and write in place what they read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adamw_triton import launch

# 16 words of 4 bytes a thread: four 128-bit loads in flight, 128 KiB on an SM with 2048 threads, four times
# what CUB asks of an H100.
COPY_BLOCK_SIZE = 2048


@triton.jit
def _copy_elements(source_ptr, target_ptr, offsets, mask):
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["n_elements"])
def copy_kernel(source_ptr, target_ptr, n_elements: tl.int64, BLOCK_SIZE: tl.constexpr):
    """target = source."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    source_ptr += start
    target_ptr += start
    offsets = tl.arange(0, BLOCK_SIZE)
    remaining = n_elements - start
    if remaining >= BLOCK_SIZE:
        _copy_elements(source_ptr, target_ptr, offsets, None)
    else:
        _copy_elements(source_ptr, target_ptr, offsets, offsets < remaining.to(tl.int32))


@triton.jit
def _store(ptr, offsets, value, mask):
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _skeleton_elements(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, mask):
    DTYPE: tl.constexpr = tl.float64 if param_ptr.dtype.element_ty == tl.float64 else tl.float32
    # All loads before the first store: the compiler may not move them across, the tensors could overlap.
    param = tl.load(param_ptr + offsets, mask=mask).to(DTYPE)
    grad = tl.load(grad_ptr + offsets, mask=mask).to(DTYPE)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask).to(DTYPE)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask).to(DTYPE)
    _store(param_ptr, offsets, tl.maximum(param, grad), mask)
    _store(exp_avg_ptr, offsets, tl.maximum(exp_avg, grad), mask)
    _store(exp_avg_sq_ptr, offsets, tl.maximum(exp_avg_sq, grad), mask)


@triton.jit(do_not_specialize=["n_elements"])
def skeleton_kernel(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, n_elements: tl.int64, BLOCK_SIZE: tl.constexpr):
    """Reads four tensors and writes three, each the maximum of itself and the gradient.

    One instruction an element and tensor, so that no load can be dropped, and values that never grow.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_SIZE
    param_ptr += start
    grad_ptr += start
    exp_avg_ptr += start
    exp_avg_sq_ptr += start
    offsets = tl.arange(0, BLOCK_SIZE)
    remaining = n_elements - start
    if remaining >= BLOCK_SIZE:
        _skeleton_elements(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, None)
    else:
        mask = offsets < remaining.to(tl.int32)
        _skeleton_elements(param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, offsets, mask)


def copy(source: Tensor, target: Tensor) -> None:
    """Copy a contiguous tensor of 4-byte elements; both on the current device."""
    n_elements = source.numel()
    grid = (-(-n_elements // COPY_BLOCK_SIZE),)
    copy_kernel[grid](source, target, n_elements, COPY_BLOCK_SIZE, num_warps=launch.NUM_WARPS)


def skeleton(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Move the bytes of an AdamW step, in the block size that the optimizer uses for these dtypes."""
    n_elements = param.numel()
    used = launch.configuration_of(param.dtype, grad.dtype, exp_avg.dtype, exp_avg_sq.dtype)
    grid = (-(-n_elements // used.block_size),)
    skeleton_kernel[grid](param, grad, exp_avg, exp_avg_sq, n_elements, used.block_size, num_warps=used.num_warps)


def copy_bytes(n_bytes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Source and target of a copy that reads and writes `n_bytes` together, rounded up to 16 bytes each."""
    n_words = 4 * max(1, -(-n_bytes // 32))
    source = torch.randint(-(2**31), 2**31 - 1, (n_words,), dtype=torch.int32, device=device)
    return source, torch.empty_like(source)
