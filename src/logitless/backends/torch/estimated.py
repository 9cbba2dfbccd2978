"""The log-sum-exp from a scan in fewer bits, corrected by what the kept pairs hold in full: see ``reference.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from logitless.backends.contract import Problem, Statistics
from logitless.backends.torch.pairs import GROUP_ROWS, Pairs
from logitless.backends.torch.smoothing import smoothed_weight, smoothing_weights
from logitless.backends.torch.tiles import Projection, slices
from logitless.fp8 import left_operand, mean_row, outlier_channels, right_operand
from logitless.options import BLOCK

Operand = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

# Rows that are rounded at a time.
ROUNDED_ROWS = 256


class ScanProjection(Projection):
    """The projection of operands in eight bits, its products in the statistics dtype."""

    def __init__(self, problem: Problem, rows: int, columns: int) -> None:
        """For tiles of at most [rows, columns]."""
        super().__init__(problem, rows, columns)
        hidden = problem.hidden_rows(slice(0, problem.shape.tokens))
        self._channels, self._mean = outlier_channels(hidden), mean_row(problem.weight)
        width = problem.shape.hidden + 2 * self._channels.shape[0] + 1
        self._window = self.buffer(columns * width).view(columns, width)
        self._hidden = self.buffer(problem.shape.tokens * width).view(-1, width)
        self._round(hidden, left_operand, self._hidden)

    def hidden(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """[R, D + 2 C + 1] some of the hidden states."""
        return self._hidden[rows]

    def weight(self, columns: slice) -> torch.Tensor:
        """[U, D + 2 C + 1] those rows of the weight; valid until the next call."""
        window = self._window[: columns.stop - columns.start]
        self._round(self.problem.weight[columns], right_operand, window)
        return window

    def _round(self, matrix: torch.Tensor, operand: Operand, result: torch.Tensor) -> None:
        for rows in slices(matrix.shape[0], ROUNDED_ROWS):
            result[rows] = operand(matrix[rows], self._channels, self._mean)


def corrected(
    problem: Problem,
    statistics: Statistics,
    pairs: Pairs,
    scanned_smooth: torch.Tensor | None,  # [P]
) -> tuple[Statistics, Pairs]:
    """Statistics and pairs of the scan, corrected by the logits in full of the blocks that are kept.

    ``scanned_smooth`` are the blocks' logits of the scan, weighted by the smoothing, where their sum is estimated.
    """
    shape = problem.shape
    projection = Projection(problem, GROUP_ROWS, BLOCK)
    rows = pairs.rows.long()
    target = problem.target[rows]
    share, smooth = torch.empty_like(pairs.shares), None if scanned_smooth is None else torch.empty_like(pairs.shares)
    target_logit = torch.empty_like(statistics.target_logit)
    starts: list[int] = pairs.starts.tolist()
    for block, columns in enumerate(slices(shape.vocabulary, BLOCK)):
        weight = projection.weight(columns)
        for group in slices(starts[block + 1] - starts[block], GROUP_ROWS):
            here = slice(starts[block] + group.start, starts[block] + group.stop)
            z = projection.logits_(projection.hidden(rows[here]) @ weight.T, columns)
            peak = z.amax(1)
            peak = torch.where(peak == -torch.inf, 0, peak)
            sums = (z - peak[:, None]).exp_().sum(1)
            below = (peak - statistics.peak[rows[here]]) - statistics.log_sum[rows[here]]
            share[here] = sums * below.exp_()
            if smooth is not None:
                smooth[here] = z @ smoothing_weights(problem, columns)
            hits = (target[here] // BLOCK == block).nonzero()[:, 0]
            target_logit[rows[here][hits]] = z[hits, target[here][hits] - columns.start]
    total = torch.ones_like(target_logit).index_add_(0, rows, pairs.weights * (share - pairs.shares))
    least = torch.zeros_like(total).index_add_(0, rows, share)
    total = torch.maximum(total, least)
    change = None if smooth is None or scanned_smooth is None else pairs.weights * (smooth - scanned_smooth)
    whole = replace(
        statistics,
        log_sum=statistics.log_sum + total.log(),
        target_logit=target_logit,
        smooth_logit=_smooth_logit(problem, projection, statistics, pairs, change),
    )
    return whole, replace(pairs, shares=share / total[rows])


def _smooth_logit(
    problem: Problem,
    projection: Projection,
    statistics: Statistics,
    pairs: Pairs,
    change: torch.Tensor | None,  # [P]
) -> torch.Tensor | None:
    """[N] smoothed logits, as ``Statistics`` has them: without a cap one vector product, else estimated by pairs."""
    if problem.smoothing is None:
        return None
    if problem.head.softcap is None:
        vector, total = smoothed_weight(problem), torch.empty_like(statistics.log_sum)
        for rows in slices(problem.shape.tokens, GROUP_ROWS):
            total[rows] = projection.hidden(rows) @ vector
        total.mul_(problem.head.logit_scale)
        smoothing = smoothing_weights(problem, slice(0, problem.shape.vocabulary))
        if problem.bias is not None:
            total += problem.bias.to(total.dtype) @ smoothing
        return total - statistics.peak * smoothing.sum()
    assert statistics.smooth_logit is not None
    if change is None:  # there are no rows
        return statistics.smooth_logit
    return statistics.smooth_logit.index_add(0, pairs.rows.long(), change)
