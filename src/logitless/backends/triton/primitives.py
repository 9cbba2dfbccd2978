"""Device functions that several kernels share: order of tiles, products, logits, exponentials.

Exponentials are of logits less a logit z0 of the same row, ``2^((z - z0) LOG2E)``: the difference is exact where it is
small, however large the logits are, and so is the softmax of a token that is predicted with confidence. Sums of
exponentials are kept as their log2, beside z0.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# A derivative of the cap, from a logit that is capped and rounded to fp32, is off by less.
LEAST_SLOPE: tl.constexpr = tl.constexpr(2.0**-21)


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

    Tensor cores drop the other bits, which shrinks every logit by 0.05 % or so: a loss of 10 by 3e-3.
    """
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), x)  # a NaN's bits could overflow


@triton.jit
def multiply_add(x, w, products, PRECISION: tl.constexpr):
    """``products + x w^T``, fp32 operands rounded to tf32 where PRECISION says so."""
    if PRECISION == "tf32":
        x = nearest_tf32(x)
        w = nearest_tf32(w)
    return tl.dot(x, w.T, products, input_precision=PRECISION)


@triton.jit
def left_of_tanh(u):
    """``1 - |tanh u|``, to some ulp."""
    return 2 / (tl.exp2(2 * LOG2E * tl.abs(u)) + 1)


@triton.jit
def tanh(u):
    """Hyperbolic tangent to about 2 ulp: a polynomial near 0, where the quotient of exponentials would cancel."""
    square = u * u
    series = -0.006274184677749872 * square + 0.021071642637252808
    series = series * square - 0.053852301090955734
    series = series * square + 0.13332585990428925
    series = series * square - 0.33333316445350647
    near = u + u * square * series
    far = 1 - left_of_tanh(u)
    far = tl.where(u < 0, -far, far)
    return tl.where(tl.abs(u) < 0.55, near, far)


@triton.jit
def expm1(x):
    """``e^x - 1`` to about 2 ulp: a polynomial near 0, where the difference would cancel."""
    series = 1 + x * (1 / 7)
    series = 1 + x * series * (1 / 6)
    series = 1 + x * series * (1 / 5)
    series = 1 + x * series * (1 / 4)
    series = 1 + x * series * (1 / 3)
    series = 1 + x * series * (1 / 2)
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp2(x * LOG2E) - 1)


@triton.jit
def logits_and_slope(products, bias, first, vocabulary, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """[R, U] products to logits: scale or [R, 1] scales, bias, cap; ``first`` is the first column.

    And the cap's derivative there, to some ulp however near 0 it is: of 1 - tanh^2 nothing is left where the cap
    saturates. Without a cap it is undefined.
    """
    z = products * scale
    if BIAS:
        columns = first + tl.arange(0, products.shape[1])
        shift = tl.load(bias + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
        z += shift[None, :]
    slope = z
    if SOFTCAP:
        u = z * (1 / softcap)
        z = tanh(u) * softcap
        left = left_of_tanh(u)
        slope = left * (2 - left)
    return z, slope


@triton.jit
def logits(products, bias, first, vocabulary, scale, softcap, BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """The same without the derivative."""
    z, _ = logits_and_slope(products, bias, first, vocabulary, scale, softcap, BIAS, SOFTCAP)  # pyright: ignore
    return z


@triton.jit
def least_slope(softcap, BITS: tl.constexpr):
    """What a derivative at the cap comes out as, at most, of logits that come from a probability of so many bits.

    Those are off by the probability's rounding, relative to itself, and the derivative by twice that over the cap.
    """
    if BITS < 32:
        return 2.0**-7 / softcap
    return LEAST_SLOPE


@triton.jit
def slope_at_capped(z, softcap, least):
    """The cap's derivative at logits that are capped already: ``1 - t^2``, of which ``1 - t`` is exact near the cap.

    It is off by the rounding of the logits. What is less than ``least`` is that of a logit at the cap, 0, and not a
    number that an infinite hidden state could make infinite.
    """
    ratio = z * (1 / softcap)
    slope = (1 - ratio) * (1 + ratio)
    return tl.where(slope < least, 0.0, slope)


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
def finite_maximum(z):
    """[R] largest of each row, and 0 for rows of -inf alone, so that subtracting it never gives NaN."""
    peak = tl.max(z, 1)
    return tl.where(peak == -float("inf"), 0.0, peak)


@triton.jit
def exponentials(z, peak):
    """[R, U] of the logits less each row's peak [R]."""
    return tl.exp2((z - peak[:, None]) * LOG2E)


@triton.jit
def log2_share(peak, log_sum, row_peak, row_log_sum):
    """log2 of a part's sum of exponentials as a share of its row's; the log-sums are log2, relative to the peaks."""
    return (peak - row_peak) * LOG2E + (log_sum - row_log_sum)


# Few tiles overhang the vocabulary. The two functions below mask in branches that yield one number a row, so that no
# select reaches the other tiles; a branch that yields the masked tile is turned into one.


@triton.jit
def log_sum_exp(z, first, vocabulary, BLOCK: tl.constexpr):
    """[R * U / BLOCK] peak of each block, and log2 of its sum of exponentials relative to that."""
    blocks = in_blocks(z, BLOCK)
    peak = finite_maximum(blocks)
    total = tl.sum(exponentials(blocks, peak), 1)
    if first + z.shape[1] > vocabulary:
        blocks = in_blocks(mask_columns(z, first, vocabulary, -float("inf")), BLOCK)
        peak = finite_maximum(blocks)
        total = tl.sum(exponentials(blocks, peak), 1)
    return peak, tl.log2(total)


@triton.jit
def softmax_in_tile(z, first, vocabulary):
    """Softmax of each row within the tile, [R] its peak, and log2 of its sum of exponentials relative to that.

    Columns beyond the vocabulary are undefined.
    """
    peak = finite_maximum(z)
    if first + z.shape[1] > vocabulary:
        peak = finite_maximum(mask_columns(z, first, vocabulary, -float("inf")))
    power = exponentials(z, peak)
    total = tl.sum(power, 1)
    if first + z.shape[1] > vocabulary:
        total = tl.sum(mask_columns(power, first, vocabulary, 0.0), 1)
    inverse = tl.where(total == 0, 0.0, 1 / total)
    return power * inverse[:, None], peak, tl.log2(total)
