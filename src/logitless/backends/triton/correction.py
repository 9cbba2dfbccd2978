"""The log-sum-exp of a scan in eight bits, corrected by the pairs that are kept.

With masses ``m_ib`` of the scan as shares of the row's, and ``s_ib`` the same of the pairs' logits in full,

    log_sum_i += log max(1 + sum_b (s_ib - m_ib) / pi_ib, sum_b s_ib)

over the blocks that row i lists, where 1 / pi is 0 for one that is listed for its target alone: see ``reference.py``.
The pairs' probabilities are left for the backward pass, which multiplies no logits again.
"""

# A launch takes num_warps and num_stages besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from logitless.backends.triton.pairs import gradient_of_pairs, pairs_of_tile, products_of_pairs
from logitless.backends.triton.primitives import LN2, LOG2E, expm1, least_slope, logits, slope_at_capped


@triton.jit
def pair_sums_kernel(
    hidden,  # [N, hidden_stride]
    weight,  # descriptor of [V, D], boxes [BLOCK, BK]
    pairs,  # [P] int32
    starts,  # [B + 1] int32
    tile_starts,  # [B + 1] int32
    tile_blocks,  # [T] int32
    kept_blocks,  # [N, slots] int32
    kept_weights,  # [N, slots] fp32
    sums,  # [N, slots] fp32, written: s above, in the slots that are taken
    pair_weights,  # [P] fp32, written: those of ``kept_weights``
    excess,  # [P, BLOCK], written: the probabilities under the scan's normaliser, less 1 at the target
    bias,  # [V] where BIAS
    target,  # [N] int64
    peak,  # [N] fp32 of the scan, as log_sum
    log_sum,
    target_logit,  # [N] fp32, written
    hidden_stride,
    hidden_size,
    vocabulary,
    blocks,
    slots,
    scale,
    softcap,
    programs,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BK: tl.constexpr,
    SLOTS: tl.constexpr,
    BIAS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of exponentials of all pairs, and the targets' logits; the exponentials themselves for the backward pass.

    Grid: ``programs`` persistent programs, each a walk over tiles. Precision: products accumulate in fp32, everything
    after is fp32; the target's 1 is subtracted before the one rounding, to the dtype of ``excess``. Deterministic: each
    entry is written once.
    """
    for tile in tl.range(tl.program_id(0), tl.load(tile_starts + blocks), programs):  # pyright: ignore
        block, place, valid = pairs_of_tile(tile, starts, tile_starts, tile_blocks, TILE)  # pyright: ignore
        row = tl.load(pairs + place, mask=valid, other=0) & 0x7FFFFFFF
        column = block * BLOCK
        products = products_of_pairs(
            hidden, weight, row, column, hidden_stride, hidden_size, TILE, BLOCK, BK, PRECISION
        )  # fmt: skip
        columns = column + tl.arange(0, BLOCK)
        z = logits(products, bias, column, vocabulary, scale, softcap, BIAS, SOFTCAP)
        log_p = z - tl.load(peak + row, mask=valid, other=0.0)[:, None]
        log_p -= tl.load(log_sum + row, mask=valid, other=0.0)[:, None]
        p = tl.where((columns < vocabulary)[None, :], tl.exp2(log_p * LOG2E), 0.0)
        share = tl.sum(p, 1)

        goal = tl.load(target + row, mask=valid, other=-1).to(tl.int32)
        at_target = columns[None, :] == goal[:, None]
        inside = valid & (goal >= column) & (goal < column + BLOCK)
        tl.store(target_logit + row, tl.sum(tl.where(at_target, z, 0.0), 1), mask=inside)

        excess_entry = place.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        p = tl.where(at_target, expm1(log_p), p)
        tl.store(excess + excess_entry, p.to(excess.dtype.element_ty), mask=valid[:, None])

        slot = tl.arange(0, SLOTS)
        entry = row.to(tl.int64)[:, None] * slots + slot[None, :]
        taken = valid[:, None] & (slot < slots)[None, :]
        here = taken & (tl.load(kept_blocks + entry, mask=taken, other=-1) == block)
        weights = tl.load(kept_weights + entry, mask=here, other=0.0)
        tl.store(sums + entry, tl.zeros_like(weights) + share[:, None], mask=here)
        tl.store(pair_weights + place, tl.sum(weights, 1), mask=valid)


@triton.jit
def correct_kernel(
    kept_blocks,  # [N, slots] int32
    kept_shares,  # [N, slots] fp32
    kept_weights,  # [N, slots] fp32
    sums,  # [N, slots] fp32
    log_sum,  # [N] fp32, corrected
    rows,
    slots,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The equation above. Grid: blocks of ROWS rows. Deterministic."""
    row, slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SLOTS)
    entry = row.to(tl.int64)[:, None] * slots + slot[None, :]
    inside = (row < rows)[:, None] & (slot < slots)[None, :]
    taken = inside & (tl.load(kept_blocks + entry, mask=inside, other=-1) >= 0)
    share = tl.load(sums + entry, mask=taken, other=0.0)
    change = (share - tl.load(kept_shares + entry, mask=taken, other=0.0)) * tl.load(
        kept_weights + entry, mask=taken, other=0.0
    )
    total, least = 1 + tl.sum(change, 1), tl.sum(share, 1)
    scanned = tl.load(log_sum + row, mask=row < rows, other=0.0)
    tl.store(log_sum + row, scanned + LN2 * tl.log2(tl.where(total < least, least, total)), mask=row < rows)


