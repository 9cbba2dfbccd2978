"""The sampled gradient in torch operations.

Forward: logits in tiles, of which each row keeps the log-sum-exp of every vocabulary block; from that table the pairs
(row, block) to keep. Backward: block by block, the kept rows against one block of the weight, as in ``dense``; the
slice of the weight gradient that belongs to a block is written once. Cost: 2NDV for the loss, and 6 * 128 * D for each
kept pair.
"""

from __future__ import annotations

import functools
from bisect import bisect_left
from dataclasses import replace

import torch

from logitless.backends.contract import (
    Coefficients,
    Gradients,
    Problem,
    Schedule,
    Shape,
    Statistics,
    TensorForm,
)
from logitless.backends.torch.dense import (
    PartialSum,
    add_target_rows,
    concatenate,
    new_accumulator,
    new_gradients,
    new_weight_gradient,
)
from logitless.backends.torch.estimated import ScanProjection, corrected
from logitless.backends.torch.pairs import GROUP_ROWS, Pairs
from logitless.backends.torch.running import RunningStatistics
from logitless.backends.torch.smoothing import smoothed_weight, smoothing_weights, weighted_hidden
from logitless.backends.torch.tiles import Projection, RowValues, slices
from logitless.options import BLOCK
from logitless.sampling import block_count, inclusion_weights, kept_pairs_bound, mix_in_smoothing, poisoned_rows

# Rows of a group are padded with zeros to a multiple of this: the CPU's library compiles a product for each new shape,
# which takes longer than a small product itself (0.57 ms against 0.12 ms at D=768 in bf16).
ROW_MULTIPLE = 32


def saved_forms(shape: Shape) -> list[TensorForm]:
    """Rows, weights and shares of the pairs, with room for as many as there can be, and where each block's start."""
    assert shape.threshold is not None
    bound = kept_pairs_bound(shape.tokens, shape.vocabulary, shape.threshold)
    starts = ((block_count(shape.vocabulary) + 1,), torch.int64)
    return [((bound,), torch.int32), *[((bound,), shape.statistics_dtype)] * 2, starts]


def forward(problem: Problem, schedule: Schedule) -> Statistics:
    """Statistics, and the pairs that the backward pass will compute."""
    shape = problem.shape
    kind = ScanProjection if shape.estimated else Projection
    projection = kind(problem, schedule.rows, schedule.window)
    buffer = projection.buffer(schedule.rows * schedule.window)
    parts, scans, smooth_of = [], [], []
    rows_of, blocks_of = ([torch.empty(0, dtype=torch.int32, device=buffer.device)] for _ in range(2))
    weights_of, shares_of = ([torch.empty(0, dtype=shape.statistics_dtype, device=buffer.device)] for _ in range(2))

    def select(rows: slice, running: RunningStatistics, share: torch.Tensor | None) -> None:
        masses = _masses(running, share)
        listed, weights = _select(problem, rows, masses)
        block, row = listed.T.nonzero(as_tuple=True)
        blocks_of.append(block.int())
        rows_of.append(row.int() + rows.start)
        weights_of.append(weights[row, block])
        shares_of.append(masses[row, block])
        if running.smooth_blocks is not None:
            smooth_of.append(running.smooth_blocks[row, block])

    for rows in slices(shape.tokens, schedule.rows):
        running, hidden = RunningStatistics(problem, rows), projection.hidden(rows)
        for columns in slices(shape.vocabulary, schedule.window):
            running.add(projection.multiply(hidden, columns, buffer), columns, projection)
        part = running.finish()
        parts.append(part)
        if problem.merge is None:
            select(rows, running, None)
        else:
            scans.append((rows, running))
    statistics = concatenate(parts, problem)
    if problem.merge is not None:  # one collective for all rows, whose tables are kept until then
        whole = problem.merge(statistics, slice(0, shape.tokens))() if shape.tokens else statistics
        share = ((statistics.peak - whole.peak) + (statistics.log_sum - whole.log_sum)).exp()
        for rows, running in scans:
            select(rows, running, share[rows])
    del scans
    del projection, buffer
    pairs, order = _group(rows_of, blocks_of, weights_of, shares_of, block_count(shape.vocabulary))
    if shape.estimated:
        smooth = torch.cat(smooth_of) if smooth_of else None
        if smooth is not None and order is not None:
            smooth = smooth[order]
        statistics, pairs = corrected(problem, statistics, pairs, smooth)
    tensors = [torch.empty(size, dtype=dtype, device=problem.hidden.device) for size, dtype in saved_forms(shape)]
    for tensor, values in zip(tensors, (pairs.rows, pairs.weights, pairs.shares, pairs.starts), strict=True):
        tensor[: values.shape[0]] = values
    return statistics.with_saved(tuple(tensors))


