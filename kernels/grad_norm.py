"""The global norm of all gradients, and what follows from it for the step: one factor and one flag.

Each program sums the squares of one span of a gradient in fp32; the last one to finish adds up all programs' sums, in
their order and in fp64, so that every run gives the same bits. A lane adds at most SPAN_BLOCKS squares, and the tree
above it has 11 levels: with unit roundoff 2^-24 the norm's error is at most 8e-7 of it. Squares that leave fp32's range
are made again from scaled gradients. fp64 gradients are squared and added in fp64, without that.

The clip factor is that of torch.nn.utils.clip_grad_norm_: min(1, max_grad_norm / (norm + 1e-6)).
"""

import triton
import triton.language as tl

SPAN_BLOCKS: tl.constexpr = tl.constexpr(16)

# A sum of squares below 2^-80 has lost some to underflow. Scaled by these powers of two, no square under- or overflows.
_SMALLEST_SUM: tl.constexpr = tl.constexpr(8.271806125530277e-25)
_UP: tl.constexpr = tl.constexpr(1.2676506002282294e30)  # 2^100
_DOWN: tl.constexpr = tl.constexpr(2.117582368135751e-22)  # 2^-72


@triton.jit
def _square_and_add(ptr, mask, scale, squares, largest):
    x = tl.load(ptr, mask=mask).to(squares.dtype)
    if mask is not None:
        x = tl.where(mask, x, 0.0)
    if scale is not None:
        x = x * scale
    return tl.fma(x, x, squares), tl.maximum(largest, tl.abs(x))


