"""The forward pass: statistics of every row from one product, no logits in memory.

    y_iv = logit(<x_i, w_v>)                          in units of log 2
    block[t, i] = log2 sum_{v in tile t} 2^y_iv       the table, of tiles BLOCK columns wide
    target[i]   = y_i,target(i)

and from the table, row by row, logsumexp = log 2 * log2 sum_t 2^block[t, i].
"""

from __future__ import annotations

import triton
import triton.language as tl

from logitless.backends.triton.primitives import (
    LN2,
    in_blocks,
    log_sum_exp,
    logits,
    mask_columns,
    multiply_add,
    softmax_in_tile,
    tile_position,
)


@triton.jit
def target_logits(y, first, target):
    """[R] logits of the targets that lie in the tile, 0 elsewhere."""
    columns = first + tl.arange(0, y.shape[1])
    return tl.sum(tl.where(columns[None, :] == target[:, None], y, 0.0), 1)


@triton.jit
def mean_logit(y, block_sum, first, vocabulary, BLOCK: tl.constexpr):
    """[R * U / BLOCK] softmax expectation of the logit within each block; an entry of no probability adds nothing."""
    y = in_blocks(mask_columns(y, first, vocabulary, -float("inf")), BLOCK)
    p = tl.exp2(y - block_sum[:, None])
    return LN2 * tl.sum(tl.where(p > 0, p * y, 0.0), 1)


