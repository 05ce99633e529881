"""From hyper-parameters and step counts in memory to the numbers that kernels/adamw.py takes, once per step.

A row is what parameters with the same hyper-parameters and the same count share. In fp64, as on the host.
"""

import triton
import triton.language as tl

from .grad_norm import write_control

COLUMNS: tl.constexpr = tl.constexpr(12)


@triton.jit
def _hyper(row_ptr, column: tl.constexpr, address_column: tl.constexpr):
    """A number in the row, or where the row says that it is."""
    value = tl.load(row_ptr + column).to(tl.float64, bitcast=True)
    address = tl.load(row_ptr + address_column)
    if address != 0:
        if (address & 1) == 1:
            value = tl.load((address - 1).to(tl.pointer_type(tl.float64)))
        else:
            value = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return value


@triton.jit
def _power(base, exponent):
    """base^exponent for 0 <= base < 1 and exponent >= 1."""
    return tl.where(base > 0.0, tl.exp2(exponent * tl.log2(tl.where(base > 0.0, base, 1.0))), 0.0)


@triton.jit
def scalars_kernel(
    rows_ptr,
    steps_ptr,
    scalars_ptr,
    control_ptr,
    skipped_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    KNOWN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Count the update and write its scalars; one program for each row.

    rows_ptr     int64 [n_rows, 12]   as bits of float64: lr, beta1, beta2, eps, weight_decay, decay_lr; addresses of
                                      lr, beta1, beta2 and weight_decay, 0 for the number itself, plus 1 where a
                                      float64 lies there and no float32; first and last + 1 of the row's counts
    steps_ptr    float32 [n_params]   updates so far; counted up unless the step is skipped
    scalars_ptr  float64 [n_rows, 8]  written: see kernels/adamw.py
    control_ptr  float64 [2 or more]  factor and flag: read where they are KNOWN, else written; or None
    other pointers                    of `write_control`
    """
    row = tl.program_id(0)
    row_ptr = rows_ptr + row * COLUMNS
    first = tl.load(row_ptr + 10)
    end = tl.load(row_ptr + 11)
    lr = _hyper(row_ptr, 0, 6)
    beta1 = _hyper(row_ptr, 1, 7)
    beta2 = _hyper(row_ptr, 2, 8)
    eps = tl.load(row_ptr + 3).to(tl.float64, bitcast=True)
    weight_decay = _hyper(row_ptr, 4, 9)
    decay_lr = tl.load(row_ptr + 5).to(tl.float64, bitcast=True)
    step = tl.load(steps_ptr + first) + 1.0
    t = step.to(tl.float64)

    skip = False
    if control_ptr is not None:
        if KNOWN:
            skip = tl.load(control_ptr + 1) != 0.0
        else:
            if found_inf_ptr is not None:
                skip = tl.load(found_inf_ptr) != 0.0
            if row == 0:
                write_control(control_ptr, skipped_ptr, None, grad_scale_ptr, found_inf_ptr, None, None)

    out_ptr = scalars_ptr + row * 8
    tl.store(out_ptr + 0, 1.0 - lr * weight_decay / decay_lr)
    tl.store(out_ptr + 1, tl.where(beta1 > 0.5, 1.0 - beta1, 0.0 - beta1))
    tl.store(out_ptr + 2, beta2)
    tl.store(out_ptr + 3, 1.0 - beta2)
    tl.store(out_ptr + 4, (0.0 - lr) / (1.0 - _power(beta1, t)))
    tl.store(out_ptr + 5, 1.0 / tl.sqrt(1.0 - _power(beta2, t)))
    tl.store(out_ptr + 6, eps)
    tl.store(out_ptr + 7, t)
    if not skip:
        tl.debug_barrier()  # all warps have read the row's count, which the first one now changes
        while first < end:  # not range, whose bounds Triton 3.4's interpreter cannot read from memory
            index = first + tl.arange(0, BLOCK_SIZE)
            tl.store(steps_ptr + index, tl.zeros((BLOCK_SIZE,), tl.float32) + step, mask=index < end)
            first += BLOCK_SIZE
