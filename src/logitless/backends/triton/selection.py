"""Which pairs of a row and a vocabulary block the sampled gradient keeps, and their order by block.

For row i and block b of BLOCK vocabulary entries, from the table of block sums:

    m_ib  = e^(peak[b, i] - peak_i) 2^(log_sum[b, i] - log_sum_i)   softmax mass
    pi_ib = min(1, m_ib / threshold)                     probability of being kept
    S_ib  = offset_i + sum_{b' <= b} pi_ib'              kept if S_ib passes an integer within the block

``sampling.py`` says why that is unbiased. Sums are integers in units of 2^-44, so that they are exact and a block of
small probability is not lost beside them. The target's block is listed in any case. Of listed pairs a bit each is left;
they are counted, and put in order by block and within a block by row, with prefix sums. Nothing asks the host, no order
depends on time: the same uniforms give the same pairs.
"""

# A launch takes num_warps besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from logitless.backends.contract import Problem, Shape, Statistics, TensorForm, ceil_div
from logitless.backends.triton.launch import Tables, or_other
from logitless.backends.triton.primitives import LOG2E, log2_share
from logitless.backends.triton.rows import RowOrder
from logitless.options import BLOCK
from logitless.sampling import SMOOTHING_SHARE, block_count, block_shares, kept_pairs_bound, most_sampled

# Rows whose bits share a word.
ROWS_PER_WORD = 32
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
def inclusion(
    peaks,
    log_sums,
    shares,
    table_stride,
    peak,
    log_sum,
    row,
    counts,
    first,
    blocks,
    inverse_threshold,
    BLOCKS: tl.constexpr,
    MIXED: tl.constexpr,
):
    """[BLOCKS, R] masses of the blocks from ``first`` on, and their inclusion probabilities, 0 where there is none."""
    block = first + tl.arange(0, BLOCKS)
    inside = (block < blocks)[:, None] & counts[None, :]
    entry = block.to(tl.int64)[:, None] * table_stride + row[None, :]
    block_peak = tl.load(peaks + entry, mask=inside, other=0.0)
    block_sum = tl.load(log_sums + entry, mask=inside, other=-float("inf"))
    mass = tl.exp2(log2_share(block_peak, block_sum, peak[None, :], log_sum[None, :]))
    share = 0.0
    if MIXED:
        share = tl.load(shares + block, mask=block < blocks, other=0.0)[:, None]
    return mass, tl.where(inside, inclusion_probability(mass, share, inverse_threshold, MIXED), 0.0)


