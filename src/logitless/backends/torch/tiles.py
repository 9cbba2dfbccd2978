"""Tiles of the projection and what is done to them in place.

A tile is [R, U]: R rows of the hidden states against U consecutive rows of the weight. Its raw products sit in one
buffer in the product dtype; statistics and gradients are formed from it a few rows at a time in a scratch buffer that
stays in cache, in the statistics dtype, by in-place vectorised operations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from logitless.backends.contract import Coefficients, Problem, Shape

# Elements of one scratch buffer. 2 MiB of fp32 stays in the L2 caches of two cores; on an accelerator, where the start
# of a kernel costs more than a trip to memory, larger pieces are better.
SCRATCH_ELEMENTS = {"cpu": 1 << 19}
SCRATCH_ELEMENTS_ELSEWHERE = 1 << 24

# Stands in for logits of -inf (a bias that masks an entry) where a zero probability would multiply them.
LOWEST_LOGIT = -1e30


def product_dtype(shape: Shape) -> torch.dtype:
    """Dtype of the products' operands and results.

    It is the compute dtype but for fp16 on the CPU, whose library products take a hundred times as long as fp32 ones.
    """
    if shape.compute_dtype == torch.float16 and shape.device_type == "cpu":
        return torch.float32
    return shape.compute_dtype


def scratch_elements(shape: Shape, columns: int) -> int:
    """Elements of one scratch buffer for tiles of that many columns: at least a row."""
    return max(SCRATCH_ELEMENTS.get(shape.device_type, SCRATCH_ELEMENTS_ELSEWHERE), columns)


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
    """What the gradient of some rows needs besides their logits; each field [R].

    Attributes:
        logsumexp: of the row.
        target: vocabulary index.
        softmax: weight of the softmax terms ``a`` and ``b``, and of the capped smoothing term; None for 1.
        coefficients: of ``Coefficients``.
        smoothing_outside: whether the rank-one part of the smoothing term is left to the caller.
    """

    logsumexp: torch.Tensor
    target: torch.Tensor
    coefficients: Coefficients
    softmax: torch.Tensor | None = None
    smoothing_outside: bool = False

    def piece(self, rows: slice) -> RowValues:
        """The values of a slice of the rows."""
        return RowValues(
            self.logsumexp[rows],
            self.target[rows],
            self.coefficients.rows(rows),
            None if self.softmax is None else self.softmax[rows],
            self.smoothing_outside,
        )


class Projection:
    """Hidden states against windows of the weight, and the elementwise steps between products."""

    def __init__(self, problem: Problem, columns: int) -> None:
        """For tiles of at most ``columns`` vocabulary columns."""
        self.problem = problem
        shape = problem.shape
        self.dtype = product_dtype(shape)
        self.statistics_dtype = shape.statistics_dtype
        self.hidden = problem.hidden.to(self.dtype)  # [N, D]
        self.scratch = Scratch(scratch_elements(shape, columns), self.statistics_dtype, self.hidden.device)
        self._bias = None if problem.bias is None else problem.bias.to(self.statistics_dtype)
        self._copied_weight: torch.Tensor | None = None
        self._copies = problem.weight.dtype != self.dtype or shape.weight_strided

    @property
    def copies_weight(self) -> bool:
        """Whether windows of the weight are copied before they enter a product."""
        return self._copies

    def buffer(self, elements: int) -> torch.Tensor:
        """A flat buffer for raw products."""
        return torch.empty(elements, dtype=self.dtype, device=self.hidden.device)

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

    def smoothing(self, columns: slice) -> torch.Tensor | float | None:
        """The window of the smoothing weights, in the statistics dtype."""
        smoothing = self.problem.smoothing
        return smoothing[columns] if isinstance(smoothing, torch.Tensor) else smoothing

    def locate(self, target: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """[R, 1] position of each target within the window, and [R, 1] whether it lies there."""
        local = (target - columns.start)[:, None]
        inside = (local >= 0) & (local < columns.stop - columns.start)
        return local.clamp_(0, columns.stop - columns.start - 1), inside

    def softmax_gradient_(
        self,
        raw: torch.Tensor,  # [R, U]
        columns: slice,
        rows: RowValues,
        entries: torch.Tensor,  # [R]
        bias_gradient: torch.Tensor | None,  # [V]
    ) -> None:
        """Turn raw products into their gradient, in place, but for the targets' entries.

        Those are written to ``entries`` for the targets that lie in the window and left 0 in the tile: kept apart in
        the statistics dtype, they reach the gradient of the hidden states unrounded. ``bias_gradient`` is added to.
        """
        for piece in slices(raw.shape[0], self.scratch.rows(raw.shape[1])):
            self._softmax_gradient_piece_(raw[piece], columns, rows.piece(piece), entries[piece], bias_gradient)

    def _softmax_gradient_piece_(
        self,
        raw: torch.Tensor,
        columns: slice,
        rows: RowValues,
        entries: torch.Tensor,
        bias_gradient: torch.Tensor | None,
    ) -> None:
        head, c = self.problem.head, rows.coefficients
        in_place = raw.dtype == self.statistics_dtype
        z = self.logits_(raw if in_place else self.scratch.take("z", *raw.shape).copy_(raw), columns)

        chain = None
        if head.softcap is not None:
            chain = torch.div(z, head.softcap, out=self.scratch.take("chain", *raw.shape))
            chain.square_().neg_().add_(1)
        a, b = c.a, c.b
        smoothing, d = self.smoothing(columns), c.d
        if rows.softmax is not None:
            a = a * rows.softmax
            b = None if b is None else b * rows.softmax
            d = None if d is None or chain is None else d * rows.softmax
        if b is None:
            z.sub_(rows.logsumexp[:, None]).exp_().mul_(a[:, None])
        else:
            z.clamp_min_(LOWEST_LOGIT)
            factor = torch.mul(z, b[:, None], out=self.scratch.take("factor", *raw.shape)).add_(a[:, None])
            z.sub_(rows.logsumexp[:, None]).exp_().mul_(factor)
        if d is not None:
            _add_outer_(z, -d, smoothing)
        local, inside = self.locate(rows.target, columns)
        z.scatter_add_(1, local, torch.where(inside, -c.c[:, None], 0))
        if chain is not None:
            z.mul_(chain)
        if d is not None and rows.smoothing_outside:
            _add_outer_(z, d, smoothing)
        if bias_gradient is not None:
            bias_gradient[columns].add_(z.sum(0))
        if head.logit_scale != 1:
            z.mul_(head.logit_scale)

        at_target = z.gather(1, local)
        entries.copy_(torch.where(inside, at_target, entries[:, None])[:, 0])
        z.scatter_(1, local, at_target.masked_fill_(inside, 0))
        if not in_place:
            raw.copy_(z)

    def restore_targets_(self, raw: torch.Tensor, columns: slice, target: torch.Tensor, entries: torch.Tensor) -> None:
        """Put the targets' entries [R] back into their tile [R, U]."""
        local, inside = self.locate(target, columns)
        raw.scatter_(1, local, torch.where(inside, entries[:, None].to(raw.dtype), raw.gather(1, local)))


def _add_outer_(z: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor | float | None) -> None:
    """``z += rows x columns`` in place, where ``columns`` may be one number for all."""
    if isinstance(columns, torch.Tensor):
        z.addr_(rows, columns)
    else:
        assert columns is not None
        z.add_((rows * columns)[:, None])
