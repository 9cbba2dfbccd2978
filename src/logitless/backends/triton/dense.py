"""The strategies that wait for the upstream gradient: loss_only, stored, windowed.

Columns fall into three runs, any of which may be empty: *aliased* windows, whose softmax lies in the buffer that the
weight gradient will fill; windows that are *recomputed*; and one *kept* run, whose softmax has memory of its own.
``stored`` keeps everything.

What is kept is the softmax within each tile, rounded to the compute dtype, beside the fp32 table of the tiles' sums. A
rounded probability has a relative error of half an ulp, where a rounded logit of 16 has one of 3 % in bf16; so
statistics and gradient are those of unrounded logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from logitless.backends.contract import (
    WEIGHT_GRADIENT,
    Coefficients,
    Gradients,
    Problem,
    Schedule,
    Shape,
    Statistics,
    TensorForm,
    alias_spacing,
    ceil_div,
)
from logitless.backends.triton.fp8_quantize import Rounding
from logitless.backends.triton.launch import Launcher, Tables, table_rows
from logitless.backends.triton.products import multiply, scale_left
from logitless.backends.triton.rows import RowOrder, scatter_rows
from logitless.backends.triton.softmax_gradient import sum_columns

# Elements to which rows of a buffer are padded, so that they can be read and written 128 bytes at a time.
PADDING = 64


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``[start, stop)``."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def runs(shape: Shape, schedule: Schedule) -> tuple[slice, slice, slice]:
    """The aliased, recomputed and kept columns."""
    aliased = min(schedule.aliased_windows * schedule.window, shape.vocabulary)
    windows = ceil_div(shape.vocabulary, schedule.window)
    kept = max(aliased, (windows - schedule.cached_windows) * schedule.window) if schedule.cached_windows else None
    start = shape.vocabulary if kept is None else kept
    return slice(0, aliased), slice(aliased, start), slice(start, shape.vocabulary)


def padded(columns: int) -> int:
    """Elements of a row of a buffer for that many columns."""
    return ceil_div(columns, PADDING) * PADDING


def saved_forms(shape: Shape, schedule: Schedule, blocks: int) -> list[TensorForm]:
    """What ``forward`` leaves: the weight gradient's buffer, kept columns and their table; order, target, count."""
    if schedule.strategy == "loss_only":
        return []
    aliased, _, kept = runs(shape, schedule)
    keeps = aliased.stop > 0 or kept.stop > kept.start
    row = ((shape.tokens,), torch.int32)
    return [
        ((shape.vocabulary, shape.hidden) if aliased.stop else (0,), shape.weight_dtype),
        ((shape.tokens, padded(kept.stop - kept.start)), shape.compute_dtype),
        ((2, blocks, table_rows(shape.tokens)) if keeps else (0,), torch.float32),
        row,
        row,
        ((1,), torch.int32),
    ]


def aliased_views(buffer: torch.Tensor, problem: Problem, schedule: Schedule) -> torch.Tensor:
    """[windows, N, U] places in the weight gradient's buffer, from its second window of rows on."""
    shape = problem.shape
    # What is kept has the compute dtype, which without a GPU need not be that of cuBLAS's products.
    spacing = alias_spacing(shape, schedule.window) * shape.product_dtype.itemsize // shape.compute_dtype.itemsize
    flat = buffer[schedule.window :].view(-1).view(shape.compute_dtype)
    size = (schedule.aliased_windows, shape.tokens, schedule.window)
    return flat.as_strided(size, (spacing, schedule.window, 1))


def new_statistics(problem: Problem) -> Statistics:
    """Zeros, for kernels to fill."""
    shape, device, wanted = problem.shape, problem.hidden.device, problem.shape.statistics

    def zeros(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape.tokens, dtype=dtype, device=device)

    return Statistics(
        peak=zeros(),
        log_sum=zeros(),
        target_logit=zeros(),
        mean_gap=zeros() if "mean_gap" in wanted else None,
        smooth_logit=zeros() if "smooth_logit" in wanted else None,
        prediction=zeros(torch.int64) if "prediction" in wanted else None,
        target_rank=zeros(torch.int64) if "target_rank" in wanted else None,
    )