@triton.jit
def sum_steps_kernel(
    peaks,  # [B, table_stride] fp32 of the blocks, for rows in packed order
    log_sums,  # [B, table_stride] fp32, log2 of the blocks' sums relative to their peaks
    shares,  # [B] fp32 where MIXED
    peak,  # [N] fp32, at the caller's places, as log_sum
    log_sum,
    order,  # [N] int32
    count,  # [1] int32
    step_sums,  # [S, rows] int64, written
    table_stride,
    first_row,
    rows,
    blocks,
    inverse_threshold,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MIXED: tl.constexpr,
):
    """Each row's inclusion probabilities, added up over each segment of BLOCKS blocks, in units of 2^-44.

    Grid: groups of ROWS rows x segments. Rows past the count have none.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = first_row + row
    counts = (row < rows) & (place < tl.load(count))
    origin = tl.load(order + place, mask=counts, other=0)
    row_peak = tl.load(peak + origin, mask=counts, other=0.0)
    row_log_sum = tl.load(log_sum + origin, mask=counts, other=0.0) * LOG2E
    first = tl.program_id(1) * BLOCKS
    _, pi = inclusion(  # pyright: ignore
        peaks,
        log_sums,
        shares,
        table_stride,
        row_peak,
        row_log_sum,
        row,
        counts,
        first,
        blocks,
        inverse_threshold,
        BLOCKS,
        MIXED,
    )
    step = (pi * ONE).to(tl.int64)
    tl.store(step_sums + tl.program_id(1).to(tl.int64) * rows + row, tl.sum(step, 0), mask=row < rows)


@triton.jit
def select_kernel(
    peaks,  # [B, table_stride] fp32 of the blocks, for rows in packed order
    log_sums,  # [B, table_stride] fp32, log2 of the blocks' sums relative to their peaks
    shares,  # [B] fp32 where MIXED
    step_sums,  # [S, rows] int64
    peak,  # [N] fp32, at the caller's places, as log_sum and uniforms
    log_sum,
    uniforms,  # [N] fp64
    order,  # [N] int32
    target,  # [N] int32, packed
    count,  # [1] int32
    bits,  # [ceil(N / ROWS_PER_WORD), B] int32, written: which pairs are listed, a bit a row
    own,  # [N] int8, packed, written: whether the target's block is kept
    kept_blocks,  # [N, most + 1] int32, written where ESTIMATED, at the caller's places, as the two that follow
    kept_shares,  # [N, most + 1] fp32
    kept_weights,  # [N, most + 1] fp32
    table_stride,
    first_row,
    rows,
    blocks,
    inverse_threshold,
    most,
    ROWS_PER_WORD: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MIXED: tl.constexpr,
    ESTIMATED: tl.constexpr,
):
    """List pairs of rows ``first_row`` on, of which a row keeps no more than ``most`` whatever the masses are.

    Grid: groups of ROWS_PER_WORD rows x segments of BLOCKS blocks. Rows past the count list nothing.
    """
    lane = tl.arange(0, ROWS_PER_WORD)
    row = tl.program_id(0) * ROWS_PER_WORD + lane
    place = first_row + row
    counts = (row < rows) & (place < tl.load(count))
    origin = tl.load(order + place, mask=counts, other=0)
    row_peak = tl.load(peak + origin, mask=counts, other=0.0)
    row_log_sum = tl.load(log_sum + origin, mask=counts, other=0.0) * LOG2E
    own_block = tl.load(target + place, mask=counts, other=0) // BLOCK
    passed = (tl.load(uniforms + origin, mask=counts, other=0.0) * ONE).to(tl.int64)
    segment = tl.program_id(1)
    for first in range(0, segment, SEGMENTS):
        before = first + tl.arange(0, SEGMENTS)
        inside = (before < segment)[:, None] & counts[None, :]
        entry = before.to(tl.int64)[:, None] * rows + row[None, :]
        passed += tl.sum(tl.load(step_sums + entry, mask=inside, other=0), 0)

    first = segment * BLOCKS
    mass, pi = inclusion(  # pyright: ignore
        peaks,
        log_sums,
        shares,
        table_stride,
        row_peak,
        row_log_sum,
        row,
        counts,
        first,
        blocks,
        inverse_threshold,
        BLOCKS,
        MIXED,
    )
    step = (pi * ONE).to(tl.int64)
    after = passed[None, :] + tl.cumsum(step, 0)
    kept = (after >> SHIFT > (after - step) >> SHIFT) & (after >> SHIFT <= most)
    block = first + tl.arange(0, BLOCKS)
    is_own = (block[:, None] == own_block[None, :]) & counts[None, :]
    word = tl.sum((kept | is_own).to(tl.int32) << lane[None, :], 1)
    group = (first_row // ROWS_PER_WORD + tl.program_id(0)).to(tl.int64)
    tl.store(bits + group * blocks + block, word, mask=block < blocks)
    own_kept = tl.sum((kept & is_own).to(tl.int32), 0)
    own_here = (own_block >= first) & (own_block < first + BLOCKS)
    tl.store(own + place, own_kept.to(tl.int8), mask=(row < rows) & own_here)
    if ESTIMATED:
        # A sample's blocks are numbered by the integers they pass; one that is listed for its target alone comes last.
        slot = tl.where(kept, (after >> SHIFT) - 1, most)
        entry = origin.to(tl.int64)[None, :] * (most + 1) + slot
        listed = kept | is_own
        tl.store(kept_blocks + entry, tl.zeros_like(slot).to(tl.int32) + block[:, None], mask=listed)
        tl.store(kept_shares + entry, mass, mask=listed)
        tl.store(kept_weights + entry, tl.where(kept, 1 / pi, 0.0), mask=listed)


@triton.jit
def count_pairs_kernel(bits, counts, groups, blocks, GROUPS: tl.constexpr, BLOCKS: tl.constexpr):
    """``counts[s, b]`` pairs of each block in each segment of GROUPS groups of rows, [S, B] int32.

    Grid: BLOCKS blocks x segments.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    inside = (group < groups)[:, None] & (block < blocks)[None, :]
    word = tl.load(bits + group.to(tl.int64)[:, None] * blocks + block[None, :], mask=inside, other=0)
    total = tl.sum(population(word.to(tl.uint32, bitcast=True)), 0)
    tl.store(counts + tl.program_id(1).to(tl.int64) * blocks + block, total, mask=block < blocks)


