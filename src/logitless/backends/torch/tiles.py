"""Tiles of the projection and what is done to them in place.

A tile is [R, U]: R rows of the hidden states against U consecutive rows of the weight. Its raw products sit in one
buffer in the product dtype; statistics and gradients are formed from it a few rows at a time in a scratch buffer that
stays in cache, in the statistics dtype, by in-place vectorised operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from logitless.backends.contract import Coefficients, Problem, Shape, Statistics

# Elements of one scratch buffer. 2 MiB of fp32 stays in the L2 caches of two cores; on an accelerator, where the start
# of a kernel costs more than a trip to memory, larger pieces are better.
SCRATCH_ELEMENTS = {"cpu": 1 << 19}
SCRATCH_ELEMENTS_ELSEWHERE = 1 << 24

# Stands in for logits of -inf (a bias that masks an entry) where a zero probability would multiply them.
LOWEST_LOGIT = -1e30


def scratch_elements(shape: Shape, rows: int, columns: int) -> int:
    """Elements of one scratch buffer for tiles of [rows, columns]: at least a row, at most the tile."""
    preferred = SCRATCH_ELEMENTS.get(shape.device_type, SCRATCH_ELEMENTS_ELSEWHERE)
    return min(max(preferred, columns), max(1, rows) * columns)


def fuses_softmax(shape: Shape) -> bool:
    """Whether a window's softmax is one call.

    PyTorch's softmax on the CPU is one pass of an exponential accurate to 20 ulp, the one in its log-softmax: 40 ms for
    10^8 elements on two cores, where subtraction, exp and sum take 85. It makes NaN of rows of -inf alone, which a bias
    can give, and entropy and prediction need the logits beside the exponentials.
    """
    return (
        shape.device_type == "cpu"
        and shape.statistics_dtype == torch.float32
        and not shape.biased
        and not shape.statistics & {"mean_gap", "prediction"}
    )


def slices(stop: int, step: int) -> Iterator[slice]:
    """Consecutive slices of at most ``step`` that cover ``[0, stop)``."""
    for start in range(0, stop, step):
        yield slice(start, min(start + step, stop))


@dataclass
class Scratch:
    """Buffers for a few rows of a tile, allocated when first used."""

    elements: int
    dtype: torch.dtype
    device: torch.device

    def __post_init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def rows(self, columns: int) -> int:
        """Rows of that many columns that fit."""
        return max(1, self.elements // columns)

    def take(self, name: str, rows: int, columns: int) -> torch.Tensor:
        """The buffer of that name as a [rows, columns] matrix; its content is undefined."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(self.elements, dtype=self.dtype, device=self.device)
        return self._buffers[name][: rows * columns].view(rows, columns)


@dataclass(frozen=True)
class RowValues:
    """What the gradient of some rows needs besides their logits; each field [R] where nothing else is said.

    Attributes:
        peak: of ``Statistics``.
        log_sum: of ``Statistics``.
        target: vocabulary index.
        target_logit: the target's logit.
        coefficients: of ``Coefficients``; with the sampled gradient, ``a``, ``b`` and ``d`` weighted for one block.
        valid: rows that count, or None for all.
        entries: ``Projection.target_entries`` of the row, once these are known.
        smoothing_outside: whether the rank-one part of the smoothing term is left to the caller.
        share: of the row's sum of exponentials that lies in the window at hand, where the forward pass knew it.
        holds_softmax: whether the tile holds the softmax of the window instead of raw products.
    """

    peak: torch.Tensor
    log_sum: torch.Tensor
    target: torch.Tensor
    target_logit: torch.Tensor
    coefficients: Coefficients
    valid: torch.Tensor | None = None
    entries: torch.Tensor | None = None
    smoothing_outside: bool = False
    share: torch.Tensor | None = None
    holds_softmax: bool = False

    @classmethod
    def of(cls, problem: Problem, statistics: Statistics, coefficients: Coefficients) -> RowValues:
        """The values of all rows of a problem."""
        return cls(
            peak=statistics.peak,
            log_sum=statistics.log_sum,
            target=problem.target,
            target_logit=statistics.target_logit,
            coefficients=coefficients,
            valid=problem.valid_mask,
        )

    def rows(self, rows: slice | torch.Tensor) -> RowValues:
        """The values of some of the rows."""
        return replace(
            self,
            peak=self.peak[rows],
            log_sum=self.log_sum[rows],
            target=self.target[rows],
            target_logit=self.target_logit[rows],
            coefficients=self.coefficients.rows(rows),
            valid=None if self.valid is None else self.valid[rows],
            entries=None if self.entries is None else self.entries[rows],
            share=None if self.share is None else self.share[rows],
        )


def window_share(peak: torch.Tensor, log_sum: torch.Tensor, rows: RowValues) -> torch.Tensor:
    """[R] share of the rows' sums of exponentials of a window with that peak and log-sum [R]."""
    return ((peak - rows.peak) + (log_sum - rows.log_sum)).exp_()