@triton.jit
def smooth_logit(y, smoothing, uniform, first, vocabulary, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """[R * U / BLOCK] sum of the logits in each block weighted by the smoothing."""
    y = mask_columns(y, first, vocabulary, 0.0)
    if VECTOR:
        columns = first + tl.arange(0, y.shape[1])
        y *= tl.load(smoothing + columns, mask=columns < vocabulary, other=0.0)[None, :]
    else:
        y *= uniform
    return LN2 * tl.sum(in_blocks(y, BLOCK), 1)


@triton.jit
def largest_logit(y, first, vocabulary, BLOCK: tl.constexpr):
    """Largest logit of each block [R * U / BLOCK], and [R, U / BLOCK] its place in the block."""
    z = in_blocks(mask_columns(y, first, vocabulary, -float("inf")), BLOCK)
    peak, index = tl.max(z, 1, return_indices=True)
    return peak, tl.reshape(index, (y.shape[0], y.shape[1] // BLOCK))


@triton.jit
def scan_kernel(
    hidden,  # descriptor of [N, D], boxes [BM, BK]
    weight,  # descriptor of [V, D], boxes [BN, BK]
    softmax,  # descriptor of [windows, N, window] where STORE, boxes [1, BM, BN]
    row_scales,  # [R] fp32 where SCALED
    column_scales,  # [V] fp32 where SCALED
    bias,  # [V] where BIAS
    smoothing,  # [V] where SMOOTH_VECTOR
    target,  # [N] int32
    count,  # [1] int32
    table,  # [T, table_stride] fp32
    mean_table,  # [T, table_stride] fp32 where MEAN
    smooth_table,  # [T, table_stride] fp32 where SMOOTH
    peak_table,  # [T, table_stride] fp32 where PREDICT
    peak_index,  # [T, table_stride] int32 where PREDICT
    target_logit,  # [N] fp32, written; where RANK read, and in natural units
    rank,  # [N] int32, zeroed by the caller, where RANK
    table_stride,
    first_row,
    rows,
    first_column,
    vocabulary,
    end_column,
    window,
    hidden_size,
    uniform_smoothing,
    scale,
    softcap,
    programs,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    MEAN: tl.constexpr,
    SMOOTH: tl.constexpr,
    SMOOTH_VECTOR: tl.constexpr,
    PREDICT: tl.constexpr,
    RANK: tl.constexpr,
    STORE: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Statistics of each row within each block of BLOCK columns, from the first to the end, for rows below the count.

    Grid: ``programs`` persistent programs, each a walk over tiles of [BM, BN]; no tile lies past the count of rows.
    With STORE the tile's own softmax is written too, rounded to its tensor's dtype: 2^(y - block), BLOCK = BN.
    With SCALED operands are in units of their rows' scales.
    Precision: products accumulate in fp32, everything after is fp32. Deterministic: no order between tiles matters;
    ranks are sums of integers.
    """
    rows_here = min(rows, tl.load(count) - first_row)
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

        place = row + tl.arange(0, BM)
        valid = place < rows_here
        factor = scale
        if SCALED:
            columns = column + tl.arange(0, BN)
            products *= tl.load(column_scales + columns, mask=columns < vocabulary, other=0.0)[None, :]
            factor = scale * tl.load(row_scales + place, mask=valid, other=0.0)[:, None]
        y = logits(products, bias, column, vocabulary, factor, softcap, BIAS, SOFTCAP)
        t = tl.load(target + first_row + place, mask=valid, other=-1)
        if RANK:
            at_target = tl.load(target_logit + first_row + place, mask=valid, other=float("inf"))
            above = mask_columns((y * LN2 > at_target[:, None]).to(tl.int32), column, vocabulary, 0)
            tl.atomic_add(rank + first_row + place, tl.sum(above, 1), mask=valid, sem="relaxed")
        else:
            here = (t >= column) & (t < column + BN)
            if tl.max(here.to(tl.int32), 0) > 0:
                tl.store(target_logit + first_row + place, target_logits(y, column, t), mask=here)

            block = column // BLOCK + tl.arange(0, BN // BLOCK)
            entry = block[None, :] * table_stride.to(tl.int64) + place[:, None]
            within = valid[:, None] & (block[None, :] * BLOCK < vocabulary)
            if STORE:
                probability, block_sum = softmax_in_tile(y, column, vocabulary)
                inside = column - first_column
                box = tl.reshape(probability.to(softmax.dtype), (1, BM, BN))
                softmax.store([inside // window, row, inside % window], box)
            else:
                block_sum = log_sum_exp(y, column, vocabulary, BLOCK)
            tl.store(table + entry, tl.reshape(block_sum, (BM, BN // BLOCK)), mask=within)
            if MEAN:
                mean = mean_logit(y, block_sum, column, vocabulary, BLOCK)
                tl.store(mean_table + entry, tl.reshape(mean, (BM, BN // BLOCK)), mask=within)
            if SMOOTH:
                smooth = smooth_logit(y, smoothing, uniform_smoothing, column, vocabulary, BLOCK, SMOOTH_VECTOR)
                tl.store(smooth_table + entry, tl.reshape(smooth, (BM, BN // BLOCK)), mask=within)
            if PREDICT:
                peak, index = largest_logit(y, column, vocabulary, BLOCK)
                tl.store(peak_table + entry, tl.reshape(peak, (BM, BN // BLOCK)), mask=within)
                index += block[None, :] * BLOCK
                tl.store(peak_index + entry, index, mask=within)


@triton.jit
def combine_kernel(
    table,  # [T, table_stride] fp32
    mean_table,  # [T, table_stride] fp32 where MEAN
    smooth_table,  # [T, table_stride] fp32 where SMOOTH
    peak_table,  # [T, table_stride] fp32 where PREDICT
    peak_index,  # [T, table_stride] int32 where PREDICT
    target_logit,  # [N] fp32 in units of log 2
    order,  # [N] int32
    count,  # [1] int32
    logsumexp,  # [N] fp32, written, as all that follow
    target_out,  # [N] fp32
    mean_out,  # [N] fp32 where MEAN
    smooth_out,  # [N] fp32 where SMOOTH
    prediction,  # [N] int64 where PREDICT
    peak_out,  # [N] fp32 where PREDICT
    table_stride,
    blocks,
    first_row,
    rows_here,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MEAN: tl.constexpr,
    SMOOTH: tl.constexpr,
    PREDICT: tl.constexpr,
):
    """Statistics of rows from those of their blocks, at the caller's places; zeros for rows that do not count.

    Grid: blocks of ROWS rows. Each walks the table BLOCKS entries at a time; sums are taken against a running maximum.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows_here
    counts = first_row + row < tl.load(count)
    steps = tl.arange(0, BLOCKS)
    peak = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, blocks, BLOCKS):
        here = ((first + steps) < blocks)[:, None] & counts[None, :] & inside[None, :]
        place = (first + steps).to(tl.int64)[:, None] * table_stride + row[None, :]
        sums = tl.load(table + place, mask=here, other=-float("inf"))
        larger = tl.maximum(peak, tl.max(sums, 0))
        reference = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp2(peak - reference) + tl.sum(tl.exp2(sums - reference[None, :]), 0)
        peak = larger
    lse = tl.where(peak == -float("inf"), 0.0, peak) + tl.log2(total)

    place = tl.load(order + first_row + row, mask=inside, other=0)
    tl.store(logsumexp + place, tl.where(counts, lse * LN2, 0.0), mask=inside)
    at_target = tl.load(target_logit + first_row + row, mask=inside & counts, other=0.0)
    tl.store(target_out + place, at_target * LN2, mask=inside)
    if MEAN | SMOOTH | PREDICT:
        mean = tl.zeros((ROWS,), tl.float32)
        smooth = tl.zeros((ROWS,), tl.float32)
        best = tl.full((ROWS,), -float("inf"), tl.float32)
        chosen = tl.zeros((ROWS,), tl.int32)
        for first in range(0, blocks, BLOCKS):
            here = ((first + steps) < blocks)[:, None] & counts[None, :] & inside[None, :]
            entry = (first + steps).to(tl.int64)[:, None] * table_stride + row[None, :]
            if MEAN:
                sums = tl.load(table + entry, mask=here, other=-float("inf"))
                mass = tl.exp2(sums - lse[None, :])
                within = tl.load(mean_table + entry, mask=here, other=0.0)
                mean += tl.sum(tl.where(mass > 0, mass * within, 0.0), 0)
            if SMOOTH:
                smooth += tl.sum(tl.load(smooth_table + entry, mask=here, other=0.0), 0)
            if PREDICT:
                peaks = tl.load(peak_table + entry, mask=here, other=-float("inf"))
                indices = tl.load(peak_index + entry, mask=here, other=0)
                top, at = tl.max(peaks, 0, return_indices=True)
                index = tl.sum(tl.where(steps[:, None] == at[None, :], indices, 0), 0)
                chosen = tl.where((top > best) | (first == 0), index, chosen)
                best = tl.maximum(best, top)
        if MEAN:
            tl.store(mean_out + place, tl.where(counts, mean, 0.0), mask=inside)
        if SMOOTH:
            tl.store(smooth_out + place, smooth, mask=inside)
        if PREDICT:
            tl.store(prediction + place, chosen.to(tl.int64), mask=inside)
            tl.store(peak_out + place, tl.where(counts, best * LN2, 0.0), mask=inside)