@triton.jit
def prefix_count(counts, block, blocks, segments, SEGMENTS: tl.constexpr, BLOCKS: tl.constexpr):
    """[BLOCKS] how many pairs the blocks have in the first ``segments`` segments."""
    total = tl.zeros((BLOCKS,), tl.int32)
    for first in range(0, segments, SEGMENTS):
        segment = first + tl.arange(0, SEGMENTS)
        inside = (segment < segments)[:, None] & (block < blocks)[None, :]
        total += tl.sum(tl.load(counts + segment[:, None] * blocks + block[None, :], mask=inside, other=0), 0)
    return total


@triton.jit
def start_blocks_kernel(counts, starts, segments, blocks, SEGMENTS: tl.constexpr, STEP: tl.constexpr):
    """Where each block's pairs start, and where the last one's end: prefix sums [B + 1] int32. One program."""
    before = 0
    tl.store(starts, 0)
    for first in range(0, blocks, STEP):
        block = first + tl.arange(0, STEP)
        count = prefix_count(counts, block, blocks, segments, SEGMENTS, STEP)
        tl.store(starts + 1 + block, before + tl.cumsum(count, 0), mask=block < blocks)
        before += tl.sum(count, 0)


@triton.jit
def list_pairs_kernel(
    bits,  # [G, B] int32
    counts,  # [S, B] int32
    starts,  # [B + 1] int32
    order,  # [N] int32
    target,  # [N] int32, packed
    own,  # [N] int8, packed
    pairs,  # [P] int32, written
    tokens,
    groups,
    blocks,
    ROWS_PER_WORD: tl.constexpr,
    GROUPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """The caller's row of each pair, by block and within a block in packed order.

    The sign bit marks a pair that is listed for its target alone. Grid: BLOCKS blocks x segments of SEGMENT groups of
    rows, each a walk over its groups.
    """
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    segment = tl.program_id(1)
    free = tl.load(starts + block, mask=block < blocks, other=0)
    free += prefix_count(counts, block, blocks, segment, SEGMENTS, BLOCKS)
    lane = tl.arange(0, ROWS_PER_WORD)
    below_lane = (tl.full((ROWS_PER_WORD,), 1, tl.uint32) << lane.to(tl.uint32)) - 1
    end = tl.minimum((segment + 1) * SEGMENT, groups)
    for first in range(segment * SEGMENT, end, GROUPS):
        group = first + tl.arange(0, GROUPS)
        inside = (group < end)[:, None] & (block < blocks)[None, :]
        word = tl.load(bits + group.to(tl.int64)[:, None] * blocks + block[None, :], mask=inside, other=0)
        word = word.to(tl.uint32, bitcast=True)
        size = population(word)
        at = free[None, :] + tl.cumsum(size, 0) - size
        rank = population(word[:, :, None] & below_lane[None, None, :])
        listed = ((word[:, :, None] >> lane.to(tl.uint32)[None, None, :]) & 1) != 0
        place = group[:, None] * ROWS_PER_WORD + lane[None, :]
        exists = place < tokens
        row = tl.load(order + place, mask=exists, other=0)
        own_block = tl.load(target + place, mask=exists, other=0) // BLOCK
        own_kept = tl.load(own + place, mask=exists, other=0).to(tl.int32)
        alone = (own_block[:, None, :] == block[None, :, None]) & (own_kept[:, None, :] == 0)
        coded = tl.where(alone, row[:, None, :] | -2147483648, row[:, None, :])
        tl.store(pairs + at[:, :, None] + rank, coded, mask=listed)
        free += tl.sum(size, 0)


# Sums over blocks and over rows are taken by segments, which many programs work on at once.
SELECTED_BLOCKS, SELECTED_SEGMENTS = 64, 32
SUMMED_ROWS = 32
COUNTED_GROUPS, COUNTED_BLOCKS, COUNTED_SEGMENTS = 64, 32, 16
LISTED_GROUPS, LISTED_BLOCKS = 16, 8
STARTED_BLOCKS = 256


def saved_forms(shape: Shape) -> list[TensorForm]:
    """Pairs, with room for as many as there can be, and where each block's start.

    After a scan in eight bits also their weights, their probabilities and the log-sum-exp that these are of.
    """
    assert shape.threshold is not None
    bound = kept_pairs_bound(shape.tokens, shape.vocabulary, shape.threshold)
    forms: list[TensorForm] = [((bound,), torch.int32), ((block_count(shape.vocabulary) + 1,), torch.int32)]
    if shape.estimated:
        forms += [((bound,), torch.float32), ((bound, BLOCK), shape.compute_dtype), ((shape.tokens,), torch.float32)]
    return forms


def workspace(shape: Shape, rows: int) -> int:
    """Bytes that listing pairs takes besides these, for that many rows' table at a time."""
    blocks, groups = block_count(shape.vocabulary), ceil_div(shape.tokens, ROWS_PER_WORD)
    bits = 4 * blocks * (groups + ceil_div(groups, COUNTED_GROUPS))
    return bits + shape.tokens + 8 * rows * ceil_div(blocks, SELECTED_BLOCKS)


def mixed(shape: Shape) -> bool:
    """Whether blocks are kept by a mixture of the softmax and the smoothing: see ``sampling.py``."""
    return shape.softcapped and "smooth_logit" in shape.statistics


def smoothing_shares(problem: Problem) -> torch.Tensor | None:
    """[B] fp32 each block's share of the smoothing, where pairs are kept by a mixture."""
    if not mixed(problem.shape):
        return None
    assert problem.smoothing is not None
    return block_shares(problem.smoothing, problem.shape.vocabulary, problem.hidden.device).float()


@dataclass(frozen=True)
class Kept:
    """What the scan knows of each row's listed blocks, where it is corrected; [N, S], in no slot or in one.

    Attributes:
        blocks: int32 number of the block, -1 where the slot is empty.
        shares: fp32 sums of exponentials, as shares of the row's.
        weights: fp32 inverse inclusion probabilities, 0 for a block that is listed for its target alone.
    """

    blocks: torch.Tensor
    shares: torch.Tensor
    weights: torch.Tensor

    @classmethod
    def none(cls, shape: Shape, device: torch.device) -> Kept:
        """Every slot empty."""
        size = (shape.tokens, slots(shape))
        return cls(
            blocks=torch.full(size, -1, dtype=torch.int32, device=device),
            shares=torch.empty(size, dtype=torch.float32, device=device),
            weights=torch.empty(size, dtype=torch.float32, device=device),
        )


def slots(shape: Shape) -> int:
    """S, blocks that a row can list."""
    assert shape.threshold is not None
    return most_sampled(shape.vocabulary, shape.threshold) + 1


class Selection:
    """The pairs of one problem, listed row chunk by row chunk."""

    def __init__(self, problem: Problem, rows: RowOrder) -> None:
        """Memory for a bit a pair."""
        shape, device = problem.shape, problem.hidden.device
        self._problem, self._rows = problem, rows
        self._blocks = block_count(shape.vocabulary)
        self._bits = torch.empty(ceil_div(shape.tokens, ROWS_PER_WORD), self._blocks, dtype=torch.int32, device=device)
        self._own = torch.empty(shape.tokens, dtype=torch.int8, device=device)
        self._shares = smoothing_shares(problem)
        self.kept = Kept.none(shape, device) if shape.estimated else None

    def add(self, tables: Tables, first_row: int, rows: int, statistics: Statistics) -> None:
        """List the pairs of places ``first_row``, a multiple of ROWS_PER_WORD, on."""
        problem, threshold, uniforms = self._problem, self._problem.shape.threshold, self._problem.uniforms
        assert threshold is not None
        assert uniforms is not None
        assert first_row % ROWS_PER_WORD == 0
        if rows == 0:
            return
        segments = ceil_div(self._blocks, SELECTED_BLOCKS)
        sums = torch.empty(segments, rows, dtype=torch.int64, device=self._bits.device)
        shares, stride = or_other(self._shares, tables.log_sum), tables.log_sum.stride(0)
        where, kept = (stride, first_row, rows, self._blocks, 1 / threshold), self.kept
        sum_steps_kernel[(ceil_div(rows, SUMMED_ROWS), segments)](
            tables.peak,
            tables.log_sum,
            shares,
            statistics.peak,
            statistics.log_sum,
            self._rows.order,
            self._rows.count,
            sums,
            *where,
            ROWS=SUMMED_ROWS,
            BLOCKS=SELECTED_BLOCKS,
            MIXED=self._shares is not None,
            num_warps=4,
        )
        select_kernel[(ceil_div(rows, ROWS_PER_WORD), segments)](
            tables.peak,
            tables.log_sum,
            shares,
            sums,
            statistics.peak,
            statistics.log_sum,
            uniforms,
            self._rows.order,
            self._rows.target,
            self._rows.count,
            self._bits,
            self._own,
            *((self._bits, shares, shares) if kept is None else (kept.blocks, kept.shares, kept.weights)),
            *where,
            most_sampled(problem.shape.vocabulary, threshold),
            ROWS_PER_WORD=ROWS_PER_WORD,
            BLOCK=BLOCK,
            BLOCKS=SELECTED_BLOCKS,
            SEGMENTS=SELECTED_SEGMENTS,
            MIXED=self._shares is not None,
            ESTIMATED=kept is not None,
            num_warps=4,
        )

    def listed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs, and where each block's start: see ``saved_forms``."""
        groups, blocks = self._bits.shape
        device = self._bits.device
        pairs, starts = (
            torch.empty(size, dtype=dtype, device=device) for size, dtype in saved_forms(self._problem.shape)[:2]
        )
        segments = ceil_div(groups, COUNTED_GROUPS)
        counts = torch.empty(segments, blocks, dtype=torch.int32, device=device)
        count_pairs_kernel[(ceil_div(blocks, COUNTED_BLOCKS), segments)](
            self._bits, counts, groups, blocks, GROUPS=COUNTED_GROUPS, BLOCKS=COUNTED_BLOCKS, num_warps=4
        )
        start_blocks_kernel[(1,)](
            counts, starts, segments, blocks, SEGMENTS=COUNTED_SEGMENTS, STEP=STARTED_BLOCKS, num_warps=8
        )
        list_pairs_kernel[(ceil_div(blocks, LISTED_BLOCKS), segments)](
            self._bits,
            counts,
            starts,
            self._rows.order,
            self._rows.target,
            self._own,
            pairs,
            self._problem.shape.tokens,
            groups,
            blocks,
            ROWS_PER_WORD=ROWS_PER_WORD,
            GROUPS=LISTED_GROUPS,
            SEGMENT=COUNTED_GROUPS,
            SEGMENTS=COUNTED_SEGMENTS,
            BLOCK=BLOCK,
            BLOCKS=LISTED_BLOCKS,
            num_warps=4,
        )
        return pairs, starts
