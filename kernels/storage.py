"""How each kind of stored value is read to fp32 and written from it; fp64 only as itself.

Master weights. The fp32 weight is split by integer arithmetic on its bits: a bf16 parameter is the high half,
rounded half away from zero, and a remainder what is left, bits - (high << 16). With 16 bits that is exact; with 8
the bits are first rounded to a multiple of 2^8. An fp16 parameter has its fp32 master beside it, which it is rounded
from: where it is not, it was written by others than the step (a checkpoint, say), and is the weight to go on from.

8-bit moments. GROUP_SIZE consecutive elements share one fp32 scale. exp_avg is sign * 127 sqrt(|m| / scale), scale the
largest |m|; exp_avg_sq is 255 sqrt(sqrt(v) / scale), scale the largest sqrt(v), and at least 4: a v that is lost
while its m is not throws its weight away, and where both have their smallest codes it may not move far. Rounded
stochastically, what is less than 4 becomes 4 or 5: with 4 alone, where gradients have magnitudes of 1e-9 to 1, weights
moved up to twice as far as in fp32. Both are decoded by multiplications, and sqrt(v) is what the update computes
anyway.

Stochastic rounding to bf16 adds random bits below the last one that is kept and truncates. A code goes up to the next
with the probability that makes the mean of the decoded values exact: rounded to nearest, a v that shrinks by 0.1 % a
step, or an m of few codes, stays where it is for ever. Codes of both moments are rounded by the same bits: their ratio
is what moves a weight, and errors of one sign cancel in it. The bits are Philox4x32 (Salmon et al.,
https://doi.org/10.1145/2063384.2063405), keyed on the seed and counted by update, parameter and index of the element in
the whole parameter; 128 of them serve 8 elements.
"""

import triton
import triton.language as tl

GROUP_SIZE: tl.constexpr = tl.constexpr(128)
MAX_WIDTH: tl.constexpr = tl.constexpr(8)  # consecutive elements of one thread of 128
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)  # the fewest that pass BigCrush, says the paper

