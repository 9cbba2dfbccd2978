"""Kernels over one problem: operands, constants and grids, so that strategies read as steps."""

# A launch takes num_warps and num_stages besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from logitless.backends.contract import Coefficients, Problem, Shape, Statistics, ceil_div
from logitless.backends.triton import tiles
from logitless.backends.triton.forward import combine_kernel, scan_kernel
from logitless.backends.triton.rows import RowOrder, gather_rows, order_rows
from logitless.backends.triton.softmax_gradient import (
    clear_rows_kernel,
    stored_gradient_kernel,
    target_entries_kernel,
)
from logitless.backends.triton.window import window_gradient_kernel
from logitless.options import BLOCK

# Bytes to which the base and the rows of what TMA reads must be aligned.
ALIGNMENT = 16


@dataclass(frozen=True)
class Tables:
    """Statistics of each block of columns, for rows in packed order: [T, R] fp32, None where not wanted.

    Attributes:
        sums: [2, T, R] peak of each block, and log2 of its sum of exponentials relative to that.
        gap: what the logit lies below the block's peak, in the mean of the block's own softmax.
        smooth: sum of the logits less the block's peak, weighted by the smoothing.
        largest: each block's largest logit.
        largest_index: int32 where it is.
    """

    sums: torch.Tensor
    gap: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    largest: torch.Tensor | None = None
    largest_index: torch.Tensor | None = None

    @property
    def peak(self) -> torch.Tensor:
        """[T, R] peak of each block."""
        return self.sums[0]

    @property
    def log_sum(self) -> torch.Tensor:
        """[T, R] log2 of each block's sum of exponentials relative to its peak."""
        return self.sums[1]


@dataclass(frozen=True)
class Rounded:
    """An operand of the scan in eight bits: values [R, W] e4m3 in units of scales [R] fp32.

    ``shifts`` [R] fp32 are added to the products of the hidden states; None for the weight.
    """

    values: torch.Tensor
    scales: torch.Tensor
    shifts: torch.Tensor | None

    def rows(self, count: int) -> Rounded:
        """The first rows of the hidden states."""
        assert self.shifts is not None
        return Rounded(self.values[:count], self.scales[:count], self.shifts[:count])


