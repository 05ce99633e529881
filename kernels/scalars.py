"""From hyper-parameters and step counts in memory to the numbers that kernels/adamw.py takes, once per step.

Each parameter counts for itself, so that gradients may come and go and steps be skipped. In fp64, as on the host.
"""

import triton
import triton.language as tl

from .grad_norm import decide, write_control

HYPER_COLUMNS: tl.constexpr = tl.constexpr(10)


@triton.jit
def _hyper(row_ptrs, column: tl.constexpr, address_column: tl.constexpr, mask):
    """A number in each row, or where the row says that it is."""
    value = tl.load(row_ptrs + column, mask=mask, other=0).to(tl.float64, bitcast=True)
    address = tl.load(row_ptrs + address_column, mask=mask, other=0)
    is_double = (address & 1) == 1
    elsewhere = address != 0
    double = tl.load((address - 1).to(tl.pointer_type(tl.float64)), mask=elsewhere & is_double, other=0.0)
    single = tl.load(address.to(tl.pointer_type(tl.float32)), mask=elsewhere & (is_double == 0), other=0.0)
    return tl.where(elsewhere, tl.where(is_double, double, single.to(tl.float64)), value)


@triton.jit
def _one_minus_power(base, exponent):
    """1 - base^exponent for 0 <= base < 1 and exponent >= 1, to a few ulp also where the power is close to 1.

    With x = exponent * log(base) and u = exp(x), however rounded, it is (1 - u) x / log(u): 1 - u is exact where that
    matters, and log(u) is what x was rounded to (Kahan; Higham, Accuracy and Stability of Numerical Algorithms,
    section 1.14.1).
    """
    is_zero = base <= 0.0
    x = exponent * tl.log(tl.where(is_zero, 0.5, base))
    u = tl.exp(x)
    inside = (u > 0.0) & (u < 1.0)
    result = (1.0 - u) * x / tl.log(tl.where(inside, u, 0.5))
    result = tl.where(inside, result, tl.where(u > 0.0, 0.0 - x, 1.0))
    return tl.where(is_zero, 1.0, result)


@triton.jit
def _store_row(scalars_ptr, params, mask, s0, s1, s2, s3, s4, s5, s6, s7):
    ptrs = scalars_ptr + params * 8
    DTYPE: tl.constexpr = scalars_ptr.dtype.element_ty
    tl.store(ptrs + 0, s0.to(DTYPE), mask=mask)
    tl.store(ptrs + 1, s1.to(DTYPE), mask=mask)
    tl.store(ptrs + 2, s2.to(DTYPE), mask=mask)
    tl.store(ptrs + 3, s3.to(DTYPE), mask=mask)
    tl.store(ptrs + 4, s4.to(DTYPE), mask=mask)
    tl.store(ptrs + 5, s5.to(DTYPE), mask=mask)
    tl.store(ptrs + 6, s6.to(DTYPE), mask=mask)
    tl.store(ptrs + 7, s7.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["n_params"])
def scalars_kernel(
    params_ptr,
    grads_ptr,
    n_params: tl.int32,
    hypers_ptr,
    scalars_ptr,
    scalars64_ptr,
    control_ptr,
    skipped_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    sums_ptr,
    max_grad_norm: tl.float64,
    skip_grad_norm_above: tl.float64,
    DECIDED: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Count the update of each parameter that has a gradient, and write its scalars; one lane for each parameter.

    params_ptr    int64 [n_params, 2]    address of the parameter's count of updates, a float32; row of hypers_ptr
    grads_ptr     int64 [n_params]       address of its gradient, 0 if there is none
    hypers_ptr    int64 [n_groups, 10]   as bits of float64: lr, beta1, beta2, eps, weight_decay, decay_lr; addresses of
                                         lr, beta1, beta2 and weight_decay, 0 for the number itself, plus 1 where a
                                         float64 lies there and no float32
    scalars_ptr   float32 [n_params, 8]  written: see kernels/adamw.py
    scalars64_ptr float64 [n_params, 8]  written too, unless it is None
    control_ptr   float64 [2 or more]    factor and flag: read where it is DECIDED, else written; or None
    sums_ptr      float64 [2]            sum of squares of all ranks' gradients, number of ranks that refuse; or None
    others                               of `decide` and `write_control`, the numbers only with CLIP and SKIP

    A step that is skipped counts nothing.
    """
    params = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    exists = params < n_params
    mask = exists & (tl.load(grads_ptr + params, mask=exists, other=0) != 0)
    step_ptrs = tl.load(params_ptr + 2 * params, mask=mask, other=0).to(tl.pointer_type(tl.float32))
    group = tl.load(params_ptr + 2 * params + 1, mask=mask, other=0)
    row_ptrs = hypers_ptr + group * HYPER_COLUMNS
    lr = _hyper(row_ptrs, 0, 6, mask)
    beta1 = _hyper(row_ptrs, 1, 7, mask)
    beta2 = _hyper(row_ptrs, 2, 8, mask)
    eps = tl.load(row_ptrs + 3, mask=mask, other=0).to(tl.float64, bitcast=True)
    weight_decay = _hyper(row_ptrs, 4, 9, mask)
    decay_lr = tl.load(row_ptrs + 5, mask=mask, other=0x3FF0000000000000).to(tl.float64, bitcast=True)
    step = tl.load(step_ptrs, mask=mask, other=0.0) + 1.0
    t = step.to(tl.float64)

    skip = False
    if control_ptr is not None:
        if DECIDED:
            skip = tl.load(control_ptr + 1) != 0.0
        else:
            factor, skip, norm = decide(
                None if sums_ptr is None else tl.load(sums_ptr),
                grad_scale_ptr,
                found_inf_ptr,
                max_grad_norm if CLIP else None,
                skip_grad_norm_above if SKIP else None,
            )
            if sums_ptr is not None:
                skip = skip | (tl.load(sums_ptr + 1) != 0.0)
            if tl.program_id(0) == 0:
                write_control(control_ptr, skipped_ptr, factor, skip, norm if sums_ptr is not None else None)

    decay = 1.0 - lr * weight_decay / decay_lr
    lerp_weight = tl.where(beta1 > 0.5, 1.0 - beta1, 0.0 - beta1)
    one_minus_beta2 = 1.0 - beta2
    neg_step_size = (0.0 - lr) / _one_minus_power(beta1, t)
    inv_bias_correction2_sqrt = 1.0 / tl.sqrt(_one_minus_power(beta2, t))
    _store_row(
        scalars_ptr, params, mask,
        decay, lerp_weight, beta2, one_minus_beta2, neg_step_size, inv_bias_correction2_sqrt, eps, t,
    )  # fmt: skip
    if scalars64_ptr is not None:
        _store_row(
            scalars64_ptr, params, mask,
            decay, lerp_weight, beta2, one_minus_beta2, neg_step_size, inv_bias_correction2_sqrt, eps, t,
        )  # fmt: skip
    if not skip:
        tl.store(step_ptrs, step, mask=mask)