class TargetIndex:
    """Which rows have their target in which window: one sort, then every window's rows are a slice."""

    def __init__(self, target: torch.Tensor, window: int, vocabulary: int) -> None:
        """For targets [R] and windows of ``window`` columns."""
        self._sorted, self._rows = target.sort()
        edges = torch.arange(0, vocabulary + window, window, device=target.device)
        self._starts: list[int] = torch.searchsorted(self._sorted, edges).tolist()
        self._window = window

    def within(self, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows whose target lies in a window that starts at a multiple of the width, and the columns there."""
        number = columns.start // self._window
        here = slice(self._starts[number], self._starts[number + 1])
        return self._rows[here], self._sorted[here] - columns.start


class Projection:
    """Hidden states against windows of the weight, and the elementwise steps between products."""

    def __init__(self, problem: Problem, rows: int, columns: int) -> None:
        """For tiles of at most [rows, columns]."""
        self.problem = problem
        shape = problem.shape
        self.dtype = shape.product_dtype
        self.statistics_dtype = shape.statistics_dtype
        self.device = problem.hidden.device
        self.scratch = Scratch(scratch_elements(shape, rows, columns), self.statistics_dtype, self.device)
        self._bias = None if problem.bias is None else problem.bias.to(self.statistics_dtype)
        self._copied_weight: torch.Tensor | None = None
        self._copies = problem.weight.dtype != self.dtype or shape.weight_layout == "strided"
        self.fused_softmax = fuses_softmax(shape)
        self.leaves_softmax = self.fused_softmax and problem.head.softcap is None
        """Whether a tile that is kept can hold its softmax: the gradient is a multiple of that, and needs no logits."""

    def hidden(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """[R, D] some of the hidden states in the product dtype."""
        return self.problem.hidden_rows(rows).to(self.dtype)

    @property
    def copies_weight(self) -> bool:
        """Whether windows of the weight are copied before they enter a product."""
        return self._copies

    def buffer(self, elements: int) -> torch.Tensor:
        """A flat buffer for raw products."""
        return torch.empty(elements, dtype=self.dtype, device=self.device)

    def weight(self, columns: slice) -> torch.Tensor:
        """[U, D] those rows of the weight in the product dtype; valid until the next call."""
        window = self.problem.weight[columns]
        if not self._copies:
            return window
        if self._copied_weight is None or self._copied_weight.shape[0] < window.shape[0]:
            self._copied_weight = torch.empty(window.shape, dtype=self.dtype, device=window.device)
        return self._copied_weight[: window.shape[0]].copy_(window)

    def multiply(self, hidden: torch.Tensor, columns: slice, buffer: torch.Tensor) -> torch.Tensor:
        """[R, U] raw products of ``hidden`` [R, D] and a window of the weight, in ``buffer``."""
        weight = self.weight(columns)
        raw = buffer[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
        return torch.mm(hidden, weight.T, out=raw)

    def logits_(self, z: torch.Tensor, columns: slice) -> torch.Tensor:
        """Scale, bias and cap, in place on raw products [R, U] in the statistics dtype."""
        head = self.problem.head
        if head.logit_scale != 1:
            z.mul_(head.logit_scale)
        if self._bias is not None:
            z.add_(self._bias[columns])
        if head.softcap is not None:
            z.div_(head.softcap).tanh_().mul_(head.softcap)
        return z

    def softmax_(self, z: torch.Tensor) -> torch.Tensor:
        """Softmax of each row of a piece, in place; returns [R] the rows' log-sum, relative to their largest logit."""
        torch.softmax(z, 1, out=z)
        return z.amax(1).log_().neg_()

    def target_logits(self, raw: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """[R] logits of the targets [R] from their raw products [R], by the same steps as ``logits_``."""
        head = self.problem.head
        z = raw.to(self.statistics_dtype) * head.logit_scale
        if self._bias is not None:
            z = z + self._bias[target]
        return z if head.softcap is None else (z / head.softcap).tanh() * head.softcap

    def smoothing(self, columns: slice) -> torch.Tensor | float | None:
        """The window of the smoothing weights, in the statistics dtype."""
        smoothing = self.problem.smoothing
        return smoothing[columns] if isinstance(smoothing, torch.Tensor) else smoothing

    def softmax_gradient_(
        self,
        raw: torch.Tensor,  # [R, U]
        columns: slice,
        rows: RowValues,
        bias_gradient: torch.Tensor | None,  # [V]
    ) -> None:
        """Turn raw products into their gradient, in place; add its sum over rows to the bias's, targets included.

        Where a target lies in the window its entry is undefined afterwards: ``target_entries`` gives it.
        """
        at_a_time = self.scratch.rows(raw.shape[1])
        if raw.shape[0] <= at_a_time:
            self._softmax_gradient_piece_(raw, columns, rows, bias_gradient)
            return
        for piece in slices(raw.shape[0], at_a_time):
            self._softmax_gradient_piece_(raw[piece], columns, rows.rows(piece), bias_gradient)

    def _softmax_gradient_piece_(
        self, raw: torch.Tensor, columns: slice, rows: RowValues, bias_gradient: torch.Tensor | None
    ) -> None:
        head, c, shape = self.problem.head, rows.coefficients, (raw.shape[0], raw.shape[1])
        in_place = raw.dtype == self.statistics_dtype
        z = raw if in_place else self.scratch.take("z", *shape).copy_(raw)
        if not rows.holds_softmax:
            self.logits_(z, columns)
        chain = None
        if head.softcap is not None:
            chain = torch.div(z, head.softcap, out=self.scratch.take("chain", *shape)).square_().neg_().add_(1)
        if c.b is None and self.fused_softmax:
            share = rows.share
            if share is None:
                peak = z.amax(1)
                share = window_share(peak, self.softmax_(z), rows)
            elif not rows.holds_softmax:
                torch.softmax(z, 1, out=z)
            z.mul_((share * c.a)[:, None])
        else:
            z.sub_(rows.peak[:, None])
            factor = None
            if c.b is not None:
                z.clamp_min_(LOWEST_LOGIT)
                factor = torch.mul(z, c.b[:, None], out=self.scratch.take("factor", *shape)).add_(c.a[:, None])
            z.exp_()
            if rows.share is None:
                unit = rows.log_sum.neg().exp_()
            else:
                total = z.sum(1)
                unit = torch.where(total == 0, rows.share, rows.share / total)  # 0, or NaN as all of the row
            if factor is None:
                z.mul_((unit * c.a)[:, None])
            else:
                z.mul_(unit[:, None]).mul_(factor)
        if c.d is not None:
            _add_outer_(z, -c.d, self.smoothing(columns))
        if chain is not None:
            z.mul_(chain)
        if c.d is not None and rows.smoothing_outside:
            _add_outer_(z, c.d, self.smoothing(columns))
        if rows.valid is not None:
            z.masked_fill_(~rows.valid[:, None], 0)  # a bias that is not finite reaches every row
        if bias_gradient is not None:
            assert rows.entries is not None
            _set_targets_(z, columns, rows.target, rows.entries)  # a sum of probabilities less a count would cancel
            bias_gradient[columns].add_(z.sum(0))
        if head.logit_scale != 1:
            z.mul_(head.logit_scale)
        if not in_place:
            raw.copy_(z)

    def target_chain(self, rows: RowValues) -> torch.Tensor | float:
        """[R] derivative of the cap at the target's logit."""
        cap = self.problem.head.softcap
        return 1.0 if cap is None else 1 - (rows.target_logit / cap).square()

    def product_entries(self, rows: RowValues) -> torch.Tensor:
        """[R] gradient of each row's product with its target's weight."""
        assert rows.entries is not None
        return rows.entries * self.problem.head.logit_scale

    def target_entries(self, rows: RowValues) -> torch.Tensor:
        """[R] gradient at each row's target, one-hot term included, in the statistics dtype: never rounded before.

        It is that of the scaled product, as the bias has it: the product's own is ``logit_scale`` times that.
        """
        c = rows.coefficients
        below = rows.target_logit - rows.peak
        log_p = below - rows.log_sum
        p = log_p.exp()
        entries = (c.a - c.c) * p + c.c * log_p.expm1()  # a p - c, of a p near c
        if c.b is not None:
            entries = entries + c.b * torch.where(p == 0, 0.0, p * below)
        smooth: torch.Tensor | float = 0.0
        if c.d is not None:
            smoothing = self.problem.smoothing
            assert smoothing is not None
            smooth = c.d * (smoothing[rows.target] if isinstance(smoothing, torch.Tensor) else smoothing)
        entries = (entries - smooth) * self.target_chain(rows)
        if rows.smoothing_outside:
            entries = entries + smooth
        return entries if rows.valid is None else torch.where(rows.valid, entries, 0.0)


def _add_outer_(z: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | float | None) -> None:
    """``z += rows x columns`` in place, where ``columns`` may be one number for all."""
    if isinstance(columns, torch.Tensor):
        z.addr_(rows, columns)
    else:
        assert columns is not None
        z.add_((rows * columns)[:, None])


def _set_targets_(
    z: torch.Tensor,  # [R, U]
    columns: slice,
    target: torch.Tensor,  # [R]
    entries: torch.Tensor,  # [R]
) -> None:
    """The entries where targets lie in the window, in place; no device is asked which."""
    inside = ((target >= columns.start) & (target < columns.stop))[:, None]
    place = torch.where(inside, target[:, None] - columns.start, 0)
    z.scatter_(1, place, torch.where(inside, entries[:, None], z.gather(1, place)))