@dataclass(frozen=True)
class Scratch:
    """What a forward pass needs until it is over, for some rows at a time.

    Attributes:
        hidden: [R, D] gathered hidden states, in the compute dtype.
        tables: of the rows' blocks of columns.
        target_logit: [N] packed.
        rank: [N] int32 logits above the target's, packed; None where not wanted.
    """

    hidden: torch.Tensor
    tables: Tables
    target_logit: torch.Tensor
    rank: torch.Tensor | None

    @classmethod
    def of(cls, launcher: Launcher, rows: int) -> Scratch:
        """For that many rows at a time."""
        ranked = "target_rank" in launcher.shape.statistics
        return cls(
            hidden=launcher.hidden_buffer(rows),
            tables=launcher.tables(rows),
            target_logit=launcher.empty(launcher.shape.tokens),
            rank=torch.zeros_like(launcher.rows.order) if ranked else None,
        )


def scan_rows(
    launcher: Launcher,
    rows: slice,
    runs_of_columns: Sequence[tuple[slice, torch.Tensor | None]],
    scratch: Scratch,
    statistics: Statistics,
    rounding: Rounding | None = None,
) -> None:
    """Fill the statistics of places in the packed order, run after run of columns, keeping some runs' softmax."""
    hidden = launcher.gather(rows, scratch.hidden)
    rounded = None if rounding is None else rounding.operands(hidden)
    for columns, softmax in runs_of_columns:
        launcher.scan(hidden, rows.start, columns, scratch.tables, scratch.target_logit, softmax, rounded=rounded)
    launcher.combine(scratch.tables, scratch.target_logit, rows.start, rows.stop - rows.start, statistics)
    if scratch.rank is not None:
        everything, given = slice(0, launcher.shape.vocabulary), launcher.problem.rank_above
        above = statistics.target_logit if given is None else given
        above = above.index_select(0, launcher.rows.order)
        launcher.scan(hidden, rows.start, everything, scratch.tables, above, rank=scratch.rank)


def write_ranks(launcher: Launcher, scratch: Scratch, statistics: Statistics) -> None:
    """Ranks of all rows, at the caller's places."""
    if scratch.rank is not None:
        assert statistics.target_rank is not None
        statistics.target_rank.index_copy_(0, launcher.rows.order.long(), scratch.rank.long())


def forward(problem: Problem, schedule: Schedule) -> Statistics:
    """Statistics of every row; the softmax of aliased and kept columns stays for the backward pass."""
    launcher, shape = Launcher(problem), problem.shape
    statistics = new_statistics(problem)
    aliased, recomputed, kept = runs(shape, schedule)
    left: list[torch.Tensor] = []
    alias = storage = None
    if schedule.strategy != "loss_only":
        left = [
            torch.empty(size, dtype=dtype, device=launcher.device)
            for size, dtype in saved_forms(shape, schedule, ceil_div(shape.vocabulary, launcher.block))[:2]
        ]
        alias = aliased_views(left[0], problem, schedule) if aliased.stop else None
        storage = left[1][None, :, : kept.stop - kept.start]
    scratch = Scratch.of(launcher, min(schedule.rows, shape.tokens))
    for rows in slices(0, shape.tokens, schedule.rows):
        scan_rows(launcher, rows, ((aliased, alias), (recomputed, None), (kept, storage)), scratch, statistics)
    write_ranks(launcher, scratch, statistics)
    if schedule.strategy == "loss_only":
        return statistics
    order = launcher.rows
    keeps = aliased.stop > 0 or kept.stop > kept.start
    table = scratch.tables.sums if keeps else launcher.empty(0)
    return statistics.with_saved((*left, table, order.order, order.target, order.count))


def recomputed(problem: Problem, schedule: Schedule) -> tuple[torch.Tensor, ...]:
    """What a forward pass saves that keeps nothing for the backward pass: the order of the rows."""
    launcher = Launcher(problem)
    forms = saved_forms(problem.shape, schedule, ceil_div(problem.shape.vocabulary, launcher.block))[:3]
    order = launcher.rows
    kept = (torch.empty(size, dtype=dtype, device=launcher.device) for size, dtype in forms)
    return (*kept, order.order, order.target, order.count)


