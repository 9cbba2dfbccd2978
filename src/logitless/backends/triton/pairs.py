"""Gradients from the pairs that the sampled gradient keeps: three products, grouped by vocabulary block.

For a pair of row i and block b, kept with probability pi (``selection.py``), and v in the block:

    dz_iv = (p_iv (a_i + b_i (z_iv - z0_i)) + d_i s_v cap(z_iv)^2) / pi - c_i [v = target]
    dW_v  = scale * sum_i dz_iv x_i
    dx_i  = scale * sum_v dz_iv w_v

where z0 is the row's peak and 1 / pi is 0 for a block that is listed for its target alone. Under a cap the part with d
is what it leaves of smoothing besides a term of rank one, ``cap(z)^2`` being ``(z / softcap)^2``, and its derivative,
``1 - cap(z)^2``, multiplies the other two. The probability pi follows again from the block's recomputed mass, which is
that of the forward pass but for the last digits.

Pairs are cut into tiles of TILE pairs of one block; ``tile_blocks`` says whose.
"""

# A launch takes num_warps and num_stages besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from logitless.backends.triton.primitives import LOG2E, logits_and_slope, multiply_add
from logitless.backends.triton.selection import inclusion_probability
from logitless.backends.triton.softmax_gradient import target_entry


@triton.jit
def pairs_of_tile(tile, starts, tile_starts, tile_blocks, TILE: tl.constexpr):
    """A tile's block, the places of its pairs, and which of these exist."""
    block = tl.load(tile_blocks + tile)
    first = tl.load(starts + block) + (tile - tl.load(tile_starts + block)) * TILE
    place = first + tl.arange(0, TILE)
    return block, place, place < tl.load(starts + block + 1)


@triton.jit
def gradient_of_pairs(pairs, gradient, place, valid, BLOCK: tl.constexpr):
    """[R] rows of the pairs, and [R, BLOCK] the gradient of their logits, zero where there is no pair."""
    row = tl.load(pairs + place, mask=valid, other=0) & 0x7FFFFFFF
    entry = place.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, tl.load(gradient + entry, mask=valid[:, None], other=0.0)


