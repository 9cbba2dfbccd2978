"""Statistics of some rows, gathered window by window.

The state is that of the streaming softmax: the largest logit so far (seeded with -inf), and sums of exponentials taken
against it. Merging a window rescales the sums; rows that have seen only -inf keep a reference of 0 so that no
``(-inf) - (-inf)`` is formed.
"""

from __future__ import annotations

import torch

from logitless.backends.contract import Problem, Statistics
from logitless.backends.torch.tiles import LOWEST_LOGIT, Projection
from logitless.options import BLOCK
from logitless.sampling import block_count, block_sums


class RunningStatistics:
    """Statistics of a slice of a problem's rows."""

    def __init__(self, problem: Problem, rows: slice) -> None:
        """Nothing seen yet."""
        shape, device = problem.shape, problem.hidden.device
        count, wanted = rows.stop - rows.start, shape.statistics
        self._target = problem.target[rows]

        def floats(value: float) -> torch.Tensor:
            return torch.full((count,), value, dtype=shape.statistics_dtype, device=device)

        def integers() -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        self._maximum, self._sum, self._target_logit = floats(-torch.inf), floats(0), floats(0)
        self._weighted = floats(0) if "mean_logit" in wanted else None
        self._smooth = floats(0) if problem.smoothing is not None else None
        self._prediction = integers() if "prediction" in wanted else None
        self._rank = integers() if "target_rank" in wanted else None
        self._vocabulary = shape.vocabulary
        self.blocks: torch.Tensor | None = None
        """[R, B] log-sum-exp of each vocabulary block, where the gradient is sampled."""
        if shape.threshold is not None and shape.any_gradient:
            table = (count, block_count(shape.vocabulary))
            self.blocks = torch.empty(table, dtype=shape.statistics_dtype, device=device)

    def add(self, raw: torch.Tensor, columns: slice, projection: Projection) -> None:
        """Take in a tile of raw products [R, U], which stays as it is."""
        rows_at_a_time = projection.scratch.rows(raw.shape[1])
        for start in range(0, raw.shape[0], rows_at_a_time):
            rows = slice(start, min(start + rows_at_a_time, raw.shape[0]))
            z = projection.scratch.take("z", rows.stop - rows.start, raw.shape[1]).copy_(raw[rows])
            self._add_piece(projection.logits_(z, columns), rows, columns, projection)

    def _add_piece(self, z: torch.Tensor, rows: slice, columns: slice, projection: Projection) -> None:
        """Take in logits [R, U], which are used up."""
        local, inside = projection.locate(self._target[rows], columns)
        at_target = z.gather(1, local)
        self._target_logit[rows] = torch.where(inside, at_target, self._target_logit[rows, None])[:, 0]
        if self._rank is not None:
            assert z.shape[1] == self._vocabulary, "a rank needs the whole row"
            self._rank[rows] = (z > at_target).sum(1)
        if self._smooth is not None:
            smoothing = projection.smoothing(columns)
            assert smoothing is not None
            smooth = z @ smoothing if isinstance(smoothing, torch.Tensor) else z.sum(1) * smoothing
            self._smooth[rows] += smooth

        old = self._maximum[rows]
        if self._prediction is None:
            peak = z.amax(1)
        else:
            peak, index = z.max(1)
            first = columns.start == 0
            self._prediction[rows] = torch.where((peak > old) | first, index + columns.start, self._prediction[rows])
        maximum = torch.maximum(old, peak)
        reference = torch.where(maximum == -torch.inf, 0, maximum)
        empty = old == -torch.inf
        shift = torch.where(empty, 0, old - reference)
        decay = torch.where(empty, 0, shift.exp())

        z.sub_(reference[:, None])
        if self._weighted is not None:
            y = projection.scratch.take("y", *z.shape).copy_(z).clamp_min_(LOWEST_LOGIT)
            weighted = y.mul_(z.exp_()).sum(1)
            self._weighted[rows] = decay * (self._weighted[rows] + shift * self._sum[rows]) + weighted
        else:
            z.exp_()
        if self.blocks is None:
            total = z.sum(1)
        else:
            sums = block_sums(z)
            total = sums.sum(1)
            first_block = columns.start // BLOCK
            self.blocks[rows, first_block : first_block + sums.shape[1]] = sums.log_().add_(reference[:, None])
        self._sum[rows] = decay * self._sum[rows] + total
        self._maximum[rows] = maximum

    def finish(self) -> Statistics:
        """Statistics of the rows, all windows seen."""
        reference = torch.where(self._maximum == -torch.inf, 0, self._maximum)
        return Statistics(
            logsumexp=reference + self._sum.log(),
            target_logit=self._target_logit,
            mean_logit=None if self._weighted is None else reference + self._weighted / self._sum,
            smooth_logit=self._smooth,
            prediction=self._prediction,
            target_rank=self._rank,
        )