@triton.jit
def _sum_of_squares(ptr, remaining, scale, DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Sum of the squares, and the largest magnitude, of a span of which `remaining` elements are there."""
    offsets = tl.arange(0, BLOCK_SIZE)
    squares = tl.zeros((BLOCK_SIZE,), DTYPE)
    largest = tl.zeros((BLOCK_SIZE,), DTYPE)
    if remaining >= SPAN_BLOCKS * BLOCK_SIZE:
        for block in tl.static_range(SPAN_BLOCKS):
            squares, largest = _square_and_add(ptr + block * BLOCK_SIZE + offsets, None, scale, squares, largest)
    else:
        tail = remaining.to(tl.int32)
        full = tail // BLOCK_SIZE * BLOCK_SIZE
        start = tail * 0
        while start < full:  # not range, whose bounds Triton 3.4's interpreter cannot read from memory
            squares, largest = _square_and_add(ptr + start + offsets, None, scale, squares, largest)
            start += BLOCK_SIZE
        squares, largest = _square_and_add(ptr + full + offsets, full + offsets < tail, scale, squares, largest)
    largest = tl.where(largest == largest, largest, 0.0)  # a NaN is in the sum
    return tl.sum(squares, axis=0).to(tl.float64), tl.max(largest, axis=0)


@triton.jit
def decide(sum_of_squares, grad_scale_ptr, found_inf_ptr, max_grad_norm, skip_grad_norm_above):
    """Return the factor, the flag and the norm (NaN without `sum_of_squares`). Everything may be None."""
    norm = tl.full((), float("nan"), tl.float64)
    factor = tl.full((), 1.0, tl.float64)
    skip = tl.full((), False, tl.int1)
    if grad_scale_ptr is not None:
        factor = factor / tl.load(grad_scale_ptr).to(tl.float64)
    if found_inf_ptr is not None:
        skip = tl.load(found_inf_ptr) != 0.0
    if sum_of_squares is not None:
        norm = tl.sqrt(sum_of_squares) * factor
        if max_grad_norm is not None:
            factor = factor * tl.minimum(max_grad_norm / (norm + 1e-6), 1.0, propagate_nan=tl.PropagateNan.ALL)
        if skip_grad_norm_above is not None:
            fits = (norm <= skip_grad_norm_above) & (norm < float("inf"))
            skip = skip | (fits == 0)  # of a comparison with NaN too
    return factor, skip, norm


@triton.jit
def write_control(control_ptr, skipped_ptr, factor, skip, norm):
    """Write a decision to `control_ptr`, float64 [3], the norm unless it is None.

    A skipped step is counted in `skipped_ptr`, int64 or None.
    """
    tl.store(control_ptr, factor)
    tl.store(control_ptr + 1, skip.to(tl.float64))
    if norm is not None:
        tl.store(control_ptr + 2, norm)
    if skipped_ptr is not None:
        tl.store(skipped_ptr, tl.load(skipped_ptr) + skip.to(tl.int64))


@triton.jit(do_not_specialize=["first", "n_partials"])
def grad_norm_kernel(
    grads_ptr,
    numels_ptr,
    spans_ptr,
    first: tl.int32,
    partials_ptr,
    n_partials: tl.int32,
    finished_ptr,
    control_ptr,
    skipped_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    max_grad_norm: tl.float64,
    skip_grad_norm_above: tl.float64,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Norm of the gradients of a table; one program for each span of SPAN_BLOCKS * BLOCK_SIZE elements.

    grads_ptr     int64 [n_tensors]    addresses, 0 where there is no gradient
    numels_ptr    int64 [n_tensors]    elements of each
    spans_ptr     int32 [n_spans, 2]   tensor, span within that tensor
    first         index of this launch's first partial sum: gradients of several dtypes take several launches
    partials_ptr  float64 [n_partials + 1] sums of squares, of all launches
    finished_ptr   int32                programs that have finished; 0 before and after

    Other arguments are those of `decide` and `write_control`, numbers only with CLIP and SKIP; without a control_ptr
    only the sum of all squares is made, at partials_ptr[n_partials]. ALIGNED promises that addresses are multiples of
    16 bytes.
    """
    IS_DOUBLE: tl.constexpr = GRAD_DTYPE == tl.float64
    DTYPE: tl.constexpr = tl.float64 if IS_DOUBLE else tl.float32
    span_ptr = spans_ptr + 2 * tl.program_id(0).to(tl.int64)
    tensor = tl.load(span_ptr)
    start = tl.load(span_ptr + 1).to(tl.int64) * (SPAN_BLOCKS * BLOCK_SIZE)
    address = tl.load(grads_ptr + tensor)
    ptr = address.to(tl.pointer_type(GRAD_DTYPE))
    if ALIGNED:
        ptr = tl.multiple_of(ptr, 16)
    remaining = tl.where(address == 0, 0, tl.load(numels_ptr + tensor) - start)
    ptr += start

    total, largest = _sum_of_squares(ptr, remaining, None, DTYPE, BLOCK_SIZE)
    if not IS_DOUBLE:
        if (not ((total >= _SMALLEST_SUM) & (total < float("inf")))) & (largest > 0.0):
            scale = tl.where(largest > 1.0, _DOWN, _UP)
            total, _ = _sum_of_squares(ptr, remaining, scale, DTYPE, BLOCK_SIZE)
            total = total / scale.to(tl.float64) / scale.to(tl.float64)
    tl.store(partials_ptr + first + tl.program_id(0), total)

    tl.debug_barrier()  # whoever stored the sum, the arrival comes after
    if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == n_partials - 1:
        tl.store(finished_ptr, 0)
        offsets = tl.arange(0, 1024)
        sums = tl.zeros((1024,), tl.float64)
        begin = n_partials * 0
        while begin < n_partials:
            index = begin + offsets
            sums += tl.load(partials_ptr + index, mask=index < n_partials, other=0.0, cache_modifier=".cg")
            begin += 1024
        total = tl.sum(sums, axis=0)
        if control_ptr is None:
            tl.store(partials_ptr + n_partials, total)
        else:
            factor, skip, norm = decide(
                total,
                grad_scale_ptr,
                found_inf_ptr,
                max_grad_norm if CLIP else None,
                skip_grad_norm_above if SKIP else None,
            )
            write_control(control_ptr, skipped_ptr, factor, skip, norm)
