"""The exact strategies in torch operations: loss_only, stored, chunked, windowed.

Rounding, with operands narrower than fp32: a product's result is rounded to the operands' dtype, since that is what the
libraries of most devices return, and partial results are added up in fp32. The target's entry of the gradient is kept
out of the products that are added up and is added in fp32, because it dominates a row: rounding it once a partial sum
and once at the end would cost up to 1.4 times the error of one product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from logitless.backends.contract import Coefficients, Gradients, Problem, Schedule, Statistics
from logitless.backends.torch.running import RunningStatistics
from logitless.backends.torch.tiles import Projection, RowValues, slices

# Rows, or vocabulary columns, of a partial product that is rounded to a narrow dtype before it is added up in fp32.
PARTIAL = 4096


def forward(problem: Problem, schedule: Schedule) -> Statistics:
    """Statistics, tile by tile; the last ``kept_windows`` windows' products stay for the backward pass."""
    shape = problem.shape
    projection = Projection(problem, schedule.window)
    windows = list(slices(shape.vocabulary, schedule.window))
    kept_from = len(windows) - schedule.kept_windows
    buffer = projection.buffer(schedule.rows * schedule.window if kept_from > 0 else 0)
    kept: dict[int, torch.Tensor] = {}
    parts = []
    for rows in slices(shape.tokens, schedule.rows):
        running, hidden = RunningStatistics(problem, rows), projection.hidden[rows]
        for index, columns in enumerate(windows):
            if index >= kept_from:
                own = projection.buffer(hidden.shape[0] * (columns.stop - columns.start))
                raw = kept[columns.start] = projection.multiply(hidden, columns, own)
            else:
                raw = projection.multiply(hidden, columns, buffer)
            running.add(raw, columns, projection)
        parts.append(running.finish())
    statistics = concatenate(parts, problem)
    statistics.residuals.logits.update(kept)
    return statistics


def concatenate(parts: list[Statistics], problem: Problem) -> Statistics:
    """Statistics of consecutive slices of rows, put together."""
    if not parts:
        return RunningStatistics(problem, slice(0, 0)).finish()
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> torch.Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    logsumexp, target_logit = joined("logsumexp"), joined("target_logit")
    assert logsumexp is not None
    assert target_logit is not None
    return Statistics(
        logsumexp=logsumexp,
        target_logit=target_logit,
        mean_logit=joined("mean_logit"),
        smooth_logit=joined("smooth_logit"),
        prediction=joined("prediction"),
        target_rank=joined("target_rank"),
    )


