"""The exact strategies in torch operations: loss_only, stored, chunked, windowed.

Rounding, with operands narrower than fp32: a product's result is rounded to the operands' dtype, since that is what the
libraries of most devices return, and partial results are added up in fp32. The target's entry of the gradient is kept
out of the products that are added up and is added in fp32, because it dominates a row: rounding it once a partial sum
and once at the end would cost up to 1.4 times the error of one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from logitless.backends.contract import (
    WEIGHT_GRADIENT,
    AffineCoefficients,
    Coefficients,
    Gradients,
    Problem,
    Schedule,
    Shape,
    Statistics,
    TensorForm,
    alias_spacing,
)
from logitless.backends.torch.running import RunningStatistics
from logitless.backends.torch.tiles import Projection, RowValues, TargetIndex, slices, window_share

# Rows, or vocabulary columns, of a partial product that is rounded to a narrow dtype before it is added up in fp32.
PARTIAL = 4096
# Rows of a partial product that are added at a time.
ADDED_ROWS = 512


def saved_forms(shape: Shape, schedule: Schedule) -> list[TensorForm]:
    """The buffer of the weight gradient, kept products one window after the other, and the windows' peaks and log-sums.

    With those the backward pass takes each window's share of a row from the forward pass. Recomputed products differ by
    an ulp of the logits where tiles do, which a share made of them would have as its error.
    """
    windows = math.ceil(shape.vocabulary / schedule.window)
    kept = max(0, shape.vocabulary - (windows - schedule.cached_windows) * schedule.window)
    sums = shape.any_gradient and schedule.window == schedule.backward_window and shape.traced is None
    return [
        ((shape.vocabulary, shape.hidden) if schedule.aliased_windows else (0, shape.hidden), shape.weight_dtype),
        ((shape.tokens * kept,), shape.product_dtype),
        ((windows if sums else 0, 2, shape.tokens), shape.statistics_dtype),
    ]


@dataclass(frozen=True)
class Left:
    """What a forward pass leaves, window by window.

    The last ``cached_windows`` have memory of their own. The first ``aliased_windows`` lie in the buffer of the weight
    gradient, each at least one window of rows behind the one before, from the second window of rows on: when the
    backward pass writes the rows of a window, only products of windows before it have been there.
    """

    tensors: tuple[torch.Tensor, ...]
    shape: Shape
    schedule: Schedule

    def place(self, number: int) -> torch.Tensor | None:
        """The flat memory of a window's products, or None where they are not kept."""
        schedule, tokens = self.schedule, self.shape.tokens
        first_kept = math.ceil(self.shape.vocabulary / schedule.window) - schedule.cached_windows
        if number < schedule.aliased_windows:
            alias = self.tensors[WEIGHT_GRADIENT][schedule.window :].view(-1).view(self.shape.product_dtype)
            return alias[number * alias_spacing(self.shape, schedule.window) :]
        if schedule.cached_windows and number >= first_kept:
            return self.tensors[1][(number - first_kept) * schedule.window * tokens :]
        return None

    def window_sums(self, number: int) -> torch.Tensor | None:
        """[2, N] peak and log-sum of the rows' logits within a window, where they were left."""
        return self.tensors[2][number] if self.tensors[2].shape[0] else None


def forward(problem: Problem, schedule: Schedule) -> Statistics:
    """Statistics, tile by tile; the products of some windows stay for the backward pass."""
    shape = problem.shape
    projection = Projection(problem, schedule.rows, schedule.window)
    forms = saved_forms(shape, schedule)
    tensors = tuple(torch.empty(size, dtype=dtype, device=problem.hidden.device) for size, dtype in forms)
    left = Left(tensors, shape, schedule)
    windows = list(slices(shape.vocabulary, schedule.window))
    places = [left.place(number) for number in range(len(windows))]
    buffer = projection.buffer(schedule.rows * schedule.window if None in places else 0)
    parts = []
    for rows in slices(shape.tokens, schedule.rows):
        running, hidden = RunningStatistics(problem, rows), projection.hidden(rows)
        for number, (columns, place) in enumerate(zip(windows, places, strict=True)):
            raw = projection.multiply(hidden, columns, buffer if place is None else place)
            running.add(raw, columns, projection, leave_softmax=place is not None and projection.leaves_softmax)
            sums = left.window_sums(number)
            if sums is not None:
                sums[:, rows] = running.window
        parts.append(running.finish())
    return concatenate(parts, problem).with_saved(tensors)


def recomputed(problem: Problem, schedule: Schedule) -> tuple[torch.Tensor, ...]:
    """What a forward pass saves that keeps nothing for the backward pass: empty tensors."""
    forms = saved_forms(problem.shape, schedule)
    return tuple(torch.empty(size, dtype=dtype, device=problem.hidden.device) for size, dtype in forms)


