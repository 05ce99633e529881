"""The AdamW step: formula in registers -> one block of one tensor -> the two kernels.

For a parameter θ with gradient g at step t, decoupled weight decay λ and ε outside the square root
(Loshchilov & Hutter, https://arxiv.org/abs/1711.05101, in torch.optim.AdamW's convention):

    θ <- θ (1 - ηλ)
    m <- β1 m + (1 - β1) g
    v <- β2 v + (1 - β2) g²
    θ <- θ - η (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + ε)

Nothing that is constant over a tensor is computed here. Its numbers arrive ready, made in double precision:

    decay                       1 - ηλ
    lerp_weight                 1 - β1, or -β1 where β1 <= 1/2 (see _adamw_update)
    beta2, one_minus_beta2      β2, 1 - β2
    neg_step_size               -η / (1 - β1^t)
    inv_bias_correction2_sqrt   1 / sqrt(1 - β2^t)
    eps                         ε
    step                        t, which only stochastic rounding needs

as a row of memory (`scalars_ptr`) for each tensor, in that order, which kernels/scalars.py writes: float32, or float64
for float64 parameters.

What is decided over the gradients of the whole model (clipping, unscaling, skipping) arrives as one factor
and one flag in memory (`control_ptr`, from kernels/grad_norm.py).
"""

import triton
import triton.language as tl

from . import storage
from .arithmetic import divide, sqrt
from .statistics import statistics_of_program, store_no_statistics, store_statistics


