"""Square root and division, to about half an ulp without calls, or approximately."""

import triton
import triton.language as tl


@triton.jit
def sqrt(x, APPROXIMATE: tl.constexpr):
    """Square root of x >= 0 to about half an ulp; 0, inf and NaN map to themselves.

    Approximate: to 2.6 ulp from 2^-126 on, and NaN of inf.
    """
    if x.dtype == tl.float64:
        root = tl.sqrt(x)
    elif APPROXIMATE:
        root = x * tl.rsqrt(tl.maximum(x, 1.1754943508222875e-38, propagate_nan=tl.PropagateNan.ALL))
    else:
        # tl.sqrt is off by up to an ulp and flushes denormals; tl.sqrt_rn branches to a subroutine. One
        # Newton step on the reciprocal root does neither. 2^±100 keeps its residual in the normal range.
        tiny = x < 7.888609052210118e-31
        scaled = tl.where(tiny, x * 1.2676506002282294e30, x)
        rsqrt = tl.rsqrt(scaled)
        root = scaled * rsqrt
        # `* -1.0`: unary minus is 0 - x, an instruction; this is an operand's sign bit.
        root = tl.fma(tl.fma(root * -1.0, root, scaled), 0.5 * rsqrt, root)
        root = tl.where(root == root, root, scaled)  # 0 * inf at both ends of the range
        root = tl.where(tiny, root * 8.881784197001252e-16, root)
    return root


@triton.jit
def divide(numerator, denominator, APPROXIMATE: tl.constexpr):
    """numerator / denominator to about half an ulp, for denominator = sqrt(fp32) * c + eps >= 0.

    Such a denominator is 0, infinite or far from the ends of fp32's range, so that squaring its
    reciprocal root is a reciprocal that needs no scaling, unlike tl's `/`, and no subroutine, unlike
    tl.div_rn. Approximate: to 5.5 ulp.
    """
    if denominator.dtype == tl.float64:
        quotient = numerator / denominator
    else:
        rsqrt = tl.rsqrt(denominator)
        reciprocal = rsqrt * rsqrt
        quotient = numerator * reciprocal
        if not APPROXIMATE:
            estimate = quotient
            residual = tl.fma(denominator * -1.0, estimate, numerator)
            quotient = tl.fma(residual, reciprocal, estimate)
            quotient = tl.where(quotient == quotient, quotient, estimate)  # denominator 0 or inf
    return quotient
