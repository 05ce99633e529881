"""How each kind of stored value is read to fp32 and written from it; fp64 only as itself.

Master weights. The fp32 weight is split by integer arithmetic on its bits: a bf16 parameter is the high half,
rounded half away from zero, and a remainder what is left, bits - (high << 16). With 16 bits that is exact; with 8
the bits are first rounded to a multiple of 2^8. An fp16 parameter has its fp32 master beside it, which it is rounded
from: where it is not, it was written by others than the step (a checkpoint, say), and is the weight to go on from.

8-bit moments. GROUP_SIZE consecutive elements share one fp32 scale. exp_avg is sign * 127 sqrt(|m| / scale), scale the
largest |m|; exp_avg_sq is 255 sqrt(sqrt(v) / scale), scale the largest sqrt(v), and at least 1: a v that is lost
while its m is not throws its weight away. Both are decoded by multiplications, and sqrt(v) is what the update
computes anyway.

Stochastic rounding adds random bits below the last one that is kept and truncates. The bits are Philox4x32 (Salmon
et al., https://doi.org/10.1145/2063384.2063405), keyed on the seed and counted by update, parameter and index of the
element in the whole parameter; 128 of them serve 8 elements.
"""

import triton
import triton.language as tl

GROUP_SIZE: tl.constexpr = tl.constexpr(128)
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)  # the fewest that pass BigCrush, says the paper

# Added to a float in [-2^22, 2^22], it rounds to an integer that stands in the lowest bits.
_ROUND: tl.constexpr = tl.constexpr(12582912.0)
_NOT_ZERO: tl.constexpr = tl.constexpr(1e-30)  # whose reciprocal root is finite
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(1e-33)  # smaller ones lose codes: 255² / scale must be finite


@triton.jit
def load(ptr, offsets, mask, DTYPE: tl.constexpr, EVICTION: tl.constexpr):
    return tl.load(ptr + offsets, mask=mask, eviction_policy=EVICTION).to(DTYPE)


@triton.jit
def store(ptr, offsets, value, noise, mask, EVICTION: tl.constexpr):
    """Store as whatever `ptr` points to; bf16 is rounded stochastically where there is `noise`, 16 bits for each."""
    if noise is not None and ptr.dtype.element_ty == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True) + noise
        stored = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        stored = value.to(ptr.dtype.element_ty)
    tl.store(ptr + offsets, stored, mask=mask, eviction_policy=EVICTION)


@triton.jit
def load_param(param_ptr, master_ptr, offsets, mask, DTYPE: tl.constexpr, EVICTION: tl.constexpr):
    if master_ptr is None:
        param = load(param_ptr, offsets, mask, DTYPE, EVICTION)
    elif master_ptr.dtype.element_ty == tl.float32:
        master = load(master_ptr, offsets, mask, DTYPE, EVICTION)
        stored = tl.load(param_ptr + offsets, mask=mask, eviction_policy=EVICTION)
        BITS: tl.constexpr = tl.int16 if stored.dtype.primitive_bitwidth == 16 else tl.int32
        untouched = master.to(stored.dtype).to(BITS, bitcast=True) == stored.to(BITS, bitcast=True)
        param = tl.where(untouched, master, stored.to(DTYPE))
    else:
        high = tl.load(param_ptr + offsets, mask=mask, eviction_policy=EVICTION).to(tl.int16, bitcast=True)
        remainder = tl.load(master_ptr + offsets, mask=mask, eviction_policy=EVICTION)
        shift: tl.constexpr = 16 - remainder.dtype.primitive_bitwidth
        bits = (high.to(tl.int32) << 16) + (remainder.to(tl.int32) << shift)
        param = bits.to(tl.float32, bitcast=True)
    return param