class _Accumulators:
    """The gradients of a backward pass, to which windows of the logits' gradient add their products."""

    def __init__(self, launcher: Launcher, weight: torch.Tensor | None, single: bool) -> None:
        """``weight``: where the weight's gradient goes if it has a place; ``single``: only one window will come."""
        problem, shape = launcher.problem, launcher.shape
        self._launcher, self._scale, self._started = launcher, problem.head.logit_scale, False
        rounded = single and shape.hidden_dtype == shape.compute_dtype and not shape.sharded
        hidden_dtype = shape.compute_dtype if rounded else torch.float32
        self.hidden = launcher.empty(shape.tokens, shape.hidden, dtype=hidden_dtype) if shape.hidden_gradient else None
        self.weight = weight
        self._add_weight = problem.main_grad is not None
        if shape.weight_gradient and self.weight is None:
            self.weight = problem.main_grad
        if shape.weight_gradient and self.weight is None:
            self.weight = launcher.empty(*shape.weight_gradient_size, dtype=shape.weight_dtype)
        self.bias = None
        if shape.bias_gradient:
            self.bias = torch.zeros(shape.vocabulary, dtype=torch.float32, device=launcher.device)

    def add(self, hidden: torch.Tensor, gradient: torch.Tensor, columns: slice) -> None:
        """Products of a window's gradient [N, U], which may be used up."""
        if self.bias is not None:
            sum_columns(gradient, self.bias[columns])
        scale = scale_left(gradient, self._scale)
        if self.hidden is not None:
            weight = self._launcher.weight[columns]
            multiply(gradient, weight, self.hidden, add=self._started, scale=scale)
        if self.weight is not None:
            trained = hidden[:, self._launcher.shape.trained_columns]
            multiply(gradient.T, trained, self.weight[columns], add=self._add_weight, scale=scale)
        self._started = True


def backward(problem: Problem, schedule: Schedule, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Windows in order: softmax kept or logits recomputed, turned into gradients, multiplied twice."""
    shape, left = problem.shape, statistics.saved
    launcher = Launcher(problem, RowOrder(*left[3:]))
    hidden = launcher.gather(slice(0, shape.tokens), launcher.hidden_buffer(shape.tokens))
    aliased, recomputed, kept = runs(shape, schedule)
    windows = list(slices(recomputed.start, recomputed.stop, schedule.backward_window))
    whole = max(1, kept.stop - kept.start)
    cached_windows = list(slices(kept.start, kept.stop, schedule.backward_window if shape.functional else whole))
    aliased_windows = list(slices(0, aliased.stop, schedule.window))
    weight = left[WEIGHT_GRADIENT] if aliased_windows else None
    single = len(aliased_windows) + len(windows) + len(cached_windows) == 1
    sums = _Accumulators(launcher, weight, single=single)
    if aliased_windows:
        for place, columns in zip(
            aliased_views(left[WEIGHT_GRADIENT], problem, schedule), aliased_windows, strict=True
        ):
            launcher.stored_gradient(place, place, left[2], 0, columns, statistics, coefficients)
            sums.add(hidden, place, columns)
    width = max((columns.stop - columns.start for columns in windows + cached_windows * shape.functional), default=0)
    buffer = launcher.empty(shape.tokens, padded(width), dtype=shape.compute_dtype)
    for columns in windows:
        gradient = buffer[:, : columns.stop - columns.start]
        launcher.window_gradient(hidden, gradient, columns, statistics, coefficients)
        sums.add(hidden, gradient, columns)
    for columns in cached_windows:
        softmax = left[1][:, columns.start - kept.start : columns.stop - kept.start]
        gradient = buffer[:, : columns.stop - columns.start] if shape.functional else softmax
        launcher.stored_gradient(softmax, gradient, left[2], 0, columns, statistics, coefficients)
        sums.add(hidden, gradient, columns)
    del buffer, hidden
    hidden_gradient = None
    if sums.hidden is not None:
        # A shard's is one part of a sum: rounded before, it would be off by a rounding for each rank.
        dtype = torch.float32 if shape.sharded else shape.hidden_dtype
        hidden_gradient = launcher.empty(*sums.hidden.shape, dtype=dtype)
        scatter_rows(sums.hidden, launcher.rows, 0, hidden_gradient)
    return Gradients(
        hidden=hidden_gradient,
        weight=None if problem.main_grad is not None else sums.weight,
        bias=sums.bias,
    )
