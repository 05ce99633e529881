"""Sums of squares of what is written and of its change, from what is in registers."""

import triton
import triton.language as tl

STATISTICS_ROWS: tl.constexpr = tl.constexpr(16)  # of eight threads each, of 128


@triton.jit
def _row_sums(value, mask, FOLD: tl.constexpr):
    """Sums of squares of rows of FOLD elements, to which the others of the block are added; given to each element."""
    ROWS: tl.constexpr = STATISTICS_ROWS
    if mask is not None:
        value = tl.where(mask, value, 0.0)
    squares = tl.sum(tl.reshape(value * value, (value.shape[0] // FOLD, FOLD)), axis=0)
    sums = tl.expand_dims(tl.sum(tl.reshape(squares, (ROWS, FOLD // ROWS)), axis=1), 1)
    return tl.reshape(tl.broadcast_to(sums, (ROWS, FOLD // ROWS)), (FOLD,)).to(tl.float32)


@triton.jit
def store_statistics(statistics_ptr, change, param, mask, WIDTH: tl.constexpr):
    """Store sums of squares of both, twice in each row.

    A thread has WIDTH consecutive elements: what those of the first thread of a row store are the 16 bytes that it
    writes, so that nothing moves between threads but sums within a row. Eight elements are halves of the numbers then.
    """
    FOLD: tl.constexpr = 128 * WIDTH
    index = tl.arange(0, FOLD)
    changes, params = _row_sums(change, mask, FOLD), _row_sums(param, mask, FOLD)
    if WIDTH == 8:
        bits = tl.where(index % 4 < 2, changes, params).to(tl.int32, bitcast=True)
        stored = tl.where(index % 2 == 0, bits, bits >> 16).to(tl.int16)
        statistics_ptr = statistics_ptr.to(tl.pointer_type(tl.int16))
    else:
        stored = tl.where(index % 2 == 0, changes, params)
    ROW_SIZE: tl.constexpr = FOLD // STATISTICS_ROWS
    ptrs = statistics_ptr + index // ROW_SIZE * WIDTH + index % WIDTH
    tl.store(ptrs, stored, mask=index % ROW_SIZE < WIDTH)


@triton.jit
def store_no_statistics(statistics_ptr, control_ptr):
    """Store zeros as this program's sums, unless the step is skipped."""
    if control_ptr is not None:
        if tl.load(control_ptr + 1) != 0.0:
            return
    index = tl.arange(0, STATISTICS_ROWS * 4)
    tl.store(statistics_of_program(statistics_ptr) + index, tl.zeros((STATISTICS_ROWS * 4,), tl.float32))


@triton.jit
def statistics_of_program(statistics_ptr):
    return statistics_ptr + tl.program_id(0).to(tl.int64) * (STATISTICS_ROWS * 4)
