"""Device functions that several kernels share: order of tiles, products, logits, exponentials.

Logits are held in units of log 2, ``y = z / log 2``, so that an exponential is one instruction; ``LOG2E * z = y``.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)

# A sum of exponentials of raw logits between these needs no maximum: all of them are finite, and the largest is far
# enough from the smallest normal number, 2^-126, that what underflows beside it is below fp32's resolution.
LEAST_PLAIN_SUM: tl.constexpr = tl.constexpr(2.0**-90)
LARGEST_PLAIN_SUM: tl.constexpr = tl.constexpr(2.0**120)


@triton.jit
def tile_position(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column tile of a linear index: GROUP row tiles go down before the next column, so that L2 serves both."""
    per_group = GROUP * column_tiles
    first = tile // per_group * GROUP
    rows = min(row_tiles - first, GROUP)
    inside = tile % per_group
    return first + inside % rows, inside // rows


@triton.jit
def nearest_tf32(x):
    """fp32 values rounded to tf32's ten bits, halves away from zero.

    The matrix unit drops the other bits, which shrinks every logit by 0.05 % or so: a loss of 10 by 3e-3.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN's bits could overflow


@triton.jit
def multiply_add(x, w, products, PRECISION: tl.constexpr):
    """``products + x w^T``, operands rounded to tf32 where PRECISION says so."""
    if PRECISION == "tf32":
        x = nearest_tf32(x)
        w = nearest_tf32(w)
    return tl.dot(x, w.T, products, input_precision=PRECISION)


@triton.jit
def tanh(u):
    """Hyperbolic tangent to about 2 ulp: a polynomial near 0, where the quotient of exponentials would cancel."""
    square = u * u
    series = -0.006274184677749872 * square + 0.021071642637252808
    series = series * square - 0.053852301090955734
    series = series * square + 0.13332585990428925
    series = series * square - 0.33333316445350647
    near = u + u * square * series
    far = 1 - 2 / (tl.exp2(2 * LOG2E * tl.abs(u)) + 1)
    far = tl.where(u < 0, -far, far)
    return tl.where(tl.abs(u) < 0.55, near, far)


@triton.jit
def logits(products, bias, first, vocabulary, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """[R, U] products to logits in units of log 2: scale or [R, 1] scales, bias, cap; ``first`` is the first column."""
    if BIAS:
        columns = first + tl.arange(0, products.shape[1])
        shift = tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
        y = (products * scale + shift[None, :]) * LOG2E
    else:
        y = products * (scale * LOG2E)
    if SOFTCAP:
        y = tanh(y * (LN2 / softcap)) * (softcap * LOG2E)
    return y


@triton.jit
def cap_derivative(y, softcap):
    """Derivative of the cap at logits in units of log 2."""
    ratio = y * (LN2 / softcap)
    return 1 - ratio * ratio


@triton.jit
def mask_columns(values, first, vocabulary, other):
    """``other`` in the columns beyond the vocabulary."""
    columns = first + tl.arange(0, values.shape[1])
    return tl.where(columns[None, :] < vocabulary, values, other)


@triton.jit
def in_blocks(values, BLOCK: tl.constexpr):
    """[R, U] to [R * U / BLOCK, BLOCK]: each row's blocks of columns as rows of their own."""
    return tl.reshape(values, (values.shape[0] * (values.shape[1] // BLOCK), BLOCK))


@triton.jit
def finite_maximum(y):
    """[R] largest of each row, and 0 for rows of -inf alone, so that subtracting it never gives NaN."""
    peak = tl.max(y, 1)
    return tl.where(peak == -float("inf"), 0.0, peak)


# Few tiles overhang the vocabulary. The two functions below mask in branches that yield one number a row, so that no
# select reaches the other tiles; a branch that yields the masked tile is turned into one.


@triton.jit
def log_sum_exp(y, first, vocabulary, BLOCK: tl.constexpr):
    """[R * U / BLOCK] log2 of each block's sum of 2^y.

    The plain sum is tried first; where a block's is out of range, and in tiles that overhang the vocabulary, the tile's
    sums are formed again against maxima. That saves a comparison for each logit and gives the same digits: a
    floating-point sum does not depend on a common power of two.
    """
    total = tl.sum(in_blocks(tl.exp2(y), BLOCK), 1)
    result = tl.log2(total)
    plain = tl.min(((total > LEAST_PLAIN_SUM) & (total < LARGEST_PLAIN_SUM)).to(tl.int32), 0) > 0
    if (first + y.shape[1] > vocabulary) | (not plain):
        z = in_blocks(mask_columns(y, first, vocabulary, -float("inf")), BLOCK)
        peak = finite_maximum(z)
        result = peak + tl.log2(tl.sum(tl.exp2(z - peak[:, None]), 1))
    return result


@triton.jit
def softmax_in_tile(y, first, vocabulary):
    """Softmax of each row within the tile, and [R] its log2-sum-exp. Columns beyond the vocabulary are undefined."""
    peak = finite_maximum(y)
    if first + y.shape[1] > vocabulary:
        peak = finite_maximum(mask_columns(y, first, vocabulary, -float("inf")))
    power = tl.exp2(y - peak[:, None])
    total = tl.sum(power, 1)
    if first + y.shape[1] > vocabulary:
        total = tl.sum(mask_columns(power, first, vocabulary, 0.0), 1)
    inverse = tl.where(total == 0, 0.0, 1 / total)
    return power * inverse[:, None], peak + tl.log2(total)