@triton.jit
def store_param(param_ptr, master_ptr, offsets, value, noise, mask, EVICTION: tl.constexpr):
    if master_ptr is None:
        store(param_ptr, offsets, value, noise, mask, EVICTION)
    elif master_ptr.dtype.element_ty == tl.float32:
        store(param_ptr, offsets, value, None, mask, EVICTION)
        store(master_ptr, offsets, value, None, mask, EVICTION)
    else:
        # A carry out of a NaN's ones would make it -0.0.
        bits = tl.where(value == value, value.to(tl.int32, bitcast=True), 0x7FC00000)
        shift: tl.constexpr = 16 - master_ptr.dtype.element_ty.primitive_bitwidth
        if shift > 0:
            bits += 0x80 if noise is None else noise >> 8
        high = (bits + 0x8000) >> 16
        remainder = (bits - (high << 16)) >> shift
        stored = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(param_ptr + offsets, stored, mask=mask, eviction_policy=EVICTION)
        tl.store(master_ptr + offsets, remainder.to(master_ptr.dtype.element_ty), mask=mask, eviction_policy=EVICTION)


@triton.jit
def _per_element(of_group, BLOCK_SIZE: tl.constexpr):
    wide = tl.broadcast_to(tl.expand_dims(of_group, 1), (BLOCK_SIZE // GROUP_SIZE, GROUP_SIZE))
    return tl.reshape(wide, (BLOCK_SIZE,))


@triton.jit
def _load_scale(scale_ptr, remaining, BLOCK_SIZE: tl.constexpr):
    groups = tl.arange(0, BLOCK_SIZE // GROUP_SIZE)
    if remaining is None:
        scale = tl.load(scale_ptr + groups)
    else:
        scale = tl.load(scale_ptr + groups, mask=groups * GROUP_SIZE < remaining)
    return scale


@triton.jit
def _store_scale(scale_ptr, scale, remaining, BLOCK_SIZE: tl.constexpr):
    groups = tl.arange(0, BLOCK_SIZE // GROUP_SIZE)
    if remaining is None:
        tl.store(scale_ptr + groups, scale)
    else:
        tl.store(scale_ptr + groups, scale, mask=groups * GROUP_SIZE < remaining)


@triton.jit
def load_exp_avg(ptr, scale_ptr, offsets, mask, remaining, DTYPE: tl.constexpr, EVICTION: tl.constexpr):
    exp_avg = load(ptr, offsets, mask, DTYPE, EVICTION)
    if scale_ptr is not None:
        BLOCK_SIZE: tl.constexpr = offsets.shape[0]
        unit = _load_scale(scale_ptr, remaining, BLOCK_SIZE) * (1.0 / (127 * 127))
        exp_avg = exp_avg * tl.abs(exp_avg) * _per_element(unit, BLOCK_SIZE)
    return exp_avg


@triton.jit
def load_exp_avg_sq(ptr, scale_ptr, offsets, mask, remaining, DTYPE: tl.constexpr, EVICTION: tl.constexpr):
    exp_avg_sq = load(ptr, offsets, mask, DTYPE, EVICTION)
    if scale_ptr is not None:
        BLOCK_SIZE: tl.constexpr = offsets.shape[0]
        unit = _load_scale(scale_ptr, remaining, BLOCK_SIZE) * (1.0 / (255 * 255))
        root = exp_avg_sq * exp_avg_sq * _per_element(unit, BLOCK_SIZE)
        exp_avg_sq = root * root
    return exp_avg_sq


@triton.jit
def _largest(magnitude, mask, BLOCK_SIZE: tl.constexpr):
    """The largest of each group of magnitudes >= 0."""
    if mask is not None:
        magnitude = tl.where(mask, magnitude, 0.0)
    return tl.max(tl.reshape(magnitude, (BLOCK_SIZE // GROUP_SIZE, GROUP_SIZE)), axis=1)


@triton.jit
def store_exp_avg(ptr, scale_ptr, offsets, value, noise, mask, remaining, EVICTION: tl.constexpr):
    if scale_ptr is None:
        store(ptr, offsets, value, noise, mask, EVICTION)
    else:
        BLOCK_SIZE: tl.constexpr = offsets.shape[0]
        scale = _largest(tl.abs(value), mask, BLOCK_SIZE)
        per_scale = 127.0 * 127.0 / tl.maximum(scale, _SMALLEST_SCALE)
        squared = value * _per_element(per_scale, BLOCK_SIZE)
        code = tl.fma(squared, tl.rsqrt(tl.abs(squared) + _NOT_ZERO), _ROUND)
        # The lowest byte of a negative integer is its code too.
        tl.store(ptr + offsets, code.to(tl.int32, bitcast=True).to(tl.int8), mask=mask, eviction_policy=EVICTION)
        _store_scale(scale_ptr, scale, remaining, BLOCK_SIZE)


@triton.jit
def store_exp_avg_sq(ptr, scale_ptr, offsets, value, root, noise, mask, remaining, EVICTION: tl.constexpr):
    """`root` is sqrt(value)."""
    if scale_ptr is None:
        store(ptr, offsets, value, noise, mask, EVICTION)
    else:
        BLOCK_SIZE: tl.constexpr = offsets.shape[0]
        scale = _largest(root, mask, BLOCK_SIZE)
        per_scale = 255.0 * 255.0 / tl.maximum(scale, _SMALLEST_SCALE)
        squared = tl.fma(root, _per_element(per_scale, BLOCK_SIZE), _NOT_ZERO)
        code = tl.maximum(tl.fma(squared, tl.rsqrt(squared), _ROUND), _ROUND + 1.0)
        tl.store(ptr + offsets, code.to(tl.int32, bitcast=True).to(tl.uint8), mask=mask, eviction_policy=EVICTION)
        _store_scale(scale_ptr, scale, remaining, BLOCK_SIZE)


@triton.jit
def noise_of(seed, step, stream, start, param, BLOCK_SIZE: tl.constexpr, SHIFTED: tl.constexpr):
    """16 random bits for each element of a block and each of parameter, exp_avg and exp_avg_sq.

    Args:
        start: index of the block's first element in the whole parameter.
        param: of 8 elements one of which is not finite all bits are 0: added to a NaN's they would make it a number.
        SHIFTED: whether `start` may be other than a multiple of 8.
    """
    eighth = tl.expand_dims(tl.arange(0, BLOCK_SIZE // 8), 1)
    lane = tl.expand_dims(tl.arange(0, 8), 0)
    if SHIFTED:  # the words of two eighths, which is slower
        lane += (start & 7).to(tl.int32)
        eighth += lane >> 3
        lane &= 7
    counter = eighth.to(tl.uint32) + (start >> 3).to(tl.uint32)
    zero = counter * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        counter,
        zero + (start >> 35).to(tl.uint32),
        zero + step,
        zero + stream,
        PHILOX_ROUNDS,
    )
    # 0 times what is not finite is NaN, and NaN is not 0.
    finite = tl.expand_dims(tl.sum(tl.reshape(param * 0.0, (BLOCK_SIZE // 8, 8)), axis=1), 1) == 0.0
    w0, w1, w2, w3 = tl.where(finite, w0, 0), tl.where(finite, w1, 0), tl.where(finite, w2, 0), tl.where(finite, w3, 0)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    other = tl.where(lane < 4, tl.where(lane < 2, w1, w2), tl.where(lane < 6, w3, w0))
    # An odd multiple's high half depends on all bits, its low half on the low ones. So an even element's bits
    # for exp_avg, high, are independent of those for the parameter, low, and the other way round in an odd one.
    is_odd = (lane & 1) == 1
    of_param = tl.where(is_odd, word >> 16, word & 0xFFFF)
    word *= 0x9E3779B1
    of_exp_avg = tl.where(is_odd, word & 0xFFFF, word >> 16)
    other *= 0x85EBCA77
    of_exp_avg_sq = tl.where(is_odd, other & 0xFFFF, other >> 16)
    return (
        tl.reshape(of_param, (BLOCK_SIZE,)).to(tl.int32),
        tl.reshape(of_exp_avg, (BLOCK_SIZE,)).to(tl.int32),
        tl.reshape(of_exp_avg_sq, (BLOCK_SIZE,)).to(tl.int32),
    )
