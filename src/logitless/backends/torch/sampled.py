"""The sampled gradient in torch operations.

Forward: logits in tiles, of which each row keeps the log-sum-exp of every vocabulary block; from that table the pairs
(row, block) to keep. Backward: block by block, the kept rows against one block of the weight, as in ``dense``; the
slice of the weight gradient that belongs to a block is written once. Cost: 2NDV for the loss, and 6 * 128 * D for each
kept pair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from logitless.backends.contract import Coefficients, Gradients, Pairs, Problem, Schedule, Statistics
from logitless.backends.torch.dense import (
    PARTIAL,
    PartialSum,
    add_target_rows,
    concatenate,
    new_accumulator,
    new_gradients,
)
from logitless.backends.torch.running import RunningStatistics
from logitless.backends.torch.tiles import Projection, RowValues, slices
from logitless.options import BLOCK
from logitless.sampling import block_count, inclusion_weights, mix_in_smoothing

# Pairs of one block that are computed at a time; bounds the gathered rows of a block that every row keeps.
GROUP_ROWS = 1024


def forward(problem: Problem, schedule: Schedule) -> Statistics:
    """Statistics, and the pairs that the backward pass will compute."""
    shape = problem.shape
    projection = Projection(problem, schedule.window)
    buffer = projection.buffer(schedule.rows * schedule.window)
    parts, rows_of, blocks_of, weights_of = [], [], [], []
    for rows in slices(shape.tokens, schedule.rows):
        running, hidden = RunningStatistics(problem, rows), projection.hidden[rows]
        for columns in slices(shape.vocabulary, schedule.window):
            running.add(projection.multiply(hidden, columns, buffer), columns, projection)
        part = running.finish()
        parts.append(part)
        listed, weights = _select(problem, rows, running, part)
        block, row = listed.T.nonzero(as_tuple=True)
        blocks_of.append(block.int())
        rows_of.append(row.int() + rows.start)
        weights_of.append(weights[row, block])
    statistics = concatenate(parts, problem)
    if parts:
        statistics.residuals.pairs = _group(rows_of, blocks_of, weights_of, block_count(shape.vocabulary))
    return statistics


def _select(
    problem: Problem, rows: slice, running: RunningStatistics, statistics: Statistics
) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, B] which blocks are listed, and [R, B] their weights."""
    shape, offsets = problem.shape, problem.offsets
    assert running.blocks is not None
    assert shape.threshold is not None
    assert offsets is not None
    masses = running.blocks.sub_(statistics.logsumexp[:, None]).exp_()
    if problem.smoothing is not None and shape.softcapped:
        masses = mix_in_smoothing(masses, problem.smoothing, shape.vocabulary)
    weights = inclusion_weights(masses, shape.threshold, offsets[rows]).to(shape.statistics_dtype)
    listed = weights > 0
    listed.scatter_(1, (problem.target[rows] // BLOCK)[:, None], True)
    return listed, weights


def _group(rows: list[torch.Tensor], blocks: list[torch.Tensor], weights: list[torch.Tensor], count: int) -> Pairs:
    """Pairs of consecutive row chunks, each in order of block, put together in order of block."""
    row, block, weight = torch.cat(rows), torch.cat(blocks), torch.cat(weights)
    if len(rows) > 1:
        block, order = block.sort(stable=True)
        row, weight = row[order], weight[order]
    ends = torch.bincount(block, minlength=count).cumsum(0)
    return Pairs(rows=row, weights=weight, starts=torch.cat((ends.new_zeros(1), ends)).cpu())


def backward(problem: Problem, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Gradients from the kept pairs; the rank-one part of label smoothing is exact and comes last."""
    shape, pairs = problem.shape, statistics.residuals.pairs
    projection = Projection(problem, BLOCK)
    entries = torch.zeros_like(statistics.logsumexp)
    gradients = new_gradients(projection)
    rank_one = None if coefficients.d is None else SmoothingRankOne(problem, coefficients.d)
    buffer = projection.buffer(GROUP_ROWS * BLOCK)
    product = PartialSum(projection, BLOCK)
    block_sum = new_accumulator(projection, min(BLOCK, shape.vocabulary))
    starts: list[int] = [0] * (block_count(shape.vocabulary) + 1) if pairs is None else pairs.starts.tolist()
    for block, columns in enumerate(slices(shape.vocabulary, BLOCK)):
        weight_sum = block_sum[: columns.stop - columns.start].zero_()
        for start in range(starts[block], starts[block + 1], GROUP_ROWS):
            assert pairs is not None
            group = slice(start, min(start + GROUP_ROWS, starts[block + 1]))
            rows = pairs.rows[group].long()
            hidden, target, group_entries = projection.hidden[rows], problem.target[rows], entries[rows]
            values = RowValues(
                statistics.logsumexp[rows],
                target,
                coefficients.rows(rows),
                softmax=pairs.weights[group],
                smoothing_outside=True,
            )
            raw = projection.multiply(hidden, columns, buffer)
            projection.softmax_gradient_(raw, columns, values, group_entries, gradients.bias)
            entries.index_copy_(0, rows, group_entries)
            if gradients.hidden is not None:
                part = torch.mm(raw, projection.weight(columns))
                gradients.hidden.index_add_(0, rows, part.to(gradients.hidden.dtype))
            if gradients.weight is not None:
                projection.restore_targets_(raw, columns, target, group_entries)
                product.add(weight_sum, raw.T, hidden)
        if gradients.weight is not None:
            if rank_one is not None:
                rank_one.add_to_weight(weight_sum, columns)
            gradients.weight[columns] = weight_sum
    if gradients.hidden is not None:
        add_target_rows(gradients.hidden, problem, problem.target, entries)
        if rank_one is not None:
            rank_one.add_to_hidden(gradients.hidden)
    if gradients.bias is not None and rank_one is not None:
        rank_one.add_to_bias(gradients.bias)
    return gradients


class SmoothingRankOne:
    """The gradient's term ``- d_i s_v``: of rank one in rows and vocabulary, so two vector products give it exactly."""

    def __init__(self, problem: Problem, d: torch.Tensor) -> None:
        """For coefficients d [N]."""
        assert problem.smoothing is not None
        self._problem, self._d, self._scale = problem, d, problem.head.logit_scale

    def _smoothing(self, columns: slice) -> torch.Tensor:
        smoothing = self._problem.smoothing
        assert smoothing is not None
        if isinstance(smoothing, torch.Tensor):
            return smoothing[columns]
        return torch.full((columns.stop - columns.start,), smoothing, dtype=self._d.dtype, device=self._d.device)

    @functools.cached_property
    def _row_sum(self) -> torch.Tensor:
        """[D] sum of d_i x_i."""
        return _weighted_row_sum(self._problem.hidden, lambda rows: self._d[rows])

    def add_to_weight(self, gradient: torch.Tensor, columns: slice) -> None:
        """To the rows ``columns`` of the weight gradient."""
        gradient.addr_(self._smoothing(columns), self._row_sum, alpha=-self._scale)

    def add_to_hidden(self, gradient: torch.Tensor) -> None:
        """To the gradient of the hidden states, [N, D]."""
        gradient.addr_(self._d, _weighted_row_sum(self._problem.weight, self._smoothing), alpha=-self._scale)

    def add_to_bias(self, gradient: torch.Tensor) -> None:
        """To the gradient of the bias, [V]."""
        gradient.sub_(self._smoothing(slice(0, gradient.shape[0])) * self._d.sum())


def _weighted_row_sum(matrix: torch.Tensor, weights: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """[D] weighted sum of the rows of a [R, D] matrix, in the weights' dtype."""
    total: torch.Tensor | None = None
    for rows in slices(matrix.shape[0], PARTIAL):
        weight = weights(rows)
        part = weight @ matrix[rows].to(weight.dtype)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
