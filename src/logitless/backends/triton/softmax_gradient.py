"""The gradient of the logits, in the place of what the forward pass left of them.

With p the softmax, z0 the rows' peaks, k the derivative of the cap and s the smoothing,

    dz_iv = (p_iv (a_i + b_i (z_iv - z0_i)) - c_i [v = target_i] - d_i s_v) k_iv

but for the scale, which the products that follow apply to their fp32 results. The target's entry is written by a
kernel of its own, from the row's fp32 statistics: the one-hot is subtracted before any rounding, and no other entry
pays for it.
"""

# A launch takes num_warps besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from logitless.backends.contract import ceil_div
from logitless.backends.triton.primitives import (
    LEAST_SLOPE,
    LN2,
    LOG2E,
    expm1,
    least_slope,
    log2_share,
    slope_at_capped,
)


@triton.jit
def softmax_gradient(
    p,
    below,
    slope,
    a,
    b,
    d,
    smoothing,
    uniform_smoothing,
    first,
    vocabulary,
    B: tl.constexpr,
    SMOOTH: tl.constexpr,
    SMOOTH_VECTOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """[R, U] gradient of the logits without the one-hot.

    It is made of probabilities, where B of the logits less the row's peak, and where SOFTCAP of the cap's derivative.
    """
    if B:  # noqa: SIM108
        gradient = tl.where(p == 0, 0.0, p * (a[:, None] + b[:, None] * below))
    else:
        gradient = p * a[:, None]
    if SMOOTH:
        if SMOOTH_VECTOR:
            columns = first + tl.arange(0, p.shape[1])
            weights = tl.load(smoothing + columns, mask=columns < vocabulary, other=0.0)
            gradient -= d[:, None] * weights[None, :]
        else:
            gradient -= (d * uniform_smoothing)[:, None]
    if SOFTCAP:
        gradient *= slope
    return gradient


@triton.jit
def target_entry(log_p, a, c):
    """``a p - c``, formed as ``(a - c) p + c (p - 1)``: of a near c and p near 1 the first would cancel."""
    return (a - c) * tl.exp2(log_p * LOG2E) + c * expm1(log_p)


@triton.jit
def stored_gradient_kernel(
    softmax,  # [N, softmax_stride] softmax within each tile, logits where LOGITS
    gradient,  # [N, gradient_stride] written; may be the same memory
    peaks,  # [T, table_stride] fp32 of each tile of BLOCK columns
    log_sums,  # [T, table_stride] fp32
    peak,  # [N] fp32, as log_sum, a, b and d, at the caller's places
    log_sum,
    a,
    b,
    d,
    smoothing,  # [V] where SMOOTH_VECTOR
    order,  # [N] int32
    count,  # [1] int32
    softmax_stride,
    gradient_stride,
    table_stride,
    first_row,
    rows_here,
    first_column,
    vocabulary,
    uniform_smoothing,
    softcap,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    B: tl.constexpr,
    SMOOTH: tl.constexpr,
    SMOOTH_VECTOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGITS: tl.constexpr,
):
    """Gradient of the logits from the softmax within tiles: one read, one write, no exponential per entry.

    p = tile's softmax * the tile's share of the row; where a logit is needed it follows from the logarithm of the
    tile's softmax. With LOGITS p is made of these. Rows that do not count become zero. Grid: tiles of ROWS x BLOCK,
    rows first.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tile = first_column // BLOCK + tl.program_id(1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows_here
    counts = inside & (first_row + row < tl.load(count))
    origin = tl.load(order + first_row + row, mask=inside, other=0)
    row_peak = tl.load(peak + origin, mask=counts, other=0.0)
    row_log_sum = tl.load(log_sum + origin, mask=counts, other=0.0) * LOG2E
    entry = tile.to(tl.int64) * table_stride + row
    tile_peak = tl.load(peaks + entry, mask=counts, other=0.0)
    tile_log_sum = tl.load(log_sums + entry, mask=counts, other=0.0)
    place = softmax + row.to(tl.int64)[:, None] * softmax_stride + column[None, :]
    exists = (first_column + column < vocabulary)[None, :]
    share = tl.load(place, mask=counts[:, None] & exists, other=0.0).to(tl.float32)
    below = share
    slope = share
    if LOGITS:
        below = share - row_peak[:, None]
        slope = slope_at_capped(share, softcap, LEAST_SLOPE)
        p = tl.exp2(below * LOG2E - row_log_sum[:, None])
    else:
        p = share * tl.exp2(log2_share(tile_peak, tile_log_sum, row_peak, row_log_sum))[:, None]
    if (B | SOFTCAP) & (not LOGITS):
        log2_in_tile = tl.where(share == 0, -float("inf"), tl.log2(share))
        below = (log2_in_tile + tile_log_sum[:, None]) * LN2 + (tile_peak - row_peak)[:, None]
    if SOFTCAP & (not LOGITS):  # what underflowed in the tile is no lower than the cap
        z = below + row_peak[:, None]
        least = least_slope(softcap, softmax.dtype.element_ty.primitive_bitwidth)
        slope = slope_at_capped(tl.where(z < -softcap, -softcap, z), softcap, least)
    coefficient_a = tl.load(a + origin, mask=counts, other=0.0)
    coefficient_b = coefficient_a
    coefficient_d = coefficient_a
    if B:
        coefficient_b = tl.load(b + origin, mask=counts, other=0.0)
    if SMOOTH:
        coefficient_d = tl.load(d + origin, mask=counts, other=0.0)
    dz = softmax_gradient(
        p,
        below,
        slope,
        coefficient_a,
        coefficient_b,
        coefficient_d,
        smoothing,
        uniform_smoothing,
        first_column + tl.program_id(1) * BLOCK,
        vocabulary,
        B,
        SMOOTH,
        SMOOTH_VECTOR,
        SOFTCAP,
    )
    dz = tl.where(counts[:, None], dz, 0.0)
    result = gradient + row.to(tl.int64)[:, None] * gradient_stride + column[None, :]
    tl.store(result, dz.to(gradient.dtype.element_ty), mask=inside[:, None] & exists)


@triton.jit
def target_entries_kernel(
    gradient,  # [N, stride] of a window; the targets' entries are written
    target,  # [N] int32 in packed order
    target_logit,  # [N] fp32 at the caller's places, as all that follow
    peak,
    log_sum,
    a,
    b,
    c,
    d,
    smoothing,  # [V] where SMOOTH_VECTOR
    order,  # [N] int32
    count,  # [1] int32
    stride,
    first_row,
    rows_here,
    first_column,
    end_column,
    uniform_smoothing,
    softcap,
    ROWS: tl.constexpr,
    B: tl.constexpr,
    SMOOTH: tl.constexpr,
    SMOOTH_VECTOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The whole gradient at each row's target, where it lies in the window. Grid: blocks of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows_here) & (first_row + row < tl.load(count))
    t = tl.load(target + first_row + row, mask=inside, other=-1)
    here = inside & (t >= first_column) & (t < end_column)
    origin = tl.load(order + first_row + row, mask=here, other=0)
    z = tl.load(target_logit + origin, mask=here, other=0.0)
    below = z - tl.load(peak + origin, mask=here, other=0.0)
    log_p = below - tl.load(log_sum + origin, mask=here, other=0.0)
    factor = tl.load(a + origin, mask=here, other=0.0)
    entry = target_entry(log_p, factor, tl.load(c + origin, mask=here, other=0.0))
    if B:
        p = tl.exp2(log_p * LOG2E)
        entry += tl.where(p == 0, 0.0, tl.load(b + origin, mask=here, other=0.0) * (p * below))
    if SMOOTH:
        weight = uniform_smoothing
        if SMOOTH_VECTOR:
            weight = tl.load(smoothing + t, mask=here, other=0.0)
        entry -= tl.load(d + origin, mask=here, other=0.0) * weight
    if SOFTCAP:
        entry *= slope_at_capped(z, softcap, LEAST_SLOPE)
    place = gradient + row.to(tl.int64) * stride + (t - first_column)
    tl.store(place, entry.to(gradient.dtype.element_ty), mask=here)


@triton.jit
def column_sums_kernel(
    gradient,  # [R, stride]
    sums,  # [columns] fp32, added to
    stride,
    rows,
    columns,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``sums += sum of the rows``. Grid: blocks of COLUMNS columns, each walking all rows in order: deterministic."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < columns
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        place = gradient + row.to(tl.int64)[:, None] * stride + column[None, :]
        total += tl.sum(tl.load(place, mask=(row < rows)[:, None] & exists[None, :], other=0.0).to(tl.float32), 0)
    tl.store(sums + column, tl.load(sums + column, mask=exists, other=0.0) + total, mask=exists)


def sum_columns(gradient: torch.Tensor, sums: torch.Tensor) -> None:
    """``sums`` [U] += sum of the rows of ``gradient`` [R, U]."""
    rows, columns = gradient.shape
    if rows:
        column_sums_kernel[(ceil_div(columns, SUMMED_COLUMNS),)](
            gradient, sums, gradient.stride(0), rows, columns, ROWS=64, COLUMNS=SUMMED_COLUMNS, num_warps=4
        )


SUMMED_COLUMNS = 64


@triton.jit
def clear_rows_kernel(
    gradient, count, stride, columns, first_row, rows_here, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Zero in the rows at and past the count. Grid: blocks of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    past = (row < rows_here) & (first_row + row >= tl.load(count))
    if tl.max(past.to(tl.int32), 0) > 0:
        for first in range(0, columns, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            place = gradient + row.to(tl.int64)[:, None] * stride + column[None, :]
            zero = tl.zeros((ROWS, COLUMNS), gradient.dtype.element_ty)
            tl.store(place, zero, mask=past[:, None] & (column < columns)[None, :])
