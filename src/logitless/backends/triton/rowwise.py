"""Logits by cuBLAS, and one kernel that makes of a row its statistics and its gradient.

For scalar outputs, whose coefficients are known before any upstream gradient: a row of logits is read for its
log-sum-exp, read again while it lies in L2, and overwritten by its gradient. The library rounds logits to the compute
dtype, as it does for everybody; rows stay in the caller's order, since it has no use for a count of rows.
"""

# A launch takes num_warps besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from logitless.backends.contract import AffineCoefficients, Problem, Statistics, ceil_div
from logitless.backends.triton import tiles
from logitless.backends.triton.primitives import LN2, LOG2E, logits_and_slope, mask_columns
from logitless.backends.triton.softmax_gradient import softmax_gradient, target_entry

# Elements that a program takes at a time, at most and at least, and how many of them a thread has: four reads of 16
# bytes in bf16, so that enough are on their way. Fewer elements than threads read at once would lie in several warps,
# of which one may overwrite what another has yet to read.
BLOCK, LEAST_BLOCK = 32768, 1024
ELEMENTS = 32


@triton.jit
def row_logits(
    place,
    first,
    bias,
    vocabulary,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    OVERHANG: tl.constexpr,
):
    """[1, BLOCK] logits of a row from column ``first`` on, and the derivative of the cap there.

    Logits are -inf beyond the vocabulary. Without OVERHANG the block is known to lie within it: masks are a third of
    the instructions.
    """
    columns = first + tl.arange(0, BLOCK)[None, :]
    if OVERHANG:
        products = tl.load(place + columns, mask=columns < vocabulary, other=0.0).to(tl.float32)
        z, slope = logits_and_slope(products, bias, first, vocabulary, scale, softcap, BIAS, CAP)  # pyright: ignore
        z = mask_columns(z, first, vocabulary, -float("inf"))
    else:
        products = tl.load(place + columns).to(tl.float32)
        z, slope = logits_and_slope(products, bias, first, vocabulary, scale, softcap, BIAS, CAP)  # pyright: ignore
    return z, slope


@triton.jit
def row_log_sum(
    place,
    bias,
    vocabulary,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
):
    """Largest logit of a row, and log2 of its sum of exponentials relative to that, in one pass.

    Sums of a block are against the largest logit so far, one number for the row, so that a logit costs one exponential.
    """
    seen = -float("inf")
    sums = tl.zeros((1, BLOCK), tl.float32)
    whole = vocabulary // BLOCK * BLOCK
    for first in range(0, whole, BLOCK):
        z, _ = row_logits(place, first, bias, vocabulary, scale, softcap, BLOCK, BIAS, CAP, False)  # pyright: ignore
        seen, sums = add_exponentials(z, seen, sums)  # pyright: ignore
    if whole < vocabulary:
        z, _ = row_logits(place, whole, bias, vocabulary, scale, softcap, BLOCK, BIAS, CAP, True)  # pyright: ignore
        seen, sums = add_exponentials(z, seen, sums)  # pyright: ignore
    return tl.where(seen == -float("inf"), 0.0, seen), tl.log2(tl.sum(sums))


@triton.jit
def add_exponentials(z, seen, sums):
    """The largest logit with those of another block, and [1, BLOCK] sums with their exponentials, relative to it."""
    larger = tl.maximum(seen, tl.max(z))
    reference = tl.where(larger == -float("inf"), 0.0, larger)
    return larger, sums * tl.exp2((seen - reference) * LOG2E) + tl.exp2((z - reference) * LOG2E)


