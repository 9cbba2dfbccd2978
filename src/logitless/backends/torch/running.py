"""Statistics of some rows, gathered window by window.

The state is that of the streaming softmax: the largest logit so far (seeded with -inf), and sums taken against it.
Merging a window rescales the sums; rows that have seen only -inf keep a reference of 0 so that no ``(-inf) - (-inf)``
is formed. All sums are of logits less the reference, never of logits, so that what all logits of a row have in common
costs no accuracy.
"""

from __future__ import annotations

import torch

from logitless.backends.contract import Problem, Statistics
from logitless.backends.torch.tiles import LOWEST_LOGIT, Projection, TargetIndex, slices
from logitless.options import BLOCK
from logitless.sampling import block_count, block_sums


class RunningStatistics:
    """Statistics of a slice of a problem's rows."""

    def __init__(self, problem: Problem, rows: slice) -> None:
        """Nothing seen yet."""
        shape, device = problem.shape, problem.hidden.device
        count, wanted = rows.stop - rows.start, shape.statistics
        self._target = problem.target[rows]
        self._rank_above = None if problem.rank_above is None else problem.rank_above[rows]

        def floats(value: float) -> torch.Tensor:
            return torch.full((count,), value, dtype=shape.statistics_dtype, device=device)

        def integers() -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int64, device=device)

        self._maximum, self._sum, self._target_logit = floats(-torch.inf), floats(0), floats(0)
        self._weighted = floats(0) if "mean_gap" in wanted else None
        self._smooth = floats(0) if problem.smoothing is not None else None
        self._smoothing_seen: torch.Tensor | float = 0.0
        self._prediction = integers() if "prediction" in wanted else None
        self._rank = integers() if "target_rank" in wanted else None
        self._vocabulary = shape.vocabulary
        self._index: TargetIndex | None = None
        self.window = torch.stack((floats(0), floats(-torch.inf)))
        """[2, R] a reference near the last window's logits, and its log-sum relative to that."""
        self._origin = floats(0)  # a logit of the row, that the blocks' log-sum-exps are relative to
        self.blocks: torch.Tensor | None = None
        """[R, B] log-sum-exp of each vocabulary block less a number of the row's, where the gradient is sampled."""
        self.smooth_blocks: torch.Tensor | None = None
        """[R, B] sum of each block's logits weighted by the smoothing, where it is estimated from some of them."""
        if shape.threshold is not None and shape.any_gradient:
            table = (count, block_count(shape.vocabulary))
            self.blocks = torch.empty(table, dtype=shape.statistics_dtype, device=device)
            if shape.estimated and self._smooth is not None:
                self.smooth_blocks = torch.empty_like(self.blocks)

    def add(self, raw: torch.Tensor, columns: slice, projection: Projection, *, leave_softmax: bool = False) -> None:
        """Take in a tile of raw products [R, U]; windows come in order, all of one width.

        The tile stays as it is, or with ``leave_softmax`` holds the softmax of its window.
        """
        if self._index is None:
            self._index = TargetIndex(self._target, raw.shape[1], self._vocabulary)
        hit, local = self._index.within(columns)
        self._target_logit[hit] = projection.target_logits(raw[hit, local], self._target[hit])
        in_place = leave_softmax and raw.dtype == projection.statistics_dtype
        for rows in slices(raw.shape[0], projection.scratch.rows(raw.shape[1])):
            piece = raw[rows]
            z = piece if in_place else projection.scratch.take("z", piece.shape[0], piece.shape[1]).copy_(piece)
            self._add_piece(projection.logits_(z, columns), rows, columns, projection)
            if leave_softmax and not in_place:
                piece.copy_(z)
        if self._smooth is not None:
            self._smoothing_seen = self._smoothing_seen + _total(projection.smoothing(columns), raw.shape[1])

    def _add_piece(self, z: torch.Tensor, rows: slice, columns: slice, projection: Projection) -> None:
        """Take in logits [R, U], which are used up."""
        if self._rank is not None:
            assert z.shape[1] == self._vocabulary, "a rank needs the whole row"
            above = z.gather(1, self._target[rows, None]) if self._rank_above is None else self._rank_above[rows, None]
            self._rank[rows] = (z > above).sum(1)
        if self.smooth_blocks is not None:
            smoothing = projection.smoothing(columns)
            assert smoothing is not None
            self._store_blocks(self.smooth_blocks, block_sums(z * smoothing), rows, columns)

        peak = self._peak(z, rows, columns)
        reference, decay, shift = self._rescale(rows, peak)
        if columns.start == 0:
            self._origin[rows] = reference
        if projection.fused_softmax:
            # ``z`` becomes the window's own softmax.
            if self._smooth is not None:
                self._add_smooth(z.sub_(peak[:, None]), rows, columns, projection, peak - reference, shift)
            log_sum = projection.softmax_(z)
            unit = (peak - reference) + log_sum
            self.window[0, rows], self.window[1, rows] = peak, log_sum
            total = unit.exp()
        else:
            z.sub_(reference[:, None])
            if self._smooth is not None:
                self._add_smooth(z, rows, columns, projection, None, shift)
            if self._weighted is None:
                total = z.exp_().sum(1)
            else:
                y = projection.scratch.take("y", z.shape[0], z.shape[1]).copy_(z).clamp_min_(LOWEST_LOGIT)
                weighted = y.mul_(z.exp_()).sum(1)
                self._weighted[rows] = decay * (self._weighted[rows] + shift * self._sum[rows]) + weighted
                total = z.sum(1)
            unit = torch.zeros_like(reference)
            self.window[0, rows], self.window[1, rows] = reference, total.log()
        if self.blocks is not None:
            unit = unit + (reference - self._origin[rows])
            self._store_blocks(self.blocks, block_sums(z).log_().add_(unit[:, None]), rows, columns)
        self._sum[rows] = decay * self._sum[rows] + total

    @staticmethod
    def _store_blocks(table: torch.Tensor, sums: torch.Tensor, rows: slice, columns: slice) -> None:
        first_block = columns.start // BLOCK
        table[rows, first_block : first_block + sums.shape[1]] = sums

    def _peak(self, z: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
        """[R] the largest of the window's logits; the first NaN's index is the prediction, as of ``torch.argmax``."""
        if self._prediction is None:
            return z.amax(1)
        (peak, index), old = z.max(1), self._maximum[rows]
        better = (peak > old) | (peak.isnan() & ~old.isnan()) | (columns.start == 0)
        self._prediction[rows] = torch.where(better, index + columns.start, self._prediction[rows])
        return peak

    def _add_smooth(
        self,
        z: torch.Tensor,  # [R, U]
        rows: slice,
        columns: slice,
        projection: Projection,
        lower: torch.Tensor | None,  # [R]
        shift: torch.Tensor,  # [R]
    ) -> None:
        """Add the weighted sum of ``z``, logits less the reference, or ``lower`` less than that."""
        smoothing = projection.smoothing(columns)
        assert smoothing is not None
        assert self._smooth is not None
        smooth = z @ smoothing if isinstance(smoothing, torch.Tensor) else z.sum(1) * smoothing
        if lower is not None:
            smooth = smooth + lower * _total(smoothing, z.shape[1])
        self._smooth[rows] = self._smooth[rows] + shift * self._smoothing_seen + smooth

    def _rescale(self, rows: slice, peak: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The new reference, the factor of sums taken against the old one, and the factor's log; 0 before any sum."""
        old = self._maximum[rows]
        maximum = torch.maximum(old, peak)
        reference = torch.where(maximum == -torch.inf, 0, maximum)
        shift = old - reference
        finite_shift = shift.masked_fill(old == -torch.inf, 0)
        self._maximum[rows] = maximum  # and with it ``old``, a view
        return reference, shift.exp(), finite_shift

    def finish(self) -> Statistics:
        """Statistics of the rows, all windows seen."""
        return Statistics(
            peak=torch.where(self._maximum == -torch.inf, 0, self._maximum),
            log_sum=self._sum.log(),
            target_logit=self._target_logit,
            mean_gap=None if self._weighted is None else -self._weighted / self._sum,
            smooth_logit=self._smooth,
            prediction=self._prediction,
            target_rank=self._rank,
        )


def _total(smoothing: torch.Tensor | float | None, columns: int) -> torch.Tensor | float:
    """Sum of the smoothing of a window."""
    assert smoothing is not None
    return smoothing.sum() if isinstance(smoothing, torch.Tensor) else smoothing * columns