@triton.jit
def products_of_pairs(
    hidden,
    weight,
    row,
    column,
    hidden_stride,
    hidden_size,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[TILE, BLOCK] products of gathered rows and the block whose first column is given."""
    source = hidden + row.to(tl.int64)[:, None] * hidden_stride
    products = tl.zeros((TILE, BLOCK), tl.float32)
    for k in range(0, hidden_size, BK):
        depth = k + tl.arange(0, BK)
        x = tl.load(source + depth[None, :], mask=(depth < hidden_size)[None, :], other=0.0)
        products = multiply_add(x, weight.load([column, k]), products, PRECISION)
    return products


@triton.jit
def start_tiles_kernel(starts, tile_starts, blocks, TILE: tl.constexpr, STEP: tl.constexpr):
    """Where each block's tiles start, and where the last one's end: prefix sums [B + 1] int32. One program."""
    before = 0
    tl.store(tile_starts, 0)
    for first in range(0, blocks, STEP):
        block = first + tl.arange(0, STEP)
        inside = block < blocks
        pairs = tl.load(starts + 1 + block, mask=inside, other=0) - tl.load(starts + block, mask=inside, other=0)
        tiles = (pairs + TILE - 1) // TILE
        tl.store(tile_starts + 1 + block, before + tl.cumsum(tiles, 0), mask=inside)
        before += tl.sum(tiles, 0)


@triton.jit
def list_tiles_kernel(tile_starts, tile_blocks, STEP: tl.constexpr):
    """The block of each tile. Grid: blocks."""
    block = tl.program_id(0)
    end = tl.load(tile_starts + block + 1)
    for first in range(tl.load(tile_starts + block), end, STEP):
        tile = first + tl.arange(0, STEP)
        tl.store(tile_blocks + tile, tl.zeros((STEP,), tl.int32) + block, mask=tile < end)


@triton.jit
def pair_gradient_kernel(
    hidden,  # [N, hidden_stride]
    weight,  # descriptor of [V, D], boxes [BLOCK, BK]
    pairs,  # [P] int32 rows; the sign bit marks those kept for their target alone
    starts,  # [B + 1] int32
    tile_starts,  # [B + 1] int32
    tile_blocks,  # [T] int32
    gradient,  # [P, BLOCK], written
    bias,  # [V] where BIAS
    smoothing,  # [V] where SMOOTH_VECTOR
    shares,  # [B] fp32 where MIXED
    target,  # [N] int64
    peak,  # [N] fp32, as log_sum, a, b, c and d
    log_sum,
    a,
    b,
    c,
    d,
    hidden_stride,
    hidden_size,
    vocabulary,
    blocks,
    inverse_threshold,
    uniform_smoothing,
    scale,
    softcap,
    programs,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    B: tl.constexpr,
    SMOOTH: tl.constexpr,
    SMOOTH_VECTOR: tl.constexpr,
    MIXED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dz`` of every pair, without the scale.

    Grid: ``programs`` persistent programs, each a walk over tiles. Precision: products accumulate in fp32; the target's
    part is subtracted before the one rounding, to the gradient's dtype. Deterministic: each entry is written once.
    """
    for tile in tl.range(tl.program_id(0), tl.load(tile_starts + blocks), programs):  # pyright: ignore
        block, place, valid = pairs_of_tile(tile, starts, tile_starts, tile_blocks, TILE)  # pyright: ignore
        coded = tl.load(pairs + place, mask=valid, other=0)
        row = coded & 0x7FFFFFFF
        column = block * BLOCK
        products = products_of_pairs(
            hidden, weight, row, column, hidden_stride, hidden_size, TILE, BLOCK, BK, PRECISION
        )  # fmt: skip

        columns = column + tl.arange(0, BLOCK)
        exists = valid[:, None] & (columns < vocabulary)[None, :]
        z, slope_there = logits_and_slope(  # pyright: ignore
            products, bias, column, vocabulary, scale, softcap, BIAS, SOFTCAP
        )
        below = z - tl.load(peak + row, mask=valid, other=0.0)[:, None]
        log_p = below - tl.load(log_sum + row, mask=valid, other=0.0)[:, None]
        p = tl.where(exists, tl.exp2(log_p * LOG2E), 0.0)
        share = 0.0
        if MIXED:
            share = tl.load(shares + block)
        pi = inclusion_probability(tl.sum(p, 1), share, inverse_threshold, MIXED)
        factor = tl.where((coded >= 0) & (pi > 0), 1 / pi, 0.0)

        weighted = (factor * tl.load(a + row, mask=valid, other=0.0))[:, None]
        one_hot = tl.load(c + row, mask=valid, other=0.0)[:, None]
        at_target = columns[None, :] == tl.load(target + row, mask=valid, other=-1).to(tl.int32)[:, None]
        dz = tl.where(at_target, target_entry(log_p, weighted, one_hot), p * weighted)
        if B:
            slope = factor * tl.load(b + row, mask=valid, other=0.0)
            dz += tl.where(p == 0, 0.0, p * (slope[:, None] * below))
        if SOFTCAP:
            dz *= slope_there
            if SMOOTH:
                smooth = (factor * tl.load(d + row, mask=valid, other=0.0))[:, None]
                if SMOOTH_VECTOR:
                    smooth = smooth * tl.load(smoothing + columns, mask=columns < vocabulary, other=0.0)[None, :]
                else:
                    smooth = smooth * uniform_smoothing
                dz += smooth * (1 - slope_there)
        dz = tl.where(exists, dz, 0.0)
        entry = place.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(gradient + entry, dz.to(gradient.dtype.element_ty), mask=valid[:, None])


@triton.jit
def pair_weight_gradient_kernel(
    hidden,  # [N, hidden_stride]
    gradient,  # [P, BLOCK]
    pairs,  # [P] int32
    starts,  # [B + 1] int32
    result,  # [V, D], written, or added to where ADD
    bias_result,  # [V] fp32, written, where BIAS_GRADIENT
    smoothing,  # [V] where SMOOTH_VECTOR
    smooth_sum,  # [D] fp32 sum of d_i x_i where SMOOTH
    smooth_total,  # [1] fp32 sum of d_i where SMOOTH
    poison,  # [1] fp32 added to everything: 0, or NaN where the gradient of some row's logits is
    hidden_stride,
    hidden_size,
    vocabulary,
    uniform_smoothing,
    scale,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    BP: tl.constexpr,
    ADD: tl.constexpr,
    WEIGHT_GRADIENT: tl.constexpr,
    BIAS_GRADIENT: tl.constexpr,
    SMOOTH: tl.constexpr,
    SMOOTH_VECTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the weight and the bias, block by block: one product each, and the smoothing's part of rank one.

    Grid: BD columns of the hidden size x blocks. Each element is written once, in its final dtype. Deterministic.
    """
    block = tl.program_id(1)
    first, end = tl.load(starts + block), tl.load(starts + block + 1)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    depth = tl.program_id(0) * BD + tl.arange(0, BD)
    inside = (columns < vocabulary)[:, None] & (depth < hidden_size)[None, :]
    weights = tl.zeros((BLOCK,), tl.float32) + uniform_smoothing
    if SMOOTH_VECTOR:
        weights = tl.load(smoothing + columns, mask=columns < vocabulary, other=0.0)
    if WEIGHT_GRADIENT:
        total = tl.zeros((BLOCK, BD), tl.float32)
        for start in range(first, end, BP):
            place = start + tl.arange(0, BP)
            valid = place < end
            row, dz = gradient_of_pairs(pairs, gradient, place, valid, BLOCK)  # pyright: ignore
            source = hidden + row.to(tl.int64)[:, None] * hidden_stride + depth[None, :]
            x = tl.load(source, mask=valid[:, None] & (depth < hidden_size)[None, :], other=0.0)
            total = multiply_add(dz.T, x.T, total, PRECISION)
        if SMOOTH:
            rank_one = tl.load(smooth_sum + depth, mask=depth < hidden_size, other=0.0)
            total -= weights[:, None] * rank_one[None, :]
        target = result + columns.to(tl.int64)[:, None] * hidden_size + depth[None, :]
        total = total * scale + tl.load(poison)
        if ADD:
            total += tl.load(target, mask=inside, other=0.0)
        tl.store(target, total.to(result.dtype.element_ty), mask=inside)
    if BIAS_GRADIENT:  # noqa: SIM102
        if tl.program_id(0) == 0:
            sums = tl.zeros((BLOCK,), tl.float32)
            for start in range(first, end, BP):
                place = start + tl.arange(0, BP)
                _, dz = gradient_of_pairs(pairs, gradient, place, place < end, BLOCK)  # pyright: ignore
                sums += tl.sum(dz.to(tl.float32), 0)
            if SMOOTH:
                sums -= weights * tl.load(smooth_total)
            tl.store(bias_result + columns, sums + tl.load(poison), mask=columns < vocabulary)


@triton.jit
def pair_hidden_gradient_kernel(
    weight,  # descriptor of [V, D], boxes [BLOCK, BD]
    gradient,  # [P, BLOCK]
    pairs,  # [P] int32
    starts,  # [B + 1] int32
    tile_starts,  # [B + 1] int32
    tile_blocks,  # [T] int32
    result,  # [N, D] fp32, added to
    hidden_size,
    blocks,
    scale,
    programs,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of the hidden states of all pairs, added to their rows.

    Grid: ``programs`` persistent programs, each a walk over tiles, and over slices of GROUP times BD columns of the
    hidden size, one after the other: what is added to at a time fits in L2. A row is added to by several programs at
    once, in no order that is known: two runs differ in the last bits of fp32.
    """
    tiles = tl.load(tile_starts + blocks)
    slices = tl.cdiv(hidden_size, GROUP * BD)
    for unit in tl.range(tl.program_id(0), tiles * slices, programs):  # pyright: ignore
        tile, first = unit % tiles, unit // tiles * (GROUP * BD)
        block, place, valid = pairs_of_tile(tile, starts, tile_starts, tile_blocks, TILE)  # pyright: ignore
        row, dz = gradient_of_pairs(pairs, gradient, place, valid, BLOCK)  # pyright: ignore
        target = result + row.to(tl.int64)[:, None] * hidden_size
        for k in range(first, tl.minimum(first + GROUP * BD, hidden_size), BD):
            depth = k + tl.arange(0, BD)
            part = multiply_add(dz, weight.load([block * BLOCK, k]).T, tl.zeros((TILE, BD), tl.float32), PRECISION)
            inside = valid[:, None] & (depth < hidden_size)[None, :]
            tl.atomic_add(target + depth[None, :], part * scale, mask=inside, sem="relaxed")


@triton.jit
def pair_hidden_gradient_in_order_kernel(
    weight,  # descriptor of [V, D], boxes [BLOCK, BD]
    gradient,  # [P, BLOCK]
    pairs,  # [P] int32
    starts,  # [B + 1] int32
    tile_starts,  # [B + 1] int32
    tile_blocks,  # [T] int32
    result,  # [N, D] fp32, added to
    hidden_size,
    blocks,
    scale,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The same, deterministic: whoever owns BD columns of the hidden size walks over all tiles in order.

    Grid: blocks of BD columns, which is far fewer programs than a GPU has room for.
    """
    k = tl.program_id(0) * BD
    depth = k + tl.arange(0, BD)
    for tile in range(0, tl.load(tile_starts + blocks)):
        block, place, valid = pairs_of_tile(tile, starts, tile_starts, tile_blocks, TILE)  # pyright: ignore
        row, dz = gradient_of_pairs(pairs, gradient, place, valid, BLOCK)  # pyright: ignore
        part = multiply_add(dz, weight.load([block * BLOCK, k]).T, tl.zeros((TILE, BD), tl.float32), PRECISION)
        inside = valid[:, None] & (depth < hidden_size)[None, :]
        target = result + row.to(tl.int64)[:, None] * hidden_size + depth[None, :]
        tl.debug_barrier()  # what other threads added for the last tile is there
        tl.store(target, tl.load(target, mask=inside, other=0.0) + part * scale, mask=inside)


@triton.jit
def weighted_sums_kernel(
    matrix,  # [R, stride]
    weights,  # [R] fp32 where VECTOR
    sums,  # [segments, columns] fp32, written
    stride,
    rows,
    columns,
    segment,
    uniform,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Weighted sums of the rows of each ``segment`` rows. Grid: COLUMNS columns x segments. Deterministic."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * segment
    end = tl.minimum(first + segment, rows)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        weight = tl.zeros((ROWS,), tl.float32) + uniform
        if VECTOR:
            weight = tl.load(weights + row, mask=row < end, other=0.0)
        # A row of no weight is one that does not count, and may hold anything.
        inside = ((row < end) & (weight != 0))[:, None] & (column < columns)[None, :]
        values = tl.load(matrix + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0)
        total += tl.sum(values.to(tl.float32) * weight[:, None], 0)
    tl.store(sums + tl.program_id(1).to(tl.int64) * columns + column, total, mask=column < columns)