@triton.jit
def row_smooth_sum(
    place,
    bias,
    smoothing,
    uniform,
    peak,
    vocabulary,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sum of a row's logits less its peak, weighted by the smoothing."""
    sums = tl.zeros((1, BLOCK), tl.float32)
    for first in range(0, vocabulary, BLOCK):
        z, _ = row_logits(place, first, bias, vocabulary, scale, softcap, BLOCK, BIAS, CAP, True)  # pyright: ignore
        below = mask_columns(z - peak, first, vocabulary, 0.0)
        if VECTOR:
            columns = first + tl.arange(0, BLOCK)[None, :]
            sums += below * tl.load(smoothing + columns, mask=columns < vocabulary, other=0.0)
        else:
            sums += below * uniform
    return tl.sum(sums)


@triton.jit
def overwrite(
    place,
    first,
    bias,
    smoothing,
    peak,
    log_sum,
    factor,
    smooth,
    uniform_smoothing,
    vocabulary,
    scale,
    softcap,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    VECTOR: tl.constexpr,
    OVERHANG: tl.constexpr,
):
    """The products of a block of columns become the gradient of their logits, without the one-hot."""
    z, slope = row_logits(  # pyright: ignore
        place, first, bias, vocabulary, scale, softcap, BLOCK, BIAS, CAP, OVERHANG
    )
    below = z - peak
    dz = softmax_gradient(
        tl.exp2(below * LOG2E - log_sum),
        below,
        slope,
        factor,
        factor,
        smooth,
        smoothing,
        uniform_smoothing,
        first,
        vocabulary,
        False,
        SMOOTH,
        VECTOR,
        CAP,
    )
    columns = first + tl.arange(0, BLOCK)[None, :]
    # Streamed past the cache, which has more use for logits to be read again.
    if OVERHANG:
        tl.store(place + columns, dz.to(place.dtype.element_ty), mask=columns < vocabulary, cache_modifier=".cs")
    else:
        tl.store(place + columns, dz.to(place.dtype.element_ty), cache_modifier=".cs")


@triton.jit
def row_kernel(
    products,  # [R, stride]; overwritten by the gradient of the logits
    valid_mask,  # [N] bool where MASKED
    target,  # [N] int64
    bias,  # [V] where BIAS
    smoothing,  # [V] where VECTOR
    a,  # [N] fp32, as slope, c and d
    slope,
    c,
    d,
    peak_out,  # [N] fp32, written, as the next three
    log_sum_out,
    target_logit,
    smooth_logit,
    stride,
    first_row,
    rows,
    vocabulary,
    uniform_smoothing,
    scale,
    softcap,
    programs,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SLOPE: tl.constexpr,
    SMOOTH: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Statistics of each row, and ``dz = p (a + slope lse) - c [v = target] - d s`` by the cap's derivative, in place.

    Rows that do not count get zeros. Grid: ``programs`` programs, one a processor, each every ``programs``-th row, so
    that what is at work nearly fits in L2. Precision: fp32 but for what is read and written. Deterministic.
    """
    for row in range(tl.program_id(0), rows, programs):
        place = products + row * stride.to(tl.int64)
        here = first_row + row
        counts = True
        if MASKED:
            counts = tl.load(valid_mask + here) != 0
        if counts:
            peak, log_sum = row_log_sum(  # pyright: ignore
                place, bias, vocabulary, scale, softcap, BLOCK, BIAS, SOFTCAP
            )  # fmt: skip
            t = tl.load(target + here).to(tl.int32)
            at_target, slope_there = row_logits(  # pyright: ignore
                place, t, bias, vocabulary, scale, softcap, 1, BIAS, SOFTCAP, False
            )
            tl.store(peak_out + here, peak)
            tl.store(log_sum_out + here, log_sum * LN2)
            tl.store(target_logit + here + tl.zeros((1, 1), tl.int32), at_target)
            factor = tl.load(a + here)
            if SLOPE:
                factor += tl.load(slope + here) * (peak + log_sum * LN2)
            factor += tl.zeros((1,), tl.float32)
            smooth = tl.zeros((1,), tl.float32)
            if SMOOTH:
                smooth += tl.load(d + here)
                total = row_smooth_sum(
                    place,
                    bias,
                    smoothing,
                    uniform_smoothing,
                    peak,
                    vocabulary,
                    scale,
                    softcap,
                    BLOCK,
                    BIAS,
                    SOFTCAP,
                    VECTOR,
                )
                tl.store(smooth_logit + here, total)
            entry = target_entry((at_target - peak) - log_sum * LN2, factor[:, None], tl.load(c + here))
            if SMOOTH:
                weight = uniform_smoothing
                if VECTOR:
                    weight = tl.load(smoothing + t)
                entry -= smooth[:, None] * weight
            if SOFTCAP:
                entry *= slope_there
            tl.debug_barrier()  # every thread has read the target's logit before any overwrites it
            whole = vocabulary // BLOCK * BLOCK
            if whole < vocabulary:
                overwrite(
                    place,
                    whole,
                    bias,
                    smoothing,
                    peak,
                    log_sum,
                    factor,
                    smooth,
                    uniform_smoothing,
                    vocabulary,
                    scale,
                    softcap,
                    BLOCK,
                    BIAS,
                    SOFTCAP,
                    SMOOTH,
                    VECTOR,
                    True,
                )
            for step in range(0, whole, BLOCK):
                first = whole - BLOCK - step  # backwards: what was read last is still in L2
                overwrite(
                    place,
                    first,
                    bias,
                    smoothing,
                    peak,
                    log_sum,
                    factor,
                    smooth,
                    uniform_smoothing,
                    vocabulary,
                    scale,
                    softcap,
                    BLOCK,
                    BIAS,
                    SOFTCAP,
                    SMOOTH,
                    VECTOR,
                    False,
                )
            tl.debug_barrier()  # the target's entry comes last
            tl.store(place + t + tl.zeros((1, 1), tl.int32), entry.to(products.dtype.element_ty))
        else:
            tl.store(peak_out + here, 0.0)
            tl.store(log_sum_out + here, 0.0)
            tl.store(target_logit + here, 0.0)
            if SMOOTH:
                tl.store(smooth_logit + here, 0.0)
            for first in range(0, vocabulary, BLOCK):
                columns = first + tl.arange(0, BLOCK)
                zero = tl.zeros((BLOCK,), products.dtype.element_ty)
                tl.store(place + columns, zero, mask=columns < vocabulary)


@triton.jit
def scale_rows_kernel(
    source,  # [R, source_stride]
    valid_mask,  # [R] bool where MASKED
    factor,  # [1] where SCALED
    result,  # [R, columns]
    source_stride,
    rows,
    columns,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows times a factor, in the result's dtype; zero where they do not count, whatever they hold."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    read = inside
    if MASKED:
        read = inside & (tl.load(valid_mask + row, mask=row < rows, other=0) != 0)[:, None]
    place = source + row.to(tl.int64)[:, None] * source_stride + column[None, :]
    values = tl.load(place, mask=read, other=0.0).to(tl.float32)
    if SCALED:
        values *= tl.load(factor).to(tl.float32)
        values = tl.where(read, values, 0.0)
    tl.store(
        result + row.to(tl.int64)[:, None] * columns + column[None, :], values.to(result.dtype.element_ty), mask=inside
    )


def gradient_in_place(
    problem: Problem,
    products: torch.Tensor,  # [R, V]
    first_row: int,
    ahead: AffineCoefficients,
    statistics: Statistics,
) -> None:
    """Products of the rows from ``first_row`` on become the gradient of their logits; statistics are filled."""
    rows, vocabulary = products.shape
    if rows == 0:
        return
    vector = problem.smoothing.contiguous() if isinstance(problem.smoothing, torch.Tensor) else None
    absent = ahead.a
    block = min(BLOCK, max(LEAST_BLOCK, triton.next_power_of_2(vocabulary)))
    programs = min(rows, tiles.num_sms(tiles.device_index(products.device)))
    row_kernel[(programs,)](
        products,
        absent if problem.valid_mask is None else problem.valid_mask,
        problem.target,
        absent if problem.bias is None else problem.bias.contiguous(),
        absent if vector is None else vector,
        ahead.a,
        absent if ahead.slope is None else ahead.slope,
        ahead.c,
        absent if ahead.d is None else ahead.d,
        statistics.peak,
        statistics.log_sum,
        statistics.target_logit,
        absent if statistics.smooth_logit is None else statistics.smooth_logit,
        products.stride(0),
        first_row,
        rows,
        vocabulary,
        problem.smoothing if isinstance(problem.smoothing, float) else 0.0,
        problem.head.logit_scale,
        problem.head.softcap or 1.0,
        programs,
        BLOCK=block,
        MASKED=problem.valid_mask is not None,
        BIAS=problem.bias is not None,
        SOFTCAP=problem.head.softcap is not None,
        SLOPE=ahead.slope is not None,
        SMOOTH=ahead.d is not None,
        VECTOR=vector is not None,
        num_warps=block // (32 * ELEMENTS),
    )


ROWS, COLUMNS = 8, 1024


def scale_rows(
    source: torch.Tensor,  # [R, D]
    valid_mask: torch.Tensor | None,  # [R] bool
    factor: torch.Tensor | None,  # []
    result: torch.Tensor,  # [R, D]
) -> torch.Tensor:
    """Rows times a factor, zero where they do not count, in ``result``, which may be the source, and its dtype."""
    (count, columns), mask = result.shape, valid_mask
    if count:
        scale_rows_kernel[(ceil_div(count, ROWS), ceil_div(columns, COLUMNS))](
            source,
            source if mask is None else mask,
            source if factor is None else factor,
            result,
            source.stride(0),
            count,
            columns,
            MASKED=mask is not None,
            SCALED=factor is not None,
            ROWS=ROWS,
            COLUMNS=COLUMNS,
            num_warps=4,
        )
    return result
