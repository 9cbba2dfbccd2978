"""Which pairs of a row and a vocabulary block the sampled gradient keeps, and their order by block.

For row i and block b of BLOCK vocabulary entries, from the table of block sums:

    m_ib  = 2^(block[b, i] - lse_i)                      softmax mass
    pi_ib = min(1, m_ib / threshold)                     probability of being kept
    S_ib  = offset_i + sum_{b' <= b} pi_ib'              kept if S_ib passes an integer within the block

``sampling.py`` says why that is unbiased. Sums are integers in units of 2^-44, so that they are exact and a block of
small probability is not lost beside them. The target's block is listed in any case. Of listed pairs a bit each is left;
they are counted, and put in order by block and within a block by row, with prefix sums. Nothing asks the host, no order
depends on time: the same offsets give the same pairs.
"""

# A launch takes num_warps besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from logitless.backends.contract import Problem, Shape, Statistics, TensorForm, ceil_div
from logitless.backends.triton.launch import Tables, or_other
from logitless.backends.triton.primitives import LOG2E
from logitless.backends.triton.rows import RowOrder
from logitless.options import BLOCK
from logitless.sampling import SMOOTHING_SHARE, block_count, block_shares, kept_pairs_bound, most_sampled

# Rows whose bits share a word.
GROUP = 32
ONE: tl.constexpr = tl.constexpr(2.0**44)
SHIFT: tl.constexpr = tl.constexpr(44)
MIX: tl.constexpr = tl.constexpr(SMOOTHING_SHARE)


@triton.jit
def inclusion_probability(mass, share, inverse_threshold, MIXED: tl.constexpr):
    """Probability of a block of this mass to be kept, 0 for no mass and NaN; ``share`` is its part of the smoothing."""
    if MIXED:
        mass = mass * (1 - MIX) + share * MIX
    return tl.where(mass > 0, tl.minimum(mass * inverse_threshold, 1.0), 0.0)