class Launcher:
    """The kernels, with what does not change between launches on one problem."""

    def __init__(self, problem: Problem, rows: RowOrder | None = None) -> None:
        """Orders the rows unless their order is given; converts the weight where the kernels cannot read it."""
        self.problem, self.shape = problem, problem.shape
        self.device = problem.hidden.device
        self.dtype = self.shape.compute_dtype
        self._index = tiles.device_index(self.device)
        self.rows = order_rows(problem.target, problem.valid_mask) if rows is None else rows
        self.weight = readable(problem.weight.to(self.dtype))
        self._bias = None if problem.bias is None else problem.bias.contiguous()
        self._smoothing = problem.smoothing.contiguous() if isinstance(problem.smoothing, torch.Tensor) else None
        self._uniform = problem.smoothing if isinstance(problem.smoothing, float) else 0.0
        self._head: dict[str, Any] = {"BIAS": problem.bias is not None, "SOFTCAP": problem.head.softcap is not None}
        self.block = table_block(self.shape, self._index)
        # The cap's derivative follows from logits, as these from a softmax: off by the rounding of that over the cap.
        # In 16 bits capped logits are off by less than their softmax where the cap is less than 1.
        cap = problem.head.softcap
        self.keeps_logits = cap is not None and (self.dtype == torch.float32 or cap < 1)

    def tile(self, kind: tiles.Kind) -> tiles.Tile:
        """The tile of a kernel on this device."""
        return tiles.tile(kind, self.dtype.itemsize, self._index)

    def empty(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An unwritten tensor on the problem's device."""
        return torch.empty(size, dtype=dtype, device=self.device)

    def hidden_buffer(self, rows: int) -> torch.Tensor:
        """Unwritten memory for that many rows of hidden states, in the compute dtype."""
        return self.empty(rows, self.shape.hidden, dtype=self.dtype)

    def gather(self, rows: slice, buffer: torch.Tensor) -> torch.Tensor:
        """[R, D] hidden states of places in the packed order, in the buffer."""
        return gather_rows(self.problem.hidden, self.rows, rows.start, buffer[: rows.stop - rows.start])

    def tables(self, rows: int) -> Tables:
        """Unwritten tables for that many rows."""
        blocks, wanted = ceil_div(self.shape.vocabulary, self.block), self.shape.statistics
        predict, rows = "prediction" in wanted, table_rows(rows)
        return Tables(
            sums=self.empty(2, blocks, rows),
            gap=self.empty(blocks, rows) if "mean_gap" in wanted else None,
            smooth=self.empty(blocks, rows) if "smooth_logit" in wanted else None,
            largest=self.empty(blocks, rows) if predict else None,
            largest_index=self.empty(blocks, rows, dtype=torch.int32) if predict else None,
        )

    def scan(
        self,
        hidden: torch.Tensor,  # [R, D]
        first_row: int,
        columns: slice,
        tables: Tables,
        target_logit: torch.Tensor,  # [N]
        softmax: torch.Tensor | None = None,  # [windows, R, U]
        rank: torch.Tensor | None = None,  # [N]
        rounded: tuple[Rounded, Rounded] | None = None,
    ) -> None:
        """Fill the tables' tiles of some columns; keep the tiles' softmax, or logits, in ``softmax`` where given.

        With ``rank``, count the logits above the target's there instead. With ``rounded`` hidden states and weight, the
        product is theirs.
        """
        if hidden.shape[0] == 0 or columns.stop == columns.start:
            return
        tile, head = self.tile("scan" if softmax is None else "store"), self.problem.head
        if rounded is not None:
            tile = tiles.tile("scan", rounded[0].values.element_size(), self._index)
        columns_of_tiles = ceil_div(columns.stop - columns.start, tile.columns)
        programs = min(tiles.num_sms(self._index), ceil_div(hidden.shape[0], tile.rows) * columns_of_tiles)
        absent = tables.log_sum
        if rounded is None:
            operands, scales = self._operands(hidden, tile), (absent, absent, absent)
        else:
            shapes = ([tile.rows, tile.depth], [tile.columns, tile.depth])
            operands = tuple(tma_descriptor(side.values, shape) for side, shape in zip(rounded, shapes, strict=True))
            scales = (rounded[0].scales, or_other(rounded[0].shifts, absent), rounded[1].scales)
        scan_kernel[(programs,)](
            *operands,
            operands[0] if softmax is None else tma_descriptor(softmax, [1, tile.rows, tile.columns]),
            *scales,
            or_other(self._bias, absent),
            or_other(self._smoothing, absent),
            self.rows.target,
            self.rows.count,
            tables.peak,
            tables.log_sum,
            or_other(tables.gap, absent),
            or_other(tables.smooth, absent),
            or_other(tables.largest, absent),
            or_other(tables.largest_index, absent),
            target_logit,
            or_other(rank, absent),
            tables.log_sum.stride(0),
            first_row,
            hidden.shape[0],
            columns.start,
            self.shape.vocabulary,
            columns.stop,
            1 if softmax is None else softmax.shape[2],
            self.shape.hidden if rounded is None else rounded[0].values.shape[1],
            self._uniform,
            head.logit_scale,
            head.softcap or 1.0,
            programs,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            GROUP=tile.group,
            BLOCK=self.block,
            **self._head,
            GAP=tables.gap is not None,
            SMOOTH=tables.smooth is not None,
            SMOOTH_VECTOR=self._smoothing is not None,
            PREDICT=tables.largest is not None,
            RANK=rank is not None,
            STORE=softmax is not None,
            LOGITS=softmax is not None and self.keeps_logits,
            SCALED=rounded is not None,
            PRECISION=input_precision(self.dtype if rounded is None else rounded[0].values.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )

    def combine(
        self,
        tables: Tables,
        target_logit: torch.Tensor,  # [N] packed
        first_row: int,
        rows: int,
        statistics: Statistics,
    ) -> None:
        """Statistics of places ``first_row`` on, at the caller's rows of ``statistics``."""
        if rows == 0:
            return
        absent = tables.log_sum
        combine_kernel[(ceil_div(rows, COMBINED_ROWS),)](
            tables.peak,
            tables.log_sum,
            or_other(tables.gap, absent),
            or_other(tables.smooth, absent),
            absent if tables.smooth is None else self._smoothing_of_blocks(),
            or_other(tables.largest, absent),
            or_other(tables.largest_index, absent),
            target_logit,
            self.rows.order,
            self.rows.count,
            statistics.peak,
            statistics.log_sum,
            statistics.target_logit,
            or_other(statistics.mean_gap, absent),
            or_other(statistics.smooth_logit, absent),
            or_other(statistics.prediction, absent),
            tables.log_sum.stride(0),
            tables.log_sum.shape[0],
            first_row,
            rows,
            ROWS=COMBINED_ROWS,
            BLOCKS=COMBINED_BLOCKS,
            GAP=tables.gap is not None,
            SMOOTH=tables.smooth is not None,
            PREDICT=tables.largest is not None,
            num_warps=4,
        )

    def _smoothing_of_blocks(self) -> torch.Tensor:
        """[T] sum of the smoothing over each block of the tables."""
        vector, vocabulary = self._smoothing, self.shape.vocabulary
        if vector is None:
            sums = self.empty(ceil_div(vocabulary, self.block)).fill_(self._uniform * self.block)
            sums[-1] -= self._uniform * (sums.shape[0] * self.block - vocabulary)
            return sums
        return pad(vector.float(), (0, -vocabulary % self.block)).view(-1, self.block).sum(1)

    def stored_gradient(
        self,
        softmax: torch.Tensor,  # [R, U] of a window, or logits, as ``scan`` kept them
        gradient: torch.Tensor,  # [R, U]
        sums: torch.Tensor,  # [2, T, R] of ``Tables``
        first_row: int,
        columns: slice,
        statistics: Statistics,
        coefficients: Coefficients,
    ) -> None:
        """The window's softmax to the gradient of its logits, which may take its place."""
        rows, flags = softmax.shape[0], self._coefficient_flags(coefficients)
        if rows == 0:
            return
        grid = (ceil_div(rows, GRADIENT_ROWS), ceil_div(columns.stop - columns.start, self.block))
        stored_gradient_kernel[grid](
            softmax,
            gradient,
            sums[0],
            sums[1],
            statistics.peak,
            statistics.log_sum,
            coefficients.a,
            or_other(coefficients.b, coefficients.a),
            or_other(coefficients.d, coefficients.a),
            or_other(self._smoothing, coefficients.a),
            self.rows.order,
            self.rows.count,
            softmax.stride(0),
            gradient.stride(0),
            sums.stride(1),
            first_row,
            rows,
            columns.start,
            columns.stop,
            self._uniform,
            self.problem.head.softcap or 1.0,
            ROWS=GRADIENT_ROWS,
            BLOCK=self.block,
            **flags,
            SOFTCAP=self._head["SOFTCAP"],
            LOGITS=self.keeps_logits,
            num_warps=4,
        )
        self._target_entries(gradient, first_row, columns, statistics, coefficients)

    def window_gradient(
        self,
        hidden: torch.Tensor,  # [N, D]
        gradient: torch.Tensor,  # [N, U]
        columns: slice,
        statistics: Statistics,
        coefficients: Coefficients,
    ) -> None:
        """The gradient of a window's logits, recomputed, in ``gradient``."""
        rows, tile, head = hidden.shape[0], self.tile("window"), self.problem.head
        if rows == 0:
            return
        columns_of_tiles = ceil_div(columns.stop - columns.start, tile.columns)
        programs = min(tiles.num_sms(self._index), ceil_div(rows, tile.rows) * columns_of_tiles)
        clear_rows_kernel[(ceil_div(rows, CLEARED_ROWS),)](
            gradient,
            self.rows.count,
            gradient.stride(0),
            columns.stop - columns.start,
            0,
            rows,
            ROWS=CLEARED_ROWS,
            COLUMNS=1024,
            num_warps=4,
        )
        window_gradient_kernel[(programs,)](
            *self._operands(hidden, tile),
            tma_descriptor(gradient, [tile.rows, tile.columns]),
            or_other(self._bias, coefficients.a),
            or_other(self._smoothing, coefficients.a),
            statistics.peak,
            statistics.log_sum,
            coefficients.a,
            or_other(coefficients.b, coefficients.a),
            or_other(coefficients.d, coefficients.a),
            self.rows.order,
            self.rows.count,
            columns.start,
            columns.stop,
            self.shape.hidden,
            self._uniform,
            head.logit_scale,
            head.softcap or 1.0,
            programs,
            BM=tile.rows,
            BN=tile.columns,
            BK=tile.depth,
            GROUP=tile.group,
            **self._head,
            **self._coefficient_flags(coefficients),
            PRECISION=input_precision(self.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        self._target_entries(gradient, 0, columns, statistics, coefficients)

    def _target_entries(
        self,
        gradient: torch.Tensor,
        first_row: int,
        columns: slice,
        statistics: Statistics,
        coefficients: Coefficients,
    ) -> None:
        c = coefficients
        target_entries_kernel[(ceil_div(gradient.shape[0], TARGET_ROWS),)](
            gradient,
            self.rows.target,
            statistics.target_logit,
            statistics.peak,
            statistics.log_sum,
            c.a,
            or_other(c.b, c.a),
            c.c,
            or_other(c.d, c.a),
            or_other(self._smoothing, c.a),
            self.rows.order,
            self.rows.count,
            gradient.stride(0),
            first_row,
            gradient.shape[0],
            columns.start,
            columns.stop,
            self._uniform,
            self.problem.head.softcap or 1.0,
            ROWS=TARGET_ROWS,
            **self._coefficient_flags(c),
            SOFTCAP=self._head["SOFTCAP"],
            num_warps=4,
        )

    def _coefficient_flags(self, coefficients: Coefficients) -> dict[str, bool]:
        return {
            "B": coefficients.b is not None,
            "SMOOTH": coefficients.d is not None,
            "SMOOTH_VECTOR": self._smoothing is not None,
        }

    def _operands(self, hidden: torch.Tensor, tile: tiles.Tile) -> tuple[TensorDescriptor, TensorDescriptor]:
        return tma_descriptor(hidden, [tile.rows, tile.depth]), tma_descriptor(self.weight, [tile.columns, tile.depth])


def table_rows(rows: int) -> int:
    """Entries from one tile's sums to the next in a table for that many rows: a multiple of 64 bytes."""
    return ceil_div(rows, 16) * 16


def table_block(shape: Shape, index: int | None) -> int:
    """Columns of a block of the tables: those that the sampled gradient keeps or leaves out, else those of a tile."""
    if shape.threshold is not None and shape.any_gradient:
        return BLOCK
    return tiles.tile("scan", shape.compute_dtype.itemsize, index).columns


COMBINED_ROWS, COMBINED_BLOCKS = 16, 64
GRADIENT_ROWS = 32
CLEARED_ROWS = 32
TARGET_ROWS = 128


def input_precision(dtype: torch.dtype) -> Literal["ieee", "tf32"]:
    """How kernels multiply operands of a dtype: as they are, or, of fp32 alone, rounded to TF32 where PyTorch does so.

    ``fp32_precision`` knows what was set by each of PyTorch's interfaces, ``set_float32_matmul_precision``,
    ``allow_tf32`` and itself; the first two refuse to be read once the third was set. "medium" is TF32 on CUDA devices.
    """
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def readable(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix whose rows TMA can read: itself, or a packed copy."""
    aligned = (matrix.data_ptr() | matrix.stride(0) * matrix.element_size()) % ALIGNMENT == 0
    return matrix if matrix.stride(1) == 1 and aligned else matrix.clone(memory_format=torch.contiguous_format)


def tma_descriptor(tensor: torch.Tensor, box: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box)


def or_other(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """What a kernel gets for a tensor it will not touch."""
    return other if tensor is None else tensor