def _masses(
    running: RunningStatistics,
    share: torch.Tensor | None,  # [R]
) -> torch.Tensor:
    """[R, B] the blocks' shares of the row's sum, of which this shard has ``share``, or all of it.

    They are normalised by their own sum, so that they add up to no more than that however coarse logits of that size
    are. They take the place of the log-sum-exps.
    """
    assert running.blocks is not None
    masses = torch.softmax(running.blocks, 1, out=running.blocks)
    if share is None:
        return masses
    return masses.mul_(share[:, None]).masked_fill_((share == 0)[:, None], 0)  # of no mass at all the shares are NaN


def _select(problem: Problem, rows: slice, masses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[R, B] which blocks are listed by their masses [R, B], and [R, B] their weights."""
    shape, uniforms = problem.shape, problem.uniforms
    assert shape.threshold is not None
    assert uniforms is not None
    if problem.smoothing is not None and shape.softcapped:
        masses = mix_in_smoothing(masses, problem.smoothing, shape.vocabulary)
    weights = inclusion_weights(masses, shape.threshold, uniforms[rows]).to(shape.statistics_dtype)
    listed = weights > 0
    listed.scatter_(1, (problem.target[rows] // BLOCK)[:, None], True)
    return listed, weights


def _group(
    rows: list[torch.Tensor],
    blocks: list[torch.Tensor],
    weights: list[torch.Tensor],
    shares: list[torch.Tensor],
    count: int,
) -> tuple[Pairs, torch.Tensor | None]:
    """Pairs of consecutive row chunks, each in order of block, put together in order of block; and that order."""
    row, block, weight, share = torch.cat(rows), torch.cat(blocks), torch.cat(weights), torch.cat(shares)
    order = None
    if len(rows) > 2:  # the first is empty
        block, order = block.sort(stable=True)
        row, weight, share = row[order], weight[order], share[order]
    ends = torch.bincount(block, minlength=count).cumsum(0)
    return Pairs(rows=row, weights=weight, shares=share, starts=torch.cat((ends.new_zeros(1), ends))), order


def backward(problem: Problem, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Gradients from the kept pairs; the rank-one part of label smoothing is exact and comes last."""
    shape = problem.shape
    rows, weights, shares, block_starts = statistics.saved
    count = int(block_starts[-1])
    pairs = Pairs(rows[:count], weights[:count], shares[:count], block_starts)
    projection = Projection(problem, GROUP_ROWS, BLOCK)
    gradients = new_gradients(projection)
    gradients.weight = new_weight_gradient(problem) if problem.main_grad is None else problem.main_grad
    adds = problem.main_grad is not None
    rank_one = None if coefficients.d is None else SmoothingRankOne(problem, coefficients.d)
    group = Group(projection, problem, statistics, coefficients, pairs)
    product = PartialSum(projection, BLOCK)
    block_sum = new_accumulator(projection, min(BLOCK, shape.vocabulary), shape.weight_gradient_size[1])
    starts: list[int] = pairs.starts.tolist()
    for block, columns in enumerate(slices(shape.vocabulary, BLOCK)):
        groups = range(starts[block], starts[block + 1], GROUP_ROWS)
        alone = len(groups) == 1 and rank_one is None and not adds  # its product is the gradient
        weight_sum = block_sum[: columns.stop - columns.start]
        if not alone:
            weight_sum.zero_()
        for start in groups:
            group.gather(slice(start, min(start + GROUP_ROWS, starts[block + 1])), columns, gradients.bias)
            if gradients.hidden is not None:
                group.add_to_hidden(gradients.hidden)
            if gradients.weight is not None and alone:
                product.write(gradients.weight[columns], group.restored_targets().T, group.trained)
            elif gradients.weight is not None:
                product.add(weight_sum, group.restored_targets().T, group.trained)
        if gradients.weight is not None and not alone:
            if rank_one is not None:
                rank_one.add_to_weight(weight_sum, columns)
            if adds:
                gradients.weight[columns] += weight_sum
            else:
                gradients.weight[columns] = weight_sum
    if poisoned_rows(statistics.logsumexp, coefficients.a, problem.valid_mask).any():
        for gradient in (gradients.weight, gradients.bias):
            if gradient is not None:
                gradient.fill_(torch.nan)
    if adds:
        gradients.weight = None
    if gradients.hidden is not None:
        entries = group.entries_by_row()
        del group  # its buffers are as large as what the smoothing takes
        add_target_rows(gradients.hidden, problem, problem.target, entries)
        if rank_one is not None:
            rank_one.add_to_hidden(gradients.hidden)
    if gradients.bias is not None and rank_one is not None:
        rank_one.add_to_bias(gradients.bias)
    return gradients


class Group:
    """Some of one block's pairs at a time: their rows gathered, their products turned into gradients.

    What every pair needs of its row is gathered once for all pairs, and so are the targets' entries: each row has one
    pair whose block holds its target.
    """

    hidden: torch.Tensor
    """[R, D] gathered rows, padded with zeros to ``ROW_MULTIPLE``."""
    trained: torch.Tensor
    """Their columns that the weight's gradient is a product of."""

    def __init__(
        self,
        projection: Projection,
        problem: Problem,
        statistics: Statistics,
        coefficients: Coefficients,
        pairs: Pairs,
    ) -> None:
        """For the pairs of a forward pass."""
        self._projection, self._tokens = projection, problem.shape.tokens
        self._trained_columns = problem.shape.trained_columns
        self._rows = pairs.rows.long()
        values = _pair_values(problem, statistics, coefficients, pairs)
        self._values = values = replace(values, entries=projection.target_entries(values))
        block_of = torch.repeat_interleave(pairs.starts.diff().to(self._rows.device))
        hits = (self._values.target // BLOCK == block_of).nonzero()[:, 0]
        self._hits = hits
        self._local = self._values.target[hits] % BLOCK
        self.target_values = self._values.rows(hits)
        """[N] values of the pairs that hold their row's target, in order of block."""
        self._entries = projection.product_entries(self.target_values)
        self._narrow_entries = self._entries.to(projection.dtype)
        self._hit_list: list[int] = hits.tolist()
        hidden = problem.shape.hidden
        self._hidden_buffer = projection.buffer(GROUP_ROWS * hidden).view(GROUP_ROWS, hidden)
        self._part_buffer = projection.buffer(GROUP_ROWS * hidden).view(GROUP_ROWS, hidden)
        self._buffer = projection.buffer(GROUP_ROWS * BLOCK)

    def gather(self, pairs: slice, columns: slice, bias_gradient: torch.Tensor | None) -> None:
        """Take up a slice of the pairs of the block ``columns``."""
        count = pairs.stop - pairs.start
        self._rows_here, self._columns = self._rows[pairs], columns
        self.hidden = self._hidden_buffer[: -(-count // ROW_MULTIPLE) * ROW_MULTIPLE]
        self.hidden[:count] = self._projection.hidden(self._rows_here)
        self.hidden[count:].zero_()
        self.trained = self.hidden[:, self._trained_columns]
        self._raw = self._projection.multiply(self.hidden, columns, self._buffer)
        self._raw[count:].zero_()  # zero times a weight that is not finite
        self._projection.softmax_gradient_(self._raw[:count], columns, self._values.rows(pairs), bias_gradient)
        hits = slice(bisect_left(self._hit_list, pairs.start), bisect_left(self._hit_list, pairs.stop))
        self._at_targets = (self._hits[hits] - pairs.start, self._local[hits])
        self._entries_here = self._narrow_entries[hits]

    def add_to_hidden(self, gradient: torch.Tensor) -> None:
        """Add the gradient of the rows, but for the targets' entries, to [N, D]."""
        self._raw[self._at_targets] = 0
        part = torch.mm(self._raw, self._projection.weight(self._columns), out=self._part_buffer[: self._raw.shape[0]])
        gradient.index_add_(0, self._rows_here, part[: self._rows_here.shape[0]].to(gradient.dtype))

    def restored_targets(self) -> torch.Tensor:
        """[R, U] the gradient of the products, targets' entries included."""
        self._raw[self._at_targets] = self._entries_here
        return self._raw

    def entries_by_row(self) -> torch.Tensor:
        """[N] the targets' entries."""
        return torch.zeros_like(self._entries).index_copy_(0, self._rows[self._hits], self._entries)


def _pair_values(problem: Problem, statistics: Statistics, coefficients: Coefficients, pairs: Pairs) -> RowValues:
    """[P] values of every pair: those of its row, the softmax's coefficients weighted."""
    values = RowValues.of(problem, statistics, coefficients).rows(pairs.rows.long())
    c = values.coefficients
    # Without a cap the smoothing term is of rank one as a whole, and nothing of it is left to the blocks.
    d = c.d * pairs.weights if c.d is not None and problem.shape.softcapped else None
    b = None if c.b is None else c.b * pairs.weights
    weighted = Coefficients(a=c.a * pairs.weights, b=b, c=c.c, d=d)
    return replace(values, coefficients=weighted, share=pairs.shares, smoothing_outside=True)


class SmoothingRankOne:
    """The gradient's term ``- d_i s_v``: of rank one in rows and vocabulary, so two vector products give it exactly."""

    def __init__(self, problem: Problem, d: torch.Tensor) -> None:
        """For coefficients d [N]."""
        self._problem, self._d, self._scale = problem, d, problem.head.logit_scale

    @functools.cached_property
    def _row_sum(self) -> torch.Tensor:
        """[D] sum of d_i x_i."""
        return weighted_hidden(self._problem, self._d)

    def add_to_weight(self, gradient: torch.Tensor, columns: slice) -> None:
        """To the rows ``columns`` of the weight gradient."""
        gradient.addr_(
            smoothing_weights(self._problem, columns),
            self._row_sum[self._problem.shape.trained_columns],
            alpha=-self._scale,
        )

    def add_to_hidden(self, gradient: torch.Tensor) -> None:
        """To the gradient of the hidden states, [N, D]."""
        gradient.addr_(self._d, smoothed_weight(self._problem), alpha=-self._scale)

    def add_to_bias(self, gradient: torch.Tensor) -> None:
        """To the gradient of the bias, [V]."""
        gradient.sub_(smoothing_weights(self._problem, slice(0, gradient.shape[0])) * self._d.sum())