@triton.jit
def population(word):
    """How many bits of 32 are set, as int32."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    bytes_ = (fours + (fours >> 4)) & 0x0F0F0F0F
    halves = bytes_ + (bytes_ >> 8)
    return ((halves + (halves >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def select_kernel(
    table,  # [B, table_stride] fp32, log2 of the blocks' sums, for rows in packed order
    shares,  # [B] fp32 where MIXED
    logsumexp,  # [N] fp32, at the caller's places, as offsets
    offsets,  # [N] fp64
    order,  # [N] int32
    target,  # [N] int32, packed
    count,  # [1] int32
    bits,  # [ceil(N / GROUP), B] int32, written: which pairs are listed, a bit a row
    own,  # [N] int8, packed, written: whether the target's block is kept
    table_stride,
    first_row,
    rows,
    blocks,
    inverse_threshold,
    most,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    MIXED: tl.constexpr,
):
    """List pairs of rows ``first_row`` on, of which a row keeps no more than ``most`` whatever the masses are.

    Grid: groups of GROUP rows, each a walk over all blocks, BLOCKS at a time. Rows past the count list nothing.
    """
    lane = tl.arange(0, GROUP)
    row = tl.program_id(0) * GROUP + lane
    place = first_row + row
    counts = (row < rows) & (place < tl.load(count))
    origin = tl.load(order + place, mask=counts, other=0)
    lse = tl.load(logsumexp + origin, mask=counts, other=0.0) * LOG2E
    own_block = tl.load(target + place, mask=counts, other=0) // BLOCK
    passed = (tl.load(offsets + origin, mask=counts, other=0.0) * ONE).to(tl.int64)
    own_kept = tl.zeros((GROUP,), tl.int32)
    group = (first_row // GROUP + tl.program_id(0)).to(tl.int64)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = (block < blocks)[:, None] & counts[None, :]
        entry = block.to(tl.int64)[:, None] * table_stride + row[None, :]
        mass = tl.exp2(tl.load(table + entry, mask=inside, other=-float("inf")) - lse[None, :])
        share = 0.0
        if MIXED:
            share = tl.load(shares + block, mask=block < blocks, other=0.0)[:, None]
        pi = tl.where(inside, inclusion_probability(mass, share, inverse_threshold, MIXED), 0.0)
        step = (pi * ONE).to(tl.int64)
        after = passed[None, :] + tl.cumsum(step, 0)
        kept = (after >> SHIFT > (after - step) >> SHIFT) & (after >> SHIFT <= most)
        passed += tl.sum(step, 0)
        is_own = block[:, None] == own_block[None, :]
        own_kept += tl.sum((kept & is_own).to(tl.int32), 0)
        word = tl.sum(((kept | is_own) & inside).to(tl.int32) << lane[None, :], 1)
        tl.store(bits + group * blocks + block, word, mask=block < blocks)
    tl.store(own + place, own_kept.to(tl.int8), mask=row < rows)


@triton.jit
def count_pairs_kernel(bits, counts, groups, blocks, GROUPS: tl.constexpr, BLOCKS: tl.constexpr):
    """``counts[b]`` pairs of each block [B] int32. Grid: BLOCKS blocks, each a walk over all groups of rows."""
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    total = tl.zeros((BLOCKS,), tl.int32)
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None] & (block < blocks)[None, :]
        word = tl.load(bits + group.to(tl.int64)[:, None] * blocks + block[None, :], mask=inside, other=0)
        total += tl.sum(population(word.to(tl.uint32, bitcast=True)), 0)
    tl.store(counts + block, total, mask=block < blocks)


@triton.jit
def start_blocks_kernel(counts, starts, blocks, STEP: tl.constexpr):
    """Where each block's pairs start, and where the last one's end: prefix sums [B + 1] int32. One program."""
    before = 0
    tl.store(starts, 0)
    for first in range(0, blocks, STEP):
        block = first + tl.arange(0, STEP)
        count = tl.load(counts + block, mask=block < blocks, other=0)
        tl.store(starts + 1 + block, before + tl.cumsum(count, 0), mask=block < blocks)
        before += tl.sum(count, 0)


@triton.jit
def list_pairs_kernel(
    bits,  # [G, B] int32
    starts,  # [B + 1] int32
    order,  # [N] int32
    target,  # [N] int32, packed
    own,  # [N] int8, packed
    pairs,  # [P] int32, written
    tokens,
    groups,
    blocks,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The caller's row of each pair, by block and within a block in packed order.

    The sign bit marks a pair that is listed for its target alone. Grid: BLOCKS blocks, each a walk over the rows.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    free = tl.load(starts + block, mask=block < blocks, other=0)
    lane = tl.arange(0, GROUP)
    below_lane = (tl.full((GROUP,), 1, tl.uint32) << lane.to(tl.uint32)) - 1
    for first in range(0, groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = (group < groups)[:, None] & (block < blocks)[None, :]
        word = tl.load(bits + group.to(tl.int64)[:, None] * blocks + block[None, :], mask=inside, other=0)
        word = word.to(tl.uint32, bitcast=True)
        size = population(word)
        at = free[None, :] + tl.cumsum(size, 0) - size
        rank = population(word[:, :, None] & below_lane[None, None, :])
        listed = ((word[:, :, None] >> lane.to(tl.uint32)[None, None, :]) & 1) != 0
        place = group[:, None] * GROUP + lane[None, :]
        exists = place < tokens
        row = tl.load(order + place, mask=exists, other=0)
        own_block = tl.load(target + place, mask=exists, other=0) // BLOCK
        own_kept = tl.load(own + place, mask=exists, other=0).to(tl.int32)
        alone = (own_block[:, None, :] == block[None, :, None]) & (own_kept[:, None, :] == 0)
        coded = tl.where(alone, row[:, None, :] | -2147483648, row[:, None, :])
        tl.store(pairs + at[:, :, None] + rank, coded, mask=listed)
        free += tl.sum(size, 0)


SELECTED_BLOCKS = 128
COUNTED_GROUPS, COUNTED_BLOCKS = 32, 32
LISTED_GROUPS, LISTED_BLOCKS = 16, 8
STARTED_BLOCKS = 1024


def residuals(shape: Shape) -> list[TensorForm]:
    """Pairs, with room for as many as there can be; where each block's start."""
    assert shape.threshold is not None
    bound = kept_pairs_bound(shape.tokens, shape.vocabulary, shape.threshold)
    return [((bound,), torch.int32), ((block_count(shape.vocabulary) + 1,), torch.int32)]