# A little above 127² and 255²: whatever is rounded up or down on the way, the largest element has the largest code.
_LARGEST_SQUARED: tl.constexpr = tl.constexpr(127 * 127 * (1 + 2**-20))
_LARGEST_ROOT: tl.constexpr = tl.constexpr(255 * 255 * (1 + 2**-20))
_SMALLEST_SQUARED: tl.constexpr = tl.constexpr(16.0001)  # of codes of exp_avg_sq, 4²: what is above 3.5 for every u
_BELOW_SQUARED: tl.constexpr = tl.constexpr(4.5 * 4.5)  # what is rounded stochastically instead of less, to 4 or 5
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
def _per_element(of_piece, BLOCK_SIZE: tl.constexpr):
    """Give each element of a block what its piece has."""
    PIECES: tl.constexpr = of_piece.shape[0]
    wide = tl.broadcast_to(tl.expand_dims(of_piece, 1), (PIECES, BLOCK_SIZE // PIECES))
    return tl.reshape(wide, (BLOCK_SIZE,))


@triton.jit
def _load_scale(scale_ptr, remaining, BLOCK_SIZE: tl.constexpr):
    """Load the scale of each piece of WIDTH elements: a thread those of its own, so that nothing moves between them."""
    WIDTH: tl.constexpr = min(MAX_WIDTH, BLOCK_SIZE // 128)
    first = tl.arange(0, BLOCK_SIZE // WIDTH) * WIDTH
    ptrs = scale_ptr + first // GROUP_SIZE
    return tl.load(ptrs) if remaining is None else tl.load(ptrs, mask=first < remaining)


@triton.jit
def _store_scale(scale_ptr, scale, remaining, BLOCK_SIZE: tl.constexpr):
    """Store the scale of each group, by the thread that has its first element.

    It can overwrite none that is still to be read: every thread of the group has made its part of the new scale of the
    old one.
    """
    WIDTH: tl.constexpr = min(MAX_WIDTH, BLOCK_SIZE // 128)
    PIECES: tl.constexpr = BLOCK_SIZE // WIDTH
    # The largest of WIDTH values that are one: no instruction.
    of_piece = tl.max(tl.reshape(_per_element(scale, BLOCK_SIZE), (PIECES, WIDTH)), axis=1)
    first = tl.arange(0, PIECES) * WIDTH
    mask = first % GROUP_SIZE == 0
    if remaining is not None:
        mask &= first < remaining
    tl.store(scale_ptr + first // GROUP_SIZE, of_piece, mask=mask)


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
def _per_scale(scale, LARGEST: tl.constexpr):
    """LARGEST / scale."""
    rsqrt = tl.rsqrt(tl.maximum(scale, _SMALLEST_SCALE))
    return rsqrt * LARGEST * rsqrt


@triton.jit
def _centred(noise):
    """16 random bits as a number u - 1/2 in (-1/2, 1/2]; a u of 0 would round up whatever is not 0 at times."""
    return (noise | 0x43000000).to(tl.float32, bitcast=True) - (128.5 - 2**-16)  # lowest bits of a float in [128, 129)


@triton.jit
def store_exp_avg(ptr, scale_ptr, offsets, value, noise, mask, remaining, EVICTION: tl.constexpr):
    if scale_ptr is None:
        store(ptr, offsets, value, noise, mask, EVICTION)
    else:
        BLOCK_SIZE: tl.constexpr = offsets.shape[0]
        magnitude = tl.abs(value)
        scale = _largest(magnitude, mask, BLOCK_SIZE)
        per_scale = _per_element(_per_scale(scale, _LARGEST_SQUARED), BLOCK_SIZE)
        if noise is None:
            squared = value * per_scale
            code = tl.fma(squared, tl.rsqrt(tl.abs(squared) + _NOT_ZERO), _ROUND)
        else:
            # Up from c where u ((c + 1)² - c²) < y² - c², that is where c < sqrt(y² - u (1 - u)) - u.
            centred = _centred(noise)
            squared = tl.fma(centred, centred, tl.fma(magnitude, per_scale, -0.25))
            squared = tl.maximum(squared, _NOT_ZERO)
            code = tl.minimum(tl.fma(squared, tl.rsqrt(squared), centred * -1.0), 127.0)
            sign = value.to(tl.int32, bitcast=True) & -0x80000000
            code = (code.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True) + _ROUND
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
        per_scale = _per_element(_per_scale(scale, _LARGEST_ROOT), BLOCK_SIZE)
        squared = root * per_scale
        if noise is None:
            squared = tl.maximum(squared, _SMALLEST_SQUARED)
            code = tl.fma(squared, tl.rsqrt(squared), _ROUND)
        else:
            squared = tl.where(squared >= _SMALLEST_SQUARED, squared, _BELOW_SQUARED)
            # Up from c where u ((c + 1)⁴ - c⁴) < y⁴ - c⁴: for large c where c < sqrt(y² - 3 u (1 - u)) - u, and with a
            # term in 1 / y², which was fitted, to 4e-4 of the probability from c = 4 on.
            centred = _centred(noise)
            spread = tl.fma(centred, centred, -0.25)
            squared = tl.fma(spread, 3.0, squared)
            rsqrt = tl.rsqrt(squared)
            shift = tl.fma(spread * (rsqrt * rsqrt), tl.fma(centred, -1.94, -0.08), centred * -1.0)
            code = tl.minimum(tl.fma(squared, rsqrt, shift), 255.0) + _ROUND
        tl.store(ptr + offsets, code.to(tl.int32, bitcast=True).to(tl.uint8), mask=mask, eviction_policy=EVICTION)
        _store_scale(scale_ptr, scale, remaining, BLOCK_SIZE)


@triton.jit
def _rows_before(index, start, row_size, UNIT: tl.constexpr):
    """The row of row_size elements in which each is that lies index * UNIT after element `start`, both in UNITs."""
    if UNIT == 8:  # a rank has less than 2^35 elements; 64 bits are divided by a function that is called
        first_row = ((start // UNIT).to(tl.uint32) // (row_size // UNIT).to(tl.uint32)).to(tl.int64)
    else:
        first_row = start // row_size
    in_first_row = tl.minimum(((first_row + 1) * row_size - start) // UNIT, 1 << 30).to(tl.int32)
    beyond = tl.maximum(index - in_first_row, -1)
    size = tl.minimum(row_size // UNIT, 1 << 30).to(tl.int32)
    return first_row, (beyond + size) // size


@triton.jit
def _index_in_whole(index, start, rounding, UNIT: tl.constexpr):
    """Index in the whole parameter, in UNITs of elements, of what lies `index` UNITs after element `start`.

    Args:
        index: int32.
        start: index of the block's first element in the tensor.
        rounding: seed, stream, element_offset, row_size and row_stride: of a tensor that is a part of the parameter,
            elements of row_size lie in one piece, such pieces row_stride apart; in one piece all where row_size is 0.
    """
    _, _, element_offset, row_size, row_stride = rounding
    first = (start + element_offset) // UNIT
    whole = first + index
    if row_size != 0:
        gap = (row_stride - row_size) // UNIT
        first_row, rows = _rows_before(index, start, row_size, UNIT)
        whole = (first + first_row * gap) + index + rows * gap
    return whole


@triton.jit
def _noise_of_words(word, other, is_odd):
    of_param = tl.where(is_odd, word >> 16, word & 0xFFFF)
    # The high half of an odd multiple depends on all bits of the word, and on others than another multiple's.
    of_exp_avg = word * tl.where(is_odd, 0x9E3779B1, 0x85EBCA77).to(tl.uint32) >> 16
    of_exp_avg_sq = other * tl.where(is_odd, 0xC2B2AE3D, 0x27D4EB2F).to(tl.uint32) >> 16
    return of_param.to(tl.int32), of_exp_avg.to(tl.int32), of_exp_avg_sq.to(tl.int32)


@triton.jit
def _noise_of_eighths(seed, step, stream, low, high, lane, param, BLOCK_SIZE: tl.constexpr):
    """Words for 8 elements at a time, or one where `low` and `high`, of the counters, are given for each."""
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, zero + high, zero + step, zero + stream, PHILOX_ROUNDS)
    if param is not None:
        # 0 times what is not finite is NaN, and NaN is not 0.
        finite = tl.expand_dims(tl.sum(tl.reshape(param * 0.0, (BLOCK_SIZE // 8, 8)), axis=1), 1) == 0.0
        w0, w1 = tl.where(finite, w0, 0), tl.where(finite, w1, 0)
        w2, w3 = tl.where(finite, w2, 0), tl.where(finite, w3, 0)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    other = tl.where(lane < 4, tl.where(lane < 2, w1, w2), tl.where(lane < 6, w3, w0))
    return _noise_of_words(word, other, (lane & 1) == 1)


@triton.jit
def _noise_of_part(rounding, step, stream, start, index, lane, param, BLOCK_SIZE: tl.constexpr):
    """Bits by the index in the whole parameter: of the eighths `index`, or without `lane` of elements."""
    if lane is not None:
        counter = _index_in_whole(index, start, rounding, 8)
    else:
        whole = _index_in_whole(index, start, rounding, 1)
        counter, lane = whole >> 3, (whole & 7).to(tl.int32)
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    return _noise_of_eighths(rounding[0], step, stream, low, high, lane, param, BLOCK_SIZE)


@triton.jit
def noise_of(rounding, step, start, param, BLOCK_SIZE: tl.constexpr, ROUNDING: tl.constexpr):
    """16 random bits for each element of a block and each of parameter, exp_avg and exp_avg_sq.

    Args:
        rounding: of `_index_in_whole`.
        step: number of this update.
        start: index of the block's first element in the tensor.
        param: if given, all bits of 8 elements one of which is not finite are 0: added to a bf16 NaN's they would make
            it a number.
        ROUNDING: as for the kernels, and not "nearest".
    """
    seed, stream, element_offset, row_size, row_stride = rounding
    step, stream = step.to(tl.uint32), tl.cast(stream, tl.uint32)
    eighth = tl.expand_dims(tl.arange(0, BLOCK_SIZE // 8), 1)
    lane = tl.expand_dims(tl.arange(0, 8), 0)
    if ROUNDING == "stochastic":
        counter = eighth.to(tl.uint32) + (start >> 3).to(tl.uint32)
        high = (start >> 35).to(tl.uint32)
        noise = _noise_of_eighths(seed, step, stream, counter, high, lane, param, BLOCK_SIZE)
    elif ROUNDING == "stochastic part":
        noise = _noise_of_part(rounding, step, stream, start, eighth, lane, param, BLOCK_SIZE)
    elif ((element_offset | row_size | row_stride) & 7) == 0:
        noise = _noise_of_part(rounding, step, stream, start, eighth, lane, param, BLOCK_SIZE)
    else:  # a call for each element, which is slower
        noise = _noise_of_part(rounding, step, stream, start, eighth * 8 + lane, None, param, BLOCK_SIZE)
    of_param, of_exp_avg, of_exp_avg_sq = noise
    return (
        tl.reshape(of_param, (BLOCK_SIZE,)),
        tl.reshape(of_exp_avg, (BLOCK_SIZE,)),
        tl.reshape(of_exp_avg_sq, (BLOCK_SIZE,)),
    )
