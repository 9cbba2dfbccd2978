"""Rows that count, put first without asking the host how many they are.

``order`` [N] int32 is a permutation of the rows: those that count in their order, then the others in theirs. ``count``
[1] int32 says how many count. Kernels work on rows in that order and stop at the count; rows are taken there by
``gather_rows`` and brought back by ``scatter_rows``.
"""

# A launch takes num_warps and num_stages besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from logitless.backends.contract import ceil_div


@dataclass(frozen=True)
class RowOrder:
    """Where each row goes.

    Attributes:
        order: [N] int32 row of the caller at each place.
        target: [N] int32 targets in that order.
        count: [1] int32 how many of the places count.
    """

    order: torch.Tensor
    target: torch.Tensor
    count: torch.Tensor


@triton.jit
def order_rows_kernel(
    valid_mask,  # [N] bool where MASKED
    target,  # [N] int64
    order,  # [N] int32, written
    packed_target,  # [N] int32, written
    count,  # [1] int32, written
    rows,
    MASKED: tl.constexpr,
    STEP: tl.constexpr,
):
    """A stable partition of the rows by the valid mask. Grid: one program, which walks them twice, STEP at a time."""
    total = rows
    if MASKED:
        total = 0
        for first in range(0, rows, STEP):
            here = first + tl.arange(0, STEP)
            total += tl.sum(tl.load(valid_mask + here, mask=here < rows, other=0).to(tl.int32), 0)
    tl.store(count, total)
    before = 0
    for first in range(0, rows, STEP):
        here = first + tl.arange(0, STEP)
        inside = here < rows
        place = here
        if MASKED:
            keep = tl.load(valid_mask + here, mask=inside, other=0).to(tl.int32)
            kept = before + tl.cumsum(keep, 0)  # up to and with this row
            place = tl.where(keep > 0, kept - 1, total + here - kept)
            before += tl.sum(keep, 0)
        tl.store(order + place, here, mask=inside)
        tl.store(packed_target + place, tl.load(target + here, mask=inside, other=0).to(tl.int32), mask=inside)


@triton.jit
def gather_rows_kernel(
    source, order, count, result, columns, source_stride, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows
):
    """``result[i] = source[order[first_row + i]]``, cast to the result's dtype; zero from the count on.

    Zero times what an ignored row holds, which may be anything, must not reach the weight's gradient. Grid: blocks of
    rows x blocks of columns.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    counts = first_row + row < tl.load(count)
    origin = tl.load(order + first_row + row, mask=row < rows, other=0).to(tl.int64)
    place = source + origin[:, None] * source_stride + column[None, :]
    values = tl.load(place, mask=inside & counts[:, None], other=0.0)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(result + place, values.to(result.dtype.element_ty), mask=inside)


@triton.jit
def scatter_rows_kernel(
    source, order, count, result, columns, first_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr, rows
):
    """``result[order[first_row + i]] = source[i]`` for rows below the count, zero for others. Grid as for gathering."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    counts = first_row + row < tl.load(count)
    origin = tl.load(order + first_row + row, mask=row < rows, other=0).to(tl.int64)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    values = tl.load(source + place, mask=inside & counts[:, None], other=0.0)
    tl.store(result + origin[:, None] * columns + column[None, :], values.to(result.dtype.element_ty), mask=inside)


ROWS, COLUMNS, STEP = 8, 1024, 4096


def order_rows(target: torch.Tensor, valid_mask: torch.Tensor | None) -> RowOrder:
    """The order of rows with these targets [N] int64; ``valid_mask`` [N] bool, None for all."""
    rows = target.shape[0]
    order = torch.empty(rows, dtype=torch.int32, device=target.device)
    packed = torch.empty_like(order)
    count = torch.empty(1, dtype=torch.int32, device=target.device)
    mask = target if valid_mask is None else valid_mask
    order_rows_kernel[(1,)](mask, target, order, packed, count, rows, valid_mask is not None, STEP, num_warps=8)
    return RowOrder(order, packed, count)


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return ceil_div(rows, ROWS), ceil_div(columns, COLUMNS)


def gather_rows(source: torch.Tensor, rows: RowOrder, first_row: int, result: torch.Tensor) -> torch.Tensor:
    """Rows of ``source`` [N, D] from place ``first_row`` on, in ``result`` [M, D] and its dtype; then zeros."""
    count, columns = result.shape
    if count:
        gather_rows_kernel[_grid(count, columns)](
            source,
            rows.order,
            rows.count,
            result,
            columns,
            source.stride(0),
            first_row,
            ROWS,
            COLUMNS,
            count,
            num_warps=4,
        )
    return result


def scatter_rows(source: torch.Tensor, rows: RowOrder, first_row: int, result: torch.Tensor) -> torch.Tensor:
    """Rows [M, D], from place ``first_row`` on, to the caller's rows of ``result`` [N, D]; zeros where none counts."""
    count, columns = source.shape
    if count:
        scatter_rows_kernel[_grid(count, columns)](
            source, rows.order, rows.count, result, columns, first_row, ROWS, COLUMNS, count, num_warps=4
        )
    return result