def backward(problem: Problem, schedule: Schedule, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Vocabulary windows: products recomputed unless kept, turned into gradients, multiplied twice.

    The window's slice of the weight gradient is written once; the hidden gradient is added up in fp32.
    """
    shape = problem.shape
    projection = Projection(problem, schedule.backward_window)
    rows = RowValues(statistics.logsumexp, problem.target, coefficients)
    entries = torch.zeros_like(statistics.logsumexp)
    gradients = new_gradients(projection)
    hidden_adder = PartialSum(projection, shape.tokens)
    weight_writer = PartialSum(projection, min(schedule.backward_window, shape.vocabulary))
    buffer = None
    for columns in slices(shape.vocabulary, schedule.backward_window):
        raw = statistics.residuals.logits.pop(columns.start, None)
        if raw is None:
            if buffer is None:
                buffer = projection.buffer(shape.tokens * schedule.backward_window)
            raw = projection.multiply(projection.hidden, columns, buffer)
        projection.softmax_gradient_(raw, columns, rows, entries, gradients.bias)
        if gradients.hidden is not None:
            hidden_adder.add(gradients.hidden, raw, projection.weight(columns))
        if gradients.weight is not None:
            projection.restore_targets_(raw, columns, problem.target, entries)
            weight_writer.write(gradients.weight[columns], raw.T, projection.hidden)
        del raw
    if gradients.hidden is not None:
        add_target_rows(gradients.hidden, problem, problem.target, entries)
    return gradients


def forward_with_gradients(
    problem: Problem, schedule: Schedule, coefficients_of: Callable[[Statistics, slice], Coefficients]
) -> tuple[Statistics, Gradients]:
    """Row chunks: all logits of a chunk in one buffer, its statistics, its gradient in their place, two products."""
    shape = problem.shape
    projection = Projection(problem, shape.vocabulary)
    everything = slice(0, shape.vocabulary)
    # One product over the whole vocabulary, unless that would copy the whole weight.
    windows = list(slices(shape.vocabulary, PARTIAL)) if projection.copies_weight else [everything]
    narrow = projection.dtype != projection.statistics_dtype
    weight_windows = list(slices(shape.vocabulary, PARTIAL)) if narrow else [everything]

    buffer = projection.buffer(schedule.rows * shape.vocabulary)
    entries = torch.zeros(schedule.rows, dtype=projection.statistics_dtype, device=buffer.device)
    gradients = new_gradients(projection, weight_dtype=projection.statistics_dtype)
    if gradients.weight is not None:
        gradients.weight.zero_()
    hidden_adder = PartialSum(projection, schedule.rows)
    weight_adder = PartialSum(projection, min(PARTIAL, shape.vocabulary))
    parts = []
    for rows in slices(shape.tokens, schedule.rows):
        hidden, target = projection.hidden[rows], problem.target[rows]
        raw = buffer[: hidden.shape[0] * shape.vocabulary].view(hidden.shape[0], shape.vocabulary)
        for columns in windows:
            torch.mm(hidden, projection.weight(columns).T, out=raw[:, columns])
        running = RunningStatistics(problem, rows)
        running.add(raw, everything, projection)
        part = running.finish()
        parts.append(part)
        chunk_entries = entries[: hidden.shape[0]]
        values = RowValues(part.logsumexp, target, coefficients_of(part, rows))
        projection.softmax_gradient_(raw, everything, values, chunk_entries, gradients.bias)
        if gradients.hidden is not None:
            for columns in windows:
                hidden_adder.add(gradients.hidden[rows], raw[:, columns], projection.weight(columns))
            add_target_rows(gradients.hidden[rows], problem, target, chunk_entries)
        if gradients.weight is not None:
            for columns in weight_windows:
                weight_adder.add(gradients.weight[columns], raw[:, columns].T, hidden)
            for some in slices(hidden.shape[0], TARGET_ROWS):
                gradients.weight.index_add_(0, target[some], hidden[some] * chunk_entries[some, None])
    return concatenate(parts, problem), gradients


class PartialSum:
    """Products added to an accumulator in the statistics dtype, whatever dtype the library's product returns."""

    def __init__(self, projection: Projection, rows: int) -> None:
        """For results of at most ``rows`` rows."""
        self._dtype, self._rows = projection.dtype, rows
        self._partial: torch.Tensor | None = None

    def add(self, accumulator: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """``accumulator += left @ right``."""
        if accumulator.dtype == self._dtype:
            torch.addmm(accumulator, left, right, out=accumulator)
        else:
            accumulator.add_(torch.mm(left, right, out=self._buffer(accumulator)))

    def write(self, result: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """``result = left @ right``."""
        if result.dtype == self._dtype:
            torch.mm(left, right, out=result)
        else:
            result.copy_(torch.mm(left, right, out=self._buffer(result)))

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        if self._partial is None:
            self._partial = torch.empty((self._rows, like.shape[1]), dtype=self._dtype, device=like.device)
        return self._partial[: like.shape[0]]


def new_accumulator(projection: Projection, rows: int) -> torch.Tensor:
    """[rows, D] zeros in the statistics dtype."""
    return torch.zeros(
        (rows, projection.hidden.shape[1]), dtype=projection.statistics_dtype, device=projection.hidden.device
    )


def new_gradients(projection: Projection, weight_dtype: torch.dtype | None = None) -> Gradients:
    """The wanted gradients: zeros in the statistics dtype, but the weight's unwritten, by default in its own dtype."""
    shape, weight = projection.problem.shape, projection.problem.weight
    dtype = weight_dtype or weight.dtype
    bias = torch.zeros(shape.vocabulary, dtype=projection.statistics_dtype, device=weight.device)
    return Gradients(
        hidden=new_accumulator(projection, shape.tokens) if shape.hidden_gradient else None,
        weight=torch.empty(weight.shape, dtype=dtype, device=weight.device) if shape.weight_gradient else None,
        bias=bias if shape.bias_gradient else None,
    )


# Rows of the weight gathered at a time: enough to fill the machine, few enough to be small beside a tile.
TARGET_ROWS = 512


def add_target_rows(
    accumulator: torch.Tensor,  # [R, D]
    problem: Problem,
    target: torch.Tensor,  # [R]
    entries: torch.Tensor,  # [R]
) -> None:
    """``accumulator += entries * W[target]`` in the accumulator's dtype, the weight rounded to the compute dtype."""
    for rows in slices(target.shape[0], TARGET_ROWS):
        weight = problem.weight[target[rows]].to(problem.shape.compute_dtype)
        accumulator[rows].addcmul_(weight.to(accumulator.dtype), entries[rows, None])