def mixed(shape: Shape) -> bool:
    """Whether blocks are kept by a mixture of the softmax and the smoothing: see ``sampling.py``."""
    return shape.softcapped and "smooth_logit" in shape.statistics


def smoothing_shares(problem: Problem) -> torch.Tensor | None:
    """[B] fp32 each block's share of the smoothing, where pairs are kept by a mixture."""
    if not mixed(problem.shape):
        return None
    assert problem.smoothing is not None
    return block_shares(problem.smoothing, problem.shape.vocabulary, problem.hidden.device).float()


class Selection:
    """The pairs of one problem, listed row chunk by row chunk."""

    def __init__(self, problem: Problem, rows: RowOrder) -> None:
        """Memory for a bit a pair."""
        shape, device = problem.shape, problem.hidden.device
        self._problem, self._rows = problem, rows
        self._blocks = block_count(shape.vocabulary)
        self._bits = torch.empty(ceil_div(shape.tokens, GROUP), self._blocks, dtype=torch.int32, device=device)
        self._own = torch.empty(shape.tokens, dtype=torch.int8, device=device)
        self._shares = smoothing_shares(problem)

    def add(self, tables: Tables, first_row: int, rows: int, statistics: Statistics) -> None:
        """List the pairs of places ``first_row``, a multiple of GROUP, on."""
        problem, threshold, offsets = self._problem, self._problem.shape.threshold, self._problem.offsets
        assert threshold is not None
        assert offsets is not None
        assert first_row % GROUP == 0
        if rows == 0:
            return
        select_kernel[(ceil_div(rows, GROUP),)](
            tables.log_sum,
            or_other(self._shares, tables.log_sum),
            statistics.logsumexp,
            offsets,
            self._rows.order,
            self._rows.target,
            self._rows.count,
            self._bits,
            self._own,
            tables.log_sum.stride(0),
            first_row,
            rows,
            self._blocks,
            1 / threshold,
            most_sampled(problem.shape.vocabulary, threshold),
            GROUP=GROUP,
            BLOCK=BLOCK,
            BLOCKS=SELECTED_BLOCKS,
            MIXED=self._shares is not None,
            num_warps=4,
        )

    def listed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs, and where each block's start: see ``residuals``."""
        groups, blocks = self._bits.shape
        device = self._bits.device
        pairs, starts = (
            torch.empty(size, dtype=dtype, device=device) for size, dtype in residuals(self._problem.shape)
        )
        counts = torch.empty(blocks, dtype=torch.int32, device=device)
        count_pairs_kernel[(ceil_div(blocks, COUNTED_BLOCKS),)](
            self._bits, counts, groups, blocks, GROUPS=COUNTED_GROUPS, BLOCKS=COUNTED_BLOCKS, num_warps=4
        )
        start_blocks_kernel[(1,)](counts, starts, blocks, STEP=STARTED_BLOCKS, num_warps=4)
        list_pairs_kernel[(ceil_div(blocks, LISTED_BLOCKS),)](
            self._bits,
            starts,
            self._rows.order,
            self._rows.target,
            self._own,
            pairs,
            self._problem.shape.tokens,
            groups,
            blocks,
            GROUP=GROUP,
            GROUPS=LISTED_GROUPS,
            BLOCK=BLOCK,
            BLOCKS=LISTED_BLOCKS,
            num_warps=4,
        )
        return pairs, starts