@triton.jit
def _adamw_update(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,
    scalars,
    AMSGRAD: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """The formula, on registers. Explicit fma: the same bits whatever the compiler may contract.

    CAUTIOUS: decay only where that moves the parameter as the update does (https://arxiv.org/abs/2510.12402).
    """
    decay, lerp_weight, beta2, one_minus_beta2, neg_step_size, inv_bias_correction2_sqrt, eps = scalars
    # torch's lerp_: from the nearer end, so that β1 = 0 gives exactly grad, and inf - inf the same NaN.
    nearer = tl.where(lerp_weight > 0.0, exp_avg, grad)
    exp_avg = tl.fma(grad - exp_avg, lerp_weight, nearer)
    # (1 - β2) g before g: a g² beyond fp32's range can still be a finite term.
    exp_avg_sq = tl.fma(grad * one_minus_beta2, grad, exp_avg_sq * beta2)
    second_moment = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        second_moment = max_exp_avg_sq
    root = sqrt(second_moment, APPROXIMATE)
    denominator = tl.fma(root, inv_bias_correction2_sqrt, eps)
    update = divide(exp_avg, denominator, APPROXIMATE)
    if CAUTIOUS:
        decay = tl.where(update * param >= 0.0, decay, 1.0)
    param = tl.fma(update, neg_step_size, param * decay)
    return param, exp_avg, exp_avg_sq, max_exp_avg_sq, root


@triton.jit
def _step_elements(
    ptrs,
    start,
    offsets,
    mask,
    remaining,
    grad_factor,
    statistics_ptr,
    scalars,
    rounding,
    DTYPE: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    ROUNDING: tl.constexpr,
    EVICTION: tl.constexpr,
):
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, master_ptr, m_scale_ptr, v_scale_ptr = ptrs
    AMSGRAD: tl.constexpr = max_exp_avg_sq_ptr is not None
    old_param = storage.load_param(param_ptr, master_ptr, offsets, mask, DTYPE, EVICTION)
    grad = storage.load(grad_ptr, offsets, mask, DTYPE, EVICTION)
    exp_avg = storage.load_exp_avg(exp_avg_ptr, m_scale_ptr, offsets, mask, remaining, DTYPE, EVICTION)
    exp_avg_sq = storage.load_exp_avg_sq(exp_avg_sq_ptr, v_scale_ptr, offsets, mask, remaining, DTYPE, EVICTION)
    max_exp_avg_sq = exp_avg_sq
    if AMSGRAD:
        max_exp_avg_sq = storage.load(max_exp_avg_sq_ptr, offsets, mask, DTYPE, EVICTION)
    if grad_factor is not None:
        grad = grad * grad_factor
    # Where exp_avg_sq was rounded to 8 bits, the last bits of its root mean nothing.
    APPROXIMATE: tl.constexpr = v_scale_ptr is not None
    param, exp_avg, exp_avg_sq, max_exp_avg_sq, root = _adamw_update(
        old_param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars[:7], AMSGRAD, CAUTIOUS, APPROXIMATE
    )
    if statistics_ptr is not None:
        BITS: tl.constexpr = (
            param_ptr.dtype.element_ty.primitive_bitwidth
            | grad_ptr.dtype.element_ty.primitive_bitwidth
            | exp_avg_ptr.dtype.element_ty.primitive_bitwidth
            | exp_avg_sq_ptr.dtype.element_ty.primitive_bitwidth
            | (0 if master_ptr is None else master_ptr.dtype.element_ty.primitive_bitwidth)
        )
        store_statistics(statistics_ptr, param - old_param, param, mask, 4 if BITS >= 32 else 8)
    noise = (None, None, None)
    if ROUNDING != "nearest":
        ROUNDS_BF16: tl.constexpr = (
            (master_ptr is None and param_ptr.dtype.element_ty == tl.bfloat16)
            or exp_avg_ptr.dtype.element_ty == tl.bfloat16
            or exp_avg_sq_ptr.dtype.element_ty == tl.bfloat16
        )
        noise = storage.noise_of(
            rounding,
            tl.cast(scalars[7], tl.uint32),
            start,
            param if ROUNDS_BF16 else None,
            offsets.shape[0],
            ROUNDING,
        )
        if m_scale_ptr is not None and v_scale_ptr is not None:
            noise = (noise[0], noise[1], noise[1])  # m / sqrt(v) is off by less where both are rounded the same way
    storage.store_param(param_ptr, master_ptr, offsets, param, noise[0], mask, EVICTION)
    storage.store_exp_avg(exp_avg_ptr, m_scale_ptr, offsets, exp_avg, noise[1], mask, remaining, EVICTION)
    storage.store_exp_avg_sq(
        exp_avg_sq_ptr, v_scale_ptr, offsets, exp_avg_sq, root, noise[2], mask, remaining, EVICTION
    )
    if AMSGRAD:
        # The noise of exp_avg_sq, so that the maximum stays the larger one.
        storage.store(max_exp_avg_sq_ptr, offsets, max_exp_avg_sq, noise[2], mask, EVICTION)


@triton.jit
def _load_scalars(ptr):
    first = tl.load(ptr), tl.load(ptr + 1), tl.load(ptr + 2), tl.load(ptr + 3)
    return first + (tl.load(ptr + 4), tl.load(ptr + 5), tl.load(ptr + 6), tl.load(ptr + 7))


@triton.jit
def _step_block(
    ptrs,
    block,
    n_elements,
    control_ptr,
    statistics_ptr,
    scalars_ptr,
    rounding,
    MAXIMIZE: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVICTION: tl.constexpr,
):
    """Step the `block`-th BLOCK_SIZE elements of one tensor."""
    if control_ptr is not None:
        if tl.load(control_ptr + 1) != 0.0:
            return

    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, master_ptr, m_scale_ptr, v_scale_ptr = ptrs
    IS_DOUBLE: tl.constexpr = param_ptr.dtype.element_ty == tl.float64
    DTYPE: tl.constexpr = tl.float64 if IS_DOUBLE else tl.float32
    scalars = _load_scalars(scalars_ptr)

    grad_factor = None  # one for everything that multiplies a gradient
    if control_ptr is not None:
        grad_factor = tl.load(control_ptr).to(DTYPE) * (-1.0 if MAXIMIZE else 1.0)
    elif MAXIMIZE:
        grad_factor = -1.0

    # 64-bit base, 32-bit offsets inside the block: tensors may exceed 2^31 elements.
    start = block.to(tl.int64) * BLOCK_SIZE
    if max_exp_avg_sq_ptr is not None:
        max_exp_avg_sq_ptr += start
    if master_ptr is not None:
        master_ptr += start
    if statistics_ptr is not None:
        statistics_ptr = statistics_of_program(statistics_ptr)
    if m_scale_ptr is not None:
        m_scale_ptr += start // storage.GROUP_SIZE
    if v_scale_ptr is not None:
        v_scale_ptr += start // storage.GROUP_SIZE
    ptrs = (
        param_ptr + start,
        grad_ptr + start,
        exp_avg_ptr + start,
        exp_avg_sq_ptr + start,
        max_exp_avg_sq_ptr,
        master_ptr,
        m_scale_ptr,
        v_scale_ptr,
    )
    # Not 16 for 8-bit values: those of all tensors would be 16 to a thread, and accesses to wider ones leave gaps.
    offsets = tl.max_contiguous(tl.arange(0, BLOCK_SIZE), storage.MAX_WIDTH)
    remaining = n_elements - start
    # A mask whose bound is not a multiple of 16 splits every 128-bit access in four: full blocks have none.
    if remaining >= BLOCK_SIZE:
        _step_elements(
            ptrs, start, offsets, None, None, grad_factor, statistics_ptr, scalars, rounding,
            DTYPE, CAUTIOUS, ROUNDING, EVICTION,
        )  # fmt: skip
    else:
        tail = remaining.to(tl.int32)
        _step_elements(
            ptrs, start, offsets, offsets < tail, tail, grad_factor, statistics_ptr, scalars, rounding,
            DTYPE, CAUTIOUS, ROUNDING, EVICTION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_elements", "seed", "stream", "element_offset", "row_size", "row_stride"])
def adamw_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    max_exp_avg_sq_ptr,
    master_ptr,
    exp_avg_scale_ptr,
    exp_avg_sq_scale_ptr,
    n_elements: tl.int64,
    control_ptr,
    statistics_ptr,
    seed: tl.int64,
    stream: tl.int32,
    element_offset: tl.int64,
    row_size: tl.int64,
    row_stride: tl.int64,
    scalars_ptr,
    MAXIMIZE: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVICTION: tl.constexpr = "",
):
    """Step one tensor of n_elements; one program for each BLOCK_SIZE elements.

    master_ptr  int16 or int8 remainder of a bf16 parameter, or fp32 master of any other
    *_scale_ptr fp32 scales of 8-bit moments, one for each storage.GROUP_SIZE elements
    seed, stream
                of stochastic rounding: the key, and the parameter's number
    element_offset, row_size, row_stride
                of a tensor that is a part of the parameter: the index of its first element there, elements that lie in
                one piece there, or 0 if all do, and the distance of such pieces
    ROUNDING    "nearest", "stochastic" (bf16, 8-bit moments, and a remainder of 8 bits), "stochastic part" where some
                of these numbers are not 0, or "stochastic part, unaligned" where some are not multiples of 8
    EVICTION    a hint to the caches for all tensors: "", "evict_first" or "evict_last"

    control_ptr float64 [2]: a factor for the gradient, and a flag: where it is not 0, nothing is written
    statistics_ptr
                float32 [n_programs, STATISTICS_ROWS, 4], written: sums of squares of the change of the parameter, of
                the new parameter, and both again

    scalars_ptr float32 [8], or float64 [8] of a float64 parameter

    max_exp_avg_sq_ptr, master_ptr, scales, control_ptr and statistics_ptr may be None: the compiled kernel then has no
    trace of them.
    """
    _step_block(
        (
            param_ptr,
            grad_ptr,
            exp_avg_ptr,
            exp_avg_sq_ptr,
            max_exp_avg_sq_ptr,
            master_ptr,
            exp_avg_scale_ptr,
            exp_avg_sq_scale_ptr,
        ),
        tl.program_id(0),
        n_elements,
        control_ptr,
        statistics_ptr,
        scalars_ptr,
        (seed, stream, element_offset, row_size, row_stride),
        MAXIMIZE,
        CAUTIOUS,
        ROUNDING,
        BLOCK_SIZE,
        EVICTION,
    )


@triton.jit
def _table_ptr(address_ptr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    ptr = tl.load(address_ptr).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


# Slices of one table: their alignment must not compile another kernel.
@triton.jit(do_not_specialize=["seed"], do_not_specialize_on_alignment=["grads_ptr"])
def adamw_table_kernel(
    tensors_ptr,
    grads_ptr,
    chunks_ptr,
    control_ptr,
    statistics_ptr,
    seed: tl.int64,
    scalars_ptr,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    EXP_AVG_DTYPE: tl.constexpr,
    EXP_AVG_SQ_DTYPE: tl.constexpr,
    MASTER_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EVICTION: tl.constexpr = "",
):
    """Step a table of tensors; one program for each chunk of BLOCK_SIZE elements.

    tensors_ptr  int64 [n_tensors, ...]  n_elements and addresses of param, exp_avg, exp_avg_sq; then what there is of:
                                         addresses of max_exp_avg_sq, master, exp_avg_scale, exp_avg_sq_scale; stream;
                                         element_offset, row_size, row_stride
    grads_ptr    int64 [n_tensors]       addresses of the gradients, 0 where there is none and nothing is written: the
                                         only part that changes between steps
    chunks_ptr   int32 [n_chunks, 2]     tensor, block within that tensor
    scalars_ptr  float32 or float64 [n_tensors, 8]

    There is a master if MASTER_DTYPE is not None, a scale for a moment of 8 bits, a stream unless ROUNDING is
    "nearest", and what comes after it for parts. ALIGNED promises that every address is a multiple of 16 bytes. Other
    arguments as for adamw_kernel.
    """
    MASTER: tl.constexpr = 4 + (1 if AMSGRAD else 0)
    EXP_AVG_SCALE: tl.constexpr = MASTER + (0 if MASTER_DTYPE is None else 1)
    EXP_AVG_SQ_SCALE: tl.constexpr = EXP_AVG_SCALE + (1 if EXP_AVG_DTYPE == tl.int8 else 0)
    STREAM: tl.constexpr = EXP_AVG_SQ_SCALE + (1 if EXP_AVG_SQ_DTYPE == tl.uint8 else 0)
    COLUMNS: tl.constexpr = STREAM + (0 if ROUNDING == "nearest" else 1 if ROUNDING == "stochastic" else 4)

    chunk_ptr = chunks_ptr + 2 * tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunk_ptr)
    if tl.load(grads_ptr + tensor) == 0:
        if statistics_ptr is not None:
            store_no_statistics(statistics_ptr, control_ptr)
        return
    row_ptr = tensors_ptr + tensor * COLUMNS
    if AMSGRAD:
        max_exp_avg_sq_ptr = _table_ptr(row_ptr + 4, EXP_AVG_SQ_DTYPE, ALIGNED)
    else:
        max_exp_avg_sq_ptr: tl.constexpr = None
    if MASTER_DTYPE is not None:
        master_ptr = _table_ptr(row_ptr + MASTER, MASTER_DTYPE, ALIGNED)
    else:
        master_ptr: tl.constexpr = None
    if EXP_AVG_DTYPE == tl.int8:
        exp_avg_scale_ptr = _table_ptr(row_ptr + EXP_AVG_SCALE, tl.float32, False)
    else:
        exp_avg_scale_ptr: tl.constexpr = None
    if EXP_AVG_SQ_DTYPE == tl.uint8:
        exp_avg_sq_scale_ptr = _table_ptr(row_ptr + EXP_AVG_SQ_SCALE, tl.float32, False)
    else:
        exp_avg_sq_scale_ptr: tl.constexpr = None
    rounding = (seed, 0, 0, 0, 0)
    if ROUNDING == "stochastic":
        rounding = (seed, tl.load(row_ptr + STREAM).to(tl.int32), 0, 0, 0)
    elif ROUNDING != "nearest":
        rounding = (
            seed,
            tl.load(row_ptr + STREAM).to(tl.int32),
            tl.load(row_ptr + STREAM + 1),
            tl.load(row_ptr + STREAM + 2),
            tl.load(row_ptr + STREAM + 3),
        )
    _step_block(
        (
            _table_ptr(row_ptr + 1, PARAM_DTYPE, ALIGNED),
            _table_ptr(grads_ptr + tensor, GRAD_DTYPE, ALIGNED),
            _table_ptr(row_ptr + 2, EXP_AVG_DTYPE, ALIGNED),
            _table_ptr(row_ptr + 3, EXP_AVG_SQ_DTYPE, ALIGNED),
            max_exp_avg_sq_ptr,
            master_ptr,
            exp_avg_scale_ptr,
            exp_avg_sq_scale_ptr,
        ),
        tl.load(chunk_ptr + 1),
        tl.load(row_ptr),
        control_ptr,
        statistics_ptr,
        scalars_ptr + tensor * 8,
        rounding,
        MAXIMIZE,
        CAUTIOUS,
        ROUNDING,
        BLOCK_SIZE,
        EVICTION,
    )
