"""The sampled gradient: a forward pass that lists pairs of a row and a vocabulary block, a backward pass over these.

Cost: 2NDV for the loss, and 6 * 128 * D for each pair. The table of the blocks' masses lives only as long as the rows
at work; what is left for the backward pass is the pairs.
"""

# A launch takes num_warps and num_stages besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import replace

import torch
import triton

from logitless.backends.contract import Coefficients, Gradients, Problem, Schedule, Shape, Statistics, ceil_div
from logitless.backends.triton import tiles
from logitless.backends.triton.correction import correct_kernel, kept_gradient_kernel, pair_sums_kernel, row_dots_kernel
from logitless.backends.triton.dense import Scratch, new_statistics, scan_rows, slices, write_ranks
from logitless.backends.triton.fp8_quantize import Rounding
from logitless.backends.triton.launch import Launcher, input_precision, or_other, readable, tma_descriptor
from logitless.backends.triton.pairs import (
    list_tiles_kernel,
    pair_gradient_kernel,
    pair_hidden_gradient_in_order_kernel,
    pair_hidden_gradient_kernel,
    pair_weight_gradient_kernel,
    start_tiles_kernel,
    weighted_sums_kernel,
)
from logitless.backends.triton.selection import ROWS_PER_WORD, Kept, Selection, smoothing_shares
from logitless.options import BLOCK
from logitless.sampling import block_count, poisoned_rows

# Programs a multiprocessor of the persistent kernels: as many as shared memory has room for, and as keep up additions.
GRADIENT_PROGRAMS, HIDDEN_PROGRAMS, ELEMENTWISE_PROGRAMS = 2, 4, 8
# Columns of the hidden size that one program of the deterministic kernel owns.
OWNED = 32
# Rows of the correction that one program takes.
CORRECTED_ROWS = 16
# Pieces of a weighted sum over rows.
SEGMENTS = 256


def rows_at_a_time(shape: Shape, schedule: Schedule) -> int:
    """Rows whose table exists at a time: whole groups of the selection."""
    return min(ceil_div(schedule.rows, ROWS_PER_WORD) * ROWS_PER_WORD, shape.tokens)


def most_tiles(shape: Shape, pairs: int, tile: int) -> int:
    """How many tiles of ``tile`` pairs there can be: each block's last may be in part empty."""
    return pairs // tile + block_count(shape.vocabulary)


def forward(problem: Problem, schedule: Schedule) -> Statistics:
    """Statistics of every row, and the pairs that the backward pass will compute."""
    launcher, shape = Launcher(problem), problem.shape
    statistics = new_statistics(problem)
    step = rows_at_a_time(shape, schedule)
    scratch, selection = Scratch.of(launcher, step), Selection(problem, launcher.rows)
    rounding = Rounding(problem, step) if shape.estimated else None
    for rows in slices(0, shape.tokens, max(1, step)):
        scan_rows(launcher, rows, ((slice(0, shape.vocabulary), None),), scratch, statistics, rounding)
        whole = statistics
        if problem.merge is not None:
            assert rows.stop - rows.start == shape.tokens, "a shard's rows are merged at once"
            merged = problem.merge(statistics, rows)()
            whole = replace(statistics, peak=merged.peak, log_sum=merged.log_sum)
        selection.add(scratch.tables, rows.start, rows.stop - rows.start, whole)
    write_ranks(launcher, scratch, statistics)
    del scratch, rounding
    pairs, starts = selection.listed()
    if selection.kept is None:
        return statistics.with_saved((pairs, starts))
    grouped = _Grouped(problem, pairs, starts)
    return statistics.with_saved((pairs, starts, *grouped.correct(statistics, selection.kept)))


