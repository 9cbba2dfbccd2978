"""The gradient of a window of logits, recomputed: a product whose epilogue turns logits into their gradient."""

from __future__ import annotations

import triton
import triton.language as tl

from logitless.backends.triton.primitives import LOG2E, logits_and_slope, multiply_add, tile_position
from logitless.backends.triton.softmax_gradient import softmax_gradient


@triton.jit
def window_gradient_kernel(
    hidden,  # descriptor of [N, D], boxes [BM, BK]
    weight,  # descriptor of [V, D], boxes [BN, BK]
    gradient,  # descriptor of [N, window], boxes [BM, BN]
    bias,  # [V] where BIAS
    smoothing,  # [V] where SMOOTH_VECTOR
    peak,  # [N] fp32, as log_sum, a, b and d at the caller's places
    log_sum,
    a,
    b,
    d,
    order,  # [N] int32
    count,  # [1] int32
    first_column,
    end_column,
    hidden_size,
    uniform_smoothing,
    scale,
    softcap,
    programs,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    B: tl.constexpr,
    SMOOTH: tl.constexpr,
    SMOOTH_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dz`` of a window without the one-hot and the scale, for rows below the count.

    Grid: ``programs`` persistent programs, each a walk over tiles of [BM, BN]. Precision: products accumulate in fp32,
    the result is rounded once, to the dtype of its tensor. Deterministic: each entry is written once.
    """
    rows_here = tl.load(count)
    row_tiles = tl.cdiv(rows_here, BM)
    column_tiles = tl.cdiv(end_column - first_column, BN)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, programs, flatten=True):  # pyright: ignore
        row_tile, column_tile = tile_position(tile, row_tiles, column_tiles, GROUP)  # pyright: ignore
        row, column = row_tile * BM, first_column + column_tile * BN
        products = tl.zeros((BM, BN), tl.float32)
        for k in range(0, hidden_size, BK):
            x = hidden.load([row, k])
            w = weight.load([column, k])
            products = multiply_add(x, w, products, PRECISION)

        rows = row + tl.arange(0, BM)
        valid = rows < rows_here
        origin = tl.load(order + rows, mask=valid, other=0)
        row_peak = tl.load(peak + origin, mask=valid, other=0.0)
        row_log_sum = tl.load(log_sum + origin, mask=valid, other=0.0) * LOG2E
        coefficient_a = tl.load(a + origin, mask=valid, other=0.0)
        coefficient_b = coefficient_a
        coefficient_d = coefficient_a
        if B:
            coefficient_b = tl.load(b + origin, mask=valid, other=0.0)
        if SMOOTH:
            coefficient_d = tl.load(d + origin, mask=valid, other=0.0)
        z, slope = logits_and_slope(  # pyright: ignore
            products, bias, column, end_column, scale, softcap, BIAS, SOFTCAP
        )
        below = z - row_peak[:, None]
        dz = softmax_gradient(
            tl.exp2(below * LOG2E - row_log_sum[:, None]),
            below,
            slope,
            coefficient_a,
            coefficient_b,
            coefficient_d,
            smoothing,
            uniform_smoothing,
            column,
            end_column,
            B,
            SMOOTH,
            SMOOTH_VECTOR,
            SOFTCAP,
        )
        # Rows past the count were read from rows that do not count: their coefficients are zero, their logits finite.
        dz = tl.where(valid[:, None], dz, 0.0)
        gradient.store([row, column - first_column], dz.to(gradient.dtype))