@triton.jit
def kept_gradient_kernel(
    excess,  # [P, BLOCK] as ``pair_sums_kernel`` leaves it
    pairs,  # [P] int32
    starts,  # [B + 1] int32
    tile_starts,  # [B + 1] int32
    tile_blocks,  # [T] int32
    pair_weights,  # [P] fp32
    gradient,  # [P, BLOCK], written
    target,  # [N] int64
    scanned,  # [N] fp32 log-sum of the scan
    peak,  # [N] fp32 that both log-sums are relative to
    log_sum,  # [N] fp32 the scan's corrected
    target_logit,  # [N] fp32
    a,  # [N] fp32, as c
    c,
    blocks,
    softcap,
    programs,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """``dz = weight a p - c [v = target]`` of every pair, times the cap's derivative.

    Grid: ``programs`` persistent programs, each a walk over tiles. Precision: fp32, rounded once. Under a cap a logit
    is the logarithm of its probability; where that is 0, so is its gradient, but for the target's. Deterministic.
    """
    for tile in tl.range(tl.program_id(0), tl.load(tile_starts + blocks), programs):  # pyright: ignore
        block, place, valid = pairs_of_tile(tile, starts, tile_starts, tile_blocks, TILE)  # pyright: ignore
        row, left = gradient_of_pairs(pairs, excess, place, valid, BLOCK)  # pyright: ignore
        columns = block * BLOCK + tl.arange(0, BLOCK)
        at_target = columns[None, :] == tl.load(target + row, mask=valid, other=-1).to(tl.int32)[:, None]
        p = left.to(tl.float32) + at_target.to(tl.float32)
        before = tl.load(scanned + row, mask=valid, other=0.0)
        change = before - tl.load(log_sum + row, mask=valid, other=0.0)
        factor = tl.load(pair_weights + place, mask=valid, other=0.0) * tl.load(a + row, mask=valid, other=0.0)
        changed = factor * tl.exp2(change * LOG2E)
        one_hot = tl.load(c + row, mask=valid, other=0.0)
        # At the target (p - 1) and (factor - c) are small where the token is predicted with confidence.
        rest = (factor - one_hot) + factor * expm1(change)
        dz = left.to(tl.float32) * changed[:, None] + tl.where(at_target, rest[:, None], 0.0)
        # A factor of 0 is that of a pair listed for its target alone, whose probabilities may be anything; but of a row
        # whose log-sum is NaN nothing is to stay finite.
        alone = (factor == 0) & (change == change)
        dz = tl.where(alone[:, None], tl.where(at_target, -one_hot[:, None], 0.0), dz)
        if SOFTCAP:
            scanned_sum = before + tl.load(peak + row, mask=valid, other=0.0)
            z = tl.where(p > 0, tl.log2(p) * LN2 + scanned_sum[:, None], 0.0)
            z = tl.where(at_target, tl.load(target_logit + row, mask=valid, other=0.0)[:, None], z)
            dz *= slope_at_capped(z, softcap, least_slope(softcap, excess.dtype.element_ty.primitive_bitwidth))
        entry = place.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(gradient + entry, dz.to(gradient.dtype.element_ty), mask=valid[:, None])


@triton.jit
def row_dots_kernel(
    matrix,  # [R, stride]
    vector,  # [columns] fp32
    valid_mask,  # [R] bool where MASKED
    result,  # [R] fp32, written; 0 for rows that do not count
    stride,
    rows,
    columns,
    scale,
    offset,  # [1] fp32
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """``scale * <m_r, vector> + offset``. Grid: blocks of ROWS rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    if MASKED:
        inside = inside & tl.load(valid_mask + row, mask=inside, other=0).to(tl.int1)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, columns, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        factor = tl.load(vector + column, mask=column < columns, other=0.0)
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        values = tl.load(matrix + place, mask=inside[:, None] & (column < columns)[None, :], other=0.0)
        total += tl.sum(values.to(tl.float32) * factor[None, :], 1)
    tl.store(result + row, tl.where(inside, total * scale + tl.load(offset), 0.0), mask=row < rows)