def concatenate(parts: list[Statistics], problem: Problem) -> Statistics:
    """Statistics of consecutive slices of rows, put together."""
    if not parts:
        return RunningStatistics(problem, slice(0, 0)).finish()
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    names = (field.name for field in fields(Statistics) if field.name != "saved")
    return Statistics(**{name: joined(name) for name in names})


def backward(problem: Problem, schedule: Schedule, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Vocabulary windows: products recomputed unless kept, turned into gradients, multiplied twice.

    The window's slice of the weight gradient is written once; the hidden gradient is added up in fp32.
    """
    shape = problem.shape
    left = Left(statistics.saved, shape, schedule)
    projection = Projection(problem, shape.tokens, schedule.backward_window)
    rows = RowValues.of(problem, statistics, coefficients)
    rows = replace(rows, entries=projection.target_entries(rows))
    entries = projection.product_entries(rows)
    index = TargetIndex(problem.target, schedule.backward_window, shape.vocabulary)
    gradients = new_gradients(projection)
    if schedule.aliased_windows:
        weight_gradient = left.tensors[WEIGHT_GRADIENT]
    else:
        weight_gradient = new_weight_gradient(problem) if problem.main_grad is None else problem.main_grad
    hidden_adder = PartialSum(projection, shape.tokens)
    weight_writer = PartialSum(projection, min(schedule.backward_window, shape.vocabulary))
    buffer, hidden = None, projection.hidden(slice(0, shape.tokens))
    trained = hidden[:, shape.trained_columns]
    for number, columns in enumerate(slices(shape.vocabulary, schedule.backward_window)):
        place = left.place(number)
        size = (shape.tokens, columns.stop - columns.start)
        if place is not None and not shape.functional:
            raw = place[: size[0] * size[1]].view(size)
        else:
            if buffer is None:
                buffer = projection.buffer(shape.tokens * schedule.backward_window)
            if place is None:
                raw = projection.multiply(hidden, columns, buffer)
            else:  # what the forward pass left must stay as it is
                raw = buffer[: size[0] * size[1]].view(size).copy_(place[: size[0] * size[1]].view(size))
        sums = left.window_sums(number)
        here = replace(
            rows,
            share=None if sums is None else window_share(sums[0], sums[1], rows),
            holds_softmax=place is not None and projection.leaves_softmax,
        )
        projection.softmax_gradient_(raw, columns, here, gradients.bias)
        hit, local = index.within(columns)
        if gradients.hidden is not None:
            raw[hit, local] = 0
            hidden_adder.add(gradients.hidden, raw, projection.weight(columns))
        if weight_gradient is not None:
            raw[hit, local] = entries[hit].to(raw.dtype)
            if problem.main_grad is None:
                weight_writer.write(weight_gradient[columns], raw.T, trained)
            else:
                weight_writer.add(weight_gradient[columns], raw.T, trained)
    if problem.main_grad is None:
        gradients.weight = weight_gradient
    if gradients.hidden is not None:
        add_target_rows(gradients.hidden, problem, problem.target, entries)
    return gradients


def forward_with_gradients(
    problem: Problem, schedule: Schedule, ahead: AffineCoefficients
) -> tuple[Statistics, Gradients]:
    """Row chunks: all logits of a chunk in one buffer, its statistics, its gradient in their place, two products.

    Where statistics are merged with those of other shards, that happens while the next chunk is multiplied, in a second
    buffer.
    """
    chunks = _Chunks(problem, schedule, ahead)
    parts, waiting = [], None
    for number, rows in enumerate(slices(problem.shape.tokens, schedule.rows)):
        raw, part = chunks.scan(number, rows)
        parts.append(part)
        if problem.merge is None:
            chunks.add_gradient(raw, rows, part, part)
            continue
        merged = problem.merge(part, rows)
        if waiting is not None:
            chunks.add_gradient(*waiting[:3], waiting[3]())
        waiting = (raw, rows, part, merged)
    if waiting is not None:
        chunks.add_gradient(*waiting[:3], waiting[3]())
    return concatenate(parts, problem), chunks.gradients


class _Chunks:
    """The chunked strategy on one problem: row chunks' logits, and the gradients they add to."""

    def __init__(self, problem: Problem, schedule: Schedule, ahead: AffineCoefficients) -> None:
        """Accumulators of zeros; a buffer of logits, or two to take turns where a chunk waits for other shards."""
        shape = problem.shape
        self._problem, self._ahead = problem, ahead
        self._projection = projection = Projection(problem, schedule.rows, shape.vocabulary)
        self._everything = everything = slice(0, shape.vocabulary)
        # One product over the whole vocabulary, unless that would copy the whole weight.
        self._windows = list(slices(shape.vocabulary, PARTIAL)) if projection.copies_weight else [everything]
        narrow = projection.dtype != projection.statistics_dtype
        self._weight_windows = list(slices(shape.vocabulary, PARTIAL)) if narrow else [everything]
        count = 1 if problem.merge is None else 2
        self._buffers = [projection.buffer(schedule.rows * shape.vocabulary) for _ in range(count)]
        self.gradients = new_gradients(projection)
        if shape.weight_gradient:
            self.gradients.weight = new_accumulator(projection, *shape.weight_gradient_size)
        self._hidden_adder = PartialSum(projection, schedule.rows)
        self._weight_adder = PartialSum(projection, min(PARTIAL, shape.vocabulary))

    def scan(self, number: int, rows: slice) -> tuple[torch.Tensor, Statistics]:
        """A chunk's logits, or their softmax, and its statistics."""
        projection, vocabulary = self._projection, self._problem.shape.vocabulary
        hidden = projection.hidden(rows)
        buffer = self._buffers[number % len(self._buffers)]
        raw = buffer[: hidden.shape[0] * vocabulary].view(hidden.shape[0], vocabulary)
        for columns in self._windows:
            torch.mm(hidden, projection.weight(columns).T, out=raw[:, columns])
        running = RunningStatistics(self._problem, rows)
        running.add(raw, self._everything, projection, leave_softmax=projection.leaves_softmax)
        return raw, running.finish()

    def add_gradient(self, raw: torch.Tensor, rows: slice, part: Statistics, whole: Statistics) -> None:
        """A chunk's gradient, in place of what ``scan`` left, into those of hidden states, weight and bias."""
        problem, projection, gradients = self._problem, self._projection, self.gradients
        trained, target = projection.hidden(rows)[:, problem.shape.trained_columns], problem.target[rows]
        values = RowValues(
            peak=whole.peak,
            log_sum=whole.log_sum,
            target=target,
            target_logit=part.target_logit,
            coefficients=self._ahead.rows(rows).at(whole),
            valid=None if problem.valid_mask is None else problem.valid_mask[rows],
            holds_softmax=projection.leaves_softmax,
        )
        if projection.leaves_softmax:
            values = replace(values, share=window_share(part.peak, part.log_sum, values))
        values = replace(values, entries=projection.target_entries(values))
        entries = projection.product_entries(values)
        projection.softmax_gradient_(raw, self._everything, values, gradients.bias)
        raw[torch.arange(raw.shape[0], dtype=torch.int64, device=raw.device), target] = 0
        if gradients.hidden is not None:
            for columns in self._windows:
                self._hidden_adder.add(gradients.hidden[rows], raw[:, columns], projection.weight(columns))
            add_target_rows(gradients.hidden[rows], problem, target, entries)
        if gradients.weight is not None:
            for columns in self._weight_windows:
                self._weight_adder.add(gradients.weight[columns], raw[:, columns].T, trained)
            for some in slices(trained.shape[0], TARGET_ROWS):
                gradients.weight.index_add_(0, target[some], trained[some] * entries[some, None])


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
            partial = torch.mm(left, right, out=self._buffer(accumulator))
            for rows in slices(partial.shape[0], ADDED_ROWS):  # adding a narrow tensor makes a wide copy of it
                accumulator[rows].add_(partial[rows])

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


def new_accumulator(projection: Projection, *size: int) -> torch.Tensor:
    """Zeros in the statistics dtype."""
    return torch.zeros(size, dtype=projection.statistics_dtype, device=projection.device)


def new_gradients(projection: Projection) -> Gradients:
    """Zeros for hidden states and bias, where wanted; the weight's differs by strategy.

    The bias's is added up a few rows at a time, of terms of both signs: in fp64, where a device has it at no cost.
    """
    shape, device = projection.problem.shape, projection.device
    dtype = torch.float64 if device.type == "cpu" else projection.statistics_dtype
    bias = torch.zeros(shape.vocabulary, dtype=dtype, device=device)
    return Gradients(
        hidden=new_accumulator(projection, shape.tokens, shape.hidden) if shape.hidden_gradient else None,
        weight=None,
        bias=bias if shape.bias_gradient else None,
    )


def new_weight_gradient(problem: Problem) -> torch.Tensor | None:
    """[V, trained columns] unwritten, in the weight's dtype; None where not wanted."""
    shape, weight = problem.shape, problem.weight
    if not shape.weight_gradient:
        return None
    return torch.empty(shape.weight_gradient_size, dtype=weight.dtype, device=weight.device)


# Rows of the weight gathered at a time: enough to fill the machine, few enough to be small beside a tile.
TARGET_ROWS = 256


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
        del weight  # before the next rows are gathered