def backward(problem: Problem, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Gradients from the pairs; the rank-one part of label smoothing is exact."""
    shape = problem.shape
    pairs, starts, *kept = statistics.saved
    grouped = _Grouped(problem, pairs, starts)
    if shape.estimated:
        gradient = grouped.kept_gradient(statistics, coefficients, *kept)
    else:
        gradient = grouped.logits_gradient(statistics, coefficients)
    d = coefficients.d
    if d is not None and problem.valid_mask is not None:
        d = torch.where(problem.valid_mask, d, 0.0)
    gradients = Gradients(None, None, None)
    if shape.weight_gradient or shape.bias_gradient:
        poisoned = poisoned_rows(statistics.logsumexp, coefficients.a, problem.valid_mask)
        poison = torch.where(poisoned, torch.nan, 0.0).sum()
        gradients.weight, gradients.bias = grouped.weight_gradient(gradient, d, poison)
    if shape.hidden_gradient:
        gradients.hidden = grouped.hidden_gradient(gradient, d)
    return gradients


class _Grouped:
    """The kernels over one problem's pairs, with what does not change between them."""

    def __init__(
        self,
        problem: Problem,
        pairs: torch.Tensor,  # [P]
        starts: torch.Tensor,  # [B + 1]
    ) -> None:
        self._problem, self._shape = problem, problem.shape
        self._device, dtype = problem.hidden.device, problem.shape.compute_dtype
        self._hidden, self._weight = problem.hidden.to(dtype), readable(problem.weight.to(dtype))
        self._pairs, self._starts = pairs, starts
        index = tiles.device_index(self._device)
        self._tile, self._weight_tile, self._hidden_tile = (
            tiles.tile(kind, dtype.itemsize, index) for kind in ("pairs", "pair_weight", "pair_hidden")
        )
        self._num_sms = tiles.num_sms(index)
        self._blocks = block_count(self._shape.vocabulary)
        self._precision = input_precision(dtype)
        count = most_tiles(self._shape, self._pairs.shape[0], self._tile.rows)
        self._tile_starts = torch.empty_like(self._starts)
        self._tile_blocks = self._empty(count, dtype=torch.int32)
        start_tiles_kernel[(1,)](
            self._starts, self._tile_starts, self._blocks, TILE=self._tile.rows, STEP=1024, num_warps=4
        )
        list_tiles_kernel[(self._blocks,)](self._tile_starts, self._tile_blocks, STEP=128, num_warps=1)
        self._vector = problem.smoothing.contiguous() if isinstance(problem.smoothing, torch.Tensor) else None
        self._uniform = problem.smoothing if isinstance(problem.smoothing, float) else 0.0

    def _empty(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self._device)

    def correct(self, statistics: Statistics, kept: Kept) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Correct the statistics of a scan in eight bits, in place.

        Returns [P] the pairs' weights, [P, BLOCK] their probabilities, less 1 at the target, under the log-sum before
        it was corrected, and that [N].
        """
        problem, head, (rows, slots) = self._problem, self._problem.head, kept.blocks.shape
        sums, weights = self._empty(rows, slots), self._empty(self._pairs.shape[0])
        excess = self._empty(self._pairs.shape[0], BLOCK, dtype=self._shape.compute_dtype)
        scanned = statistics.log_sum.clone()
        programs, size = GRADIENT_PROGRAMS * self._num_sms, triton.next_power_of_2(slots)
        pair_sums_kernel[(programs,)](
            self._hidden,
            tma_descriptor(self._weight, [BLOCK, self._tile.depth]),
            self._pairs,
            self._starts,
            self._tile_starts,
            self._tile_blocks,
            kept.blocks,
            kept.weights,
            sums,
            weights,
            excess,
            sums if problem.bias is None else problem.bias.contiguous(),
            problem.target,
            statistics.peak,
            statistics.log_sum,
            statistics.target_logit,
            self._hidden.stride(0),
            self._shape.hidden,
            self._shape.vocabulary,
            self._blocks,
            slots,
            head.logit_scale,
            head.softcap or 1.0,
            programs,
            TILE=self._tile.rows,
            BLOCK=BLOCK,
            BK=self._tile.depth,
            SLOTS=size,
            BIAS=problem.bias is not None,
            SOFTCAP=head.softcap is not None,
            PRECISION=self._precision,
            num_warps=self._tile.warps,
            num_stages=self._tile.stages,
        )
        correct_kernel[(ceil_div(rows, CORRECTED_ROWS),)](
            kept.blocks, kept.shares, kept.weights, sums, statistics.log_sum, rows, slots,
            ROWS=CORRECTED_ROWS, SLOTS=size, num_warps=4,
        )  # fmt: skip
        if statistics.smooth_logit is not None:
            self._smooth_logits(statistics.smooth_logit, statistics.peak)
        return weights, excess, scanned

    def _smooth_logits(self, result: torch.Tensor, peak: torch.Tensor) -> None:
        """[N] sums of the logits less the peak, weighted by the smoothing: one vector product."""
        problem, smoothing = self._problem, self._problem.smoothing
        assert smoothing is not None
        offset = torch.zeros(1, dtype=torch.float32, device=self._device)
        if problem.bias is not None:
            offset = (problem.bias.float() * smoothing).sum()
        valid_mask = problem.valid_mask
        row_dots_kernel[(ceil_div(result.shape[0], CORRECTED_ROWS),)](
            problem.hidden,
            self._weighted_sum(problem.weight, smoothing),
            result if valid_mask is None else valid_mask,
            result,
            problem.hidden.stride(0),
            result.shape[0],
            self._shape.hidden,
            problem.head.logit_scale,
            offset,
            ROWS=CORRECTED_ROWS,
            COLUMNS=128,
            MASKED=valid_mask is not None,
            num_warps=4,
        )
        mass = smoothing.sum() if isinstance(smoothing, torch.Tensor) else smoothing * self._shape.vocabulary
        result.sub_(peak * mass)

    def kept_gradient(
        self,
        statistics: Statistics,
        c: Coefficients,
        weights: torch.Tensor,  # [P]
        excess: torch.Tensor,  # [P, BLOCK]
        scanned: torch.Tensor,  # [N]
    ) -> torch.Tensor:
        """[P, BLOCK] the gradient of the pairs' logits, of what ``correct`` returned."""
        gradient, softcap = torch.empty_like(excess), self._problem.head.softcap
        programs = ELEMENTWISE_PROGRAMS * self._num_sms
        kept_gradient_kernel[(programs,)](
            excess,
            self._pairs,
            self._starts,
            self._tile_starts,
            self._tile_blocks,
            weights,
            gradient,
            self._problem.target,
            scanned,
            statistics.peak,
            statistics.log_sum,
            statistics.target_logit,
            c.a,
            c.c,
            self._blocks,
            softcap or 1.0,
            programs,
            TILE=self._tile.rows,
            BLOCK=BLOCK,
            SOFTCAP=softcap is not None,
            num_warps=4,
        )
        return gradient

    def logits_gradient(self, statistics: Statistics, c: Coefficients) -> torch.Tensor:
        """[P, BLOCK] the gradient of the pairs' logits."""
        problem, head = self._problem, self._problem.head
        gradient = self._empty(self._pairs.shape[0], BLOCK, dtype=self._shape.compute_dtype)
        shares = smoothing_shares(problem)
        assert self._shape.threshold is not None
        programs = GRADIENT_PROGRAMS * self._num_sms
        pair_gradient_kernel[(programs,)](
            self._hidden,
            tma_descriptor(self._weight, [BLOCK, self._tile.depth]),
            self._pairs,
            self._starts,
            self._tile_starts,
            self._tile_blocks,
            gradient,
            c.a if problem.bias is None else problem.bias.contiguous(),
            or_other(self._vector, c.a),
            or_other(shares, c.a),
            problem.target,
            statistics.peak,
            statistics.log_sum,
            c.a,
            or_other(c.b, c.a),
            c.c,
            or_other(c.d, c.a),
            self._hidden.stride(0),
            self._shape.hidden,
            self._shape.vocabulary,
            self._blocks,
            1 / self._shape.threshold,
            self._uniform,
            head.logit_scale,
            head.softcap or 1.0,
            programs,
            TILE=self._tile.rows,
            BLOCK=BLOCK,
            BK=self._tile.depth,
            BIAS=problem.bias is not None,
            SOFTCAP=head.softcap is not None,
            B=c.b is not None,
            SMOOTH=c.d is not None,
            SMOOTH_VECTOR=self._vector is not None,
            MIXED=shares is not None,
            PRECISION=self._precision,
            num_warps=self._tile.warps,
            num_stages=self._tile.stages,
        )
        return gradient

    def weight_gradient(
        self,
        gradient: torch.Tensor,  # [P, BLOCK]
        d: torch.Tensor | None,  # [N]
        poison: torch.Tensor,  # []
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of the weight, unless it is added to the caller's buffer, and of the bias."""
        shape, problem, tile = self._shape, self._problem, self._weight_tile
        weight = bias = None
        if shape.weight_gradient and problem.main_grad is None:
            weight = self._empty(*shape.weight_gradient_size, dtype=shape.weight_dtype)
        if shape.bias_gradient:
            bias = self._empty(shape.vocabulary)
        result = weight if problem.main_grad is None else problem.main_grad
        rank_one = None
        if d is not None and shape.weight_gradient:
            rank_one = self._weighted_sum(problem.hidden, d)[shape.trained_columns]
        columns = shape.weight_gradient_size[1]
        grid = (ceil_div(columns, tile.columns) if shape.weight_gradient else 1, self._blocks)
        pair_weight_gradient_kernel[grid](
            self._hidden[:, shape.trained_columns],
            gradient,
            self._pairs,
            self._starts,
            or_other(result, gradient),
            or_other(bias, gradient),
            or_other(self._vector, gradient),
            or_other(rank_one, gradient),
            gradient if d is None else d.sum(),
            poison,
            self._hidden.stride(0),
            columns,
            shape.vocabulary,
            self._uniform,
            problem.head.logit_scale,
            BLOCK=BLOCK,
            BD=tile.columns,
            BP=tile.depth,
            ADD=problem.main_grad is not None,
            WEIGHT_GRADIENT=shape.weight_gradient,
            BIAS_GRADIENT=bias is not None,
            SMOOTH=d is not None,
            SMOOTH_VECTOR=self._vector is not None,
            PRECISION=self._precision,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        return weight, bias

    def hidden_gradient(
        self,
        gradient: torch.Tensor,  # [P, BLOCK]
        d: torch.Tensor | None,  # [N]
    ) -> torch.Tensor:
        """[N, D] fp32 gradient of the hidden states."""
        shape, scale, tile = self._shape, self._problem.head.logit_scale, self._hidden_tile
        result = torch.zeros(shape.tokens, shape.hidden, dtype=torch.float32, device=self._device)
        in_order = torch.are_deterministic_algorithms_enabled()
        width = OWNED if in_order else tile.columns
        operands = (
            tma_descriptor(self._weight, [BLOCK, width]),
            gradient,
            self._pairs,
            self._starts,
            self._tile_starts,
            self._tile_blocks,
            result,
            shape.hidden,
            self._blocks,
            scale,
        )
        constants = {"TILE": self._tile.rows, "BLOCK": BLOCK, "BD": width, "PRECISION": self._precision}
        if in_order:
            grid = (ceil_div(shape.hidden, width),)
            pair_hidden_gradient_in_order_kernel[grid](*operands, **constants, num_warps=4)
        else:
            programs = HIDDEN_PROGRAMS * self._num_sms
            pair_hidden_gradient_kernel[(programs,)](
                *operands, programs, **constants, GROUP=tile.group, num_warps=tile.warps, num_stages=tile.stages
            )
        if d is not None:
            smoothing = self._vector if self._vector is not None else self._uniform
            result.addr_(d, self._weighted_sum(self._problem.weight, smoothing), alpha=-scale)
            if self._problem.valid_mask is not None:  # zero times a weight that is not finite
                result.masked_fill_(~self._problem.valid_mask[:, None], 0)
        return result

    def _weighted_sum(self, matrix: torch.Tensor, weights: torch.Tensor | float) -> torch.Tensor:
        """[D] fp32 sum of the rows of a matrix [R, D], weighted by [R] or one number."""
        matrix = readable(matrix)
        rows, columns = matrix.shape
        segment = max(1, ceil_div(rows, SEGMENTS))
        sums = self._empty(ceil_div(rows, segment), columns)
        vector = weights if isinstance(weights, torch.Tensor) else None
        if rows:
            weighted_sums_kernel[(ceil_div(columns, 64), sums.shape[0])](
                matrix,
                or_other(vector, matrix),
                sums,
                matrix.stride(0),
                rows,
                columns,
                segment,
                0.0 if isinstance(weights, torch.Tensor) else weights,
                ROWS=32,
                COLUMNS=64,
                VECTOR=vector is not None,
                num_warps=4,
            )
        return sums.sum(0)
