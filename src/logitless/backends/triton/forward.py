"""The forward pass: statistics of every row from one product, no logits in memory.

    z_iv          = logit(<x_i, w_v>)
    peak[t, i]    = max_{v in tile t} z_iv                                the tables, of tiles BLOCK columns wide
    log_sum[t, i] = log2 sum_{v in tile t} e^(z_iv - peak[t, i])
    target[i]     = z_i,target(i)

and from the tables, row by row, the largest peak and the log-sum relative to it: see ``Statistics``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from logitless.backends.triton.primitives import (
    LN2,
    LOG2E,
    in_blocks,
    log2_share,
    log_sum_exp,
    logits,
    mask_columns,
    multiply_add,
    softmax_in_tile,
    tile_position,
)

LARGEST: tl.constexpr = tl.constexpr(3.4028234663852886e38)


@triton.jit
def target_logits(z, first, target):
    """[R] logits of the targets that lie in the tile, 0 elsewhere."""
    columns = first + tl.arange(0, z.shape[1])
    return tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)


@triton.jit
def mean_gap(z, peak, log_sum, first, vocabulary, BLOCK: tl.constexpr):
    """[R * U / BLOCK] what the logit lies below the block's peak, in the mean of the block's own softmax.

    An entry of no probability adds nothing.
    """
    below = in_blocks(mask_columns(z, first, vocabulary, -float("inf")), BLOCK) - peak[:, None]
    p = tl.exp2(below * LOG2E - log_sum[:, None])
    return -tl.sum(tl.where(p == 0, 0.0, p * below), 1)


@triton.jit
def smooth_logit(z, peak, smoothing, uniform, first, vocabulary, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """[R * U / BLOCK] sum of the logits in each block less its peak, weighted by the smoothing."""
    below = tl.reshape(in_blocks(z, BLOCK) - peak[:, None], (z.shape[0], z.shape[1]))
    below = mask_columns(below, first, vocabulary, 0.0)
    if VECTOR:
        columns = first + tl.arange(0, z.shape[1])
        below *= tl.load(smoothing + columns, mask=columns < vocabulary, other=0.0)[None, :]
    else:
        below *= uniform
    return tl.sum(in_blocks(below, BLOCK), 1)


@triton.jit
def largest_logit(z, first, vocabulary, BLOCK: tl.constexpr):
    """Largest logit of each block [R * U / BLOCK], and [R, U / BLOCK] its place in the block.

    NaN is larger than infinity, as for ``torch.argmax``: it is taken for that, and infinity for the largest number.
    """
    ordered = tl.where(z == z, tl.minimum(z, LARGEST), float("inf"))
    blocks = in_blocks(mask_columns(ordered, first, vocabulary, -float("inf")), BLOCK)
    peak, index = tl.max(blocks, 1, return_indices=True)
    return peak, tl.reshape(index, (z.shape[0], z.shape[1] // BLOCK))


@triton.jit
def scan_kernel(
    hidden,  # descriptor of [N, D], boxes [BM, BK]
    weight,  # descriptor of [V, D], boxes [BN, BK]
    softmax,  # descriptor of [windows, N, window] where STORE, boxes [1, BM, BN]
    row_scales,  # [R] fp32 where SCALED
    row_shifts,  # [R] fp32 where SCALED
    column_scales,  # [V] fp32 where SCALED
    bias,  # [V] where BIAS
    smoothing,  # [V] where SMOOTH_VECTOR
    target,  # [N] int32
    count,  # [1] int32
    peaks,  # [T, table_stride] fp32
    log_sums,  # [T, table_stride] fp32
    gap_table,  # [T, table_stride] fp32 where GAP
    smooth_table,  # [T, table_stride] fp32 where SMOOTH
    largest,  # [T, table_stride] fp32 where PREDICT
    largest_index,  # [T, table_stride] int32 where PREDICT
    target_logit,  # [N] fp32, written; read where RANK
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
    GAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    SMOOTH_VECTOR: tl.constexpr,
    PREDICT: tl.constexpr,
    RANK: tl.constexpr,
    STORE: tl.constexpr,
    LOGITS: tl.constexpr,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Statistics of each row within each block of BLOCK columns, from the first to the end, for rows below the count.

    Grid: ``programs`` persistent programs, each a walk over tiles of [BM, BN]; no tile lies past the count of rows.
    With STORE the tile's own softmax is written too, with LOGITS its logits, rounded to the tensor's dtype; BLOCK = BN.
    With SCALED operands are in units of their rows' scales, and each row's shift is added to its products.
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
        if SCALED:
            columns = column + tl.arange(0, BN)
            products *= tl.load(column_scales + columns, mask=columns < vocabulary, other=0.0)[None, :]
            products *= tl.load(row_scales + place, mask=valid, other=0.0)[:, None]
            products += tl.load(row_shifts + place, mask=valid, other=0.0)[:, None]
        z = logits(products, bias, column, vocabulary, scale, softcap, BIAS, SOFTCAP)
        t = tl.load(target + first_row + place, mask=valid, other=-1)
        if RANK:
            at_target = tl.load(target_logit + first_row + place, mask=valid, other=float("inf"))
            above = mask_columns((z > at_target[:, None]).to(tl.int32), column, vocabulary, 0)
            tl.atomic_add(rank + first_row + place, tl.sum(above, 1), mask=valid, sem="relaxed")
        else:
            here = (t >= column) & (t < column + BN)
            if tl.max(here.to(tl.int32), 0) > 0:
                tl.store(target_logit + first_row + place, target_logits(z, column, t), mask=here)

            block = column // BLOCK + tl.arange(0, BN // BLOCK)
            entry = block[None, :] * table_stride.to(tl.int64) + place[:, None]
            within = valid[:, None] & (block[None, :] * BLOCK < vocabulary)
            if STORE:
                probability, peak, log_sum = softmax_in_tile(z, column, vocabulary)
                inside = column - first_column
                if LOGITS:
                    probability = z
                box = tl.reshape(probability.to(softmax.dtype), (1, BM, BN))
                softmax.store([inside // window, row, inside % window], box)
            else:
                peak, log_sum = log_sum_exp(z, column, vocabulary, BLOCK)
            tl.store(peaks + entry, tl.reshape(peak, (BM, BN // BLOCK)), mask=within)
            tl.store(log_sums + entry, tl.reshape(log_sum, (BM, BN // BLOCK)), mask=within)
            if GAP:
                gap = mean_gap(z, peak, log_sum, column, vocabulary, BLOCK)
                tl.store(gap_table + entry, tl.reshape(gap, (BM, BN // BLOCK)), mask=within)
            if SMOOTH:
                smooth = smooth_logit(z, peak, smoothing, uniform_smoothing, column, vocabulary, BLOCK, SMOOTH_VECTOR)
                tl.store(smooth_table + entry, tl.reshape(smooth, (BM, BN // BLOCK)), mask=within)
            if PREDICT:
                top, index = largest_logit(z, column, vocabulary, BLOCK)
                tl.store(largest + entry, tl.reshape(top, (BM, BN // BLOCK)), mask=within)
                index += block[None, :] * BLOCK
                tl.store(largest_index + entry, index, mask=within)


@triton.jit
def combine_kernel(
    peaks,  # [T, table_stride] fp32
    log_sums,  # [T, table_stride] fp32
    gap_table,  # [T, table_stride] fp32 where GAP
    smooth_table,  # [T, table_stride] fp32 where SMOOTH
    smoothing_sums,  # [T] fp32 where SMOOTH
    largest,  # [T, table_stride] fp32 where PREDICT
    largest_index,  # [T, table_stride] int32 where PREDICT
    target_logit,  # [N] fp32
    order,  # [N] int32
    count,  # [1] int32
    peak_out,  # [N] fp32, written, as all that follow
    log_sum_out,  # [N] fp32
    target_out,  # [N] fp32
    gap_out,  # [N] fp32 where GAP
    smooth_out,  # [N] fp32 where SMOOTH
    prediction,  # [N] int64 where PREDICT
    table_stride,
    blocks,
    first_row,
    rows_here,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    GAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    PREDICT: tl.constexpr,
):
    """Statistics of rows from those of their blocks, at the caller's places; zeros for rows that do not count.

    Grid: blocks of ROWS rows. Each walks the tables BLOCKS entries at a time; sums are taken against a running maximum.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows_here
    counts = first_row + row < tl.load(count)
    steps = tl.arange(0, BLOCKS)
    seen = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, blocks, BLOCKS):
        here = ((first + steps) < blocks)[:, None] & counts[None, :] & inside[None, :]
        entry = (first + steps).to(tl.int64)[:, None] * table_stride + row[None, :]
        block_peak = tl.load(peaks + entry, mask=here, other=0.0)
        block_sum = tl.load(log_sums + entry, mask=here, other=-float("inf"))
        # A block of -inf alone has no peak.
        larger = tl.maximum(seen, tl.max(tl.where(block_sum == -float("inf"), -float("inf"), block_peak), 0))
        reference = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp2((seen - reference) * LOG2E)
        total += tl.sum(tl.exp2(log2_share(block_peak, block_sum, reference[None, :], 0.0)), 0)
        seen = larger
    peak = tl.where(seen == -float("inf"), 0.0, seen)
    log_sum = tl.log2(total)

    place = tl.load(order + first_row + row, mask=inside, other=0)
    tl.store(peak_out + place, tl.where(counts, peak, 0.0), mask=inside)
    tl.store(log_sum_out + place, tl.where(counts, log_sum * LN2, 0.0), mask=inside)
    at_target = tl.load(target_logit + first_row + row, mask=inside & counts, other=0.0)
    tl.store(target_out + place, at_target, mask=inside)
    if GAP | SMOOTH | PREDICT:
        gap = tl.zeros((ROWS,), tl.float32)
        smooth = tl.zeros((ROWS,), tl.float32)
        best = tl.full((ROWS,), -float("inf"), tl.float32)
        chosen = tl.zeros((ROWS,), tl.int32)
        for first in range(0, blocks, BLOCKS):
            here = ((first + steps) < blocks)[:, None] & counts[None, :] & inside[None, :]
            entry = (first + steps).to(tl.int64)[:, None] * table_stride + row[None, :]
            if GAP | SMOOTH:
                block_peak = tl.load(peaks + entry, mask=here, other=0.0)
            if GAP:
                block_sum = tl.load(log_sums + entry, mask=here, other=-float("inf"))
                mass = tl.exp2(log2_share(block_peak, block_sum, peak[None, :], log_sum[None, :]))
                within = tl.load(gap_table + entry, mask=here, other=0.0)
                gap += tl.sum(tl.where(mass == 0, 0.0, mass * (within + (peak[None, :] - block_peak))), 0)
            if SMOOTH:
                weight = tl.load(smoothing_sums + first + steps, mask=(first + steps) < blocks, other=0.0)
                below = tl.load(smooth_table + entry, mask=here, other=0.0)
                smooth += tl.sum(tl.where(here, below + (block_peak - peak[None, :]) * weight[:, None], 0.0), 0)
            if PREDICT:
                tops = tl.load(largest + entry, mask=here, other=-float("inf"))
                indices = tl.load(largest_index + entry, mask=here, other=0)
                top, at = tl.max(tops, 0, return_indices=True)
                index = tl.sum(tl.where(steps[:, None] == at[None, :], indices, 0), 0)
                chosen = tl.where((top > best) | (first == 0), index, chosen)
                best = tl.maximum(best, top)
        if GAP:
            tl.store(gap_out + place, tl.where(counts, gap, 0.0), mask=inside)
        if SMOOTH:
            tl.store(smooth_out + place, smooth, mask=inside)
        if PREDICT:
            tl.store(prediction + place, chosen.to(tl.int64), mask=inside)
