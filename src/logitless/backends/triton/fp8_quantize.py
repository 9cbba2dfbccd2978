"""Operands of the scan in eight bits, as ``logitless/fp8.py`` defines them.

    scale_r = max(max_k |m_rk| / 448, 2^-100)         of the weight, m less its mean row
    values[r, k] = e4m3(m_rk * (1 / scale_r))          k < D
    then, for the outlier channels c, values[r, c] and e4m3(m_rc * (1 / scale_r) - values[r, c]), the second
    first for the weight

so that one product of [N, W] and [V, W] operands, W = D + 2 MAX_OUTLIERS and a few zeros, has all three terms.
"""

# A launch takes num_warps besides the kernel's own parameters.
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from logitless.backends.contract import Problem, ceil_div
from logitless.backends.triton.launch import Rounded, or_other, readable
from logitless.backends.triton.tiles import interpreted
from logitless.fp8 import FORMAT, LARGEST, LEAST_SCALE, MAX_OUTLIERS, averaged_rows

# Elements to which rows are padded with zeros: 16 bytes, as TMA wants them.
ALIGNMENT = 16
UNIT: tl.constexpr = tl.constexpr(1 / LARGEST)
LEAST: tl.constexpr = tl.constexpr(LEAST_SCALE)
SMALLEST_NORMAL: tl.constexpr = tl.constexpr(2.0**-6)
# Added to a number below 2^22 it leaves the nearest integer in the last digits.
INTEGER: tl.constexpr = tl.constexpr(12582912.0)


@triton.jit
def e4m3(x, INTERPRETED: tl.constexpr):
    """Numbers up to 448 rounded to four digits of two, halves to even.

    A GPU has an instruction for it. The interpreter's forgets to carry from the digits to the exponent and knows no
    numbers below 2^-6, so there the code is put together by hand.
    """
    if INTERPRETED:
        bits, magnitude = x.to(tl.int32, bitcast=True), tl.abs(x)
        normal = (((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) & 0x7FF) - 960
        steps = (magnitude * 512 + INTEGER).to(tl.int32, bitcast=True) - 0x4B400000
        code = tl.where(magnitude >= SMALLEST_NORMAL, tl.minimum(normal, 0x7E), steps)
        code = tl.where(x == x, code, 0x7F) | ((bits >> 24) & 0x80)
        result = code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        result = x.to(tl.float8e4nv)
    return result


@triton.jit
def column_squares_kernel(
    matrix,  # [R, stride]
    valid_mask,  # [R] bool where MASKED
    sums,  # [segments, columns] fp32, written
    stride,
    rows,
    columns,
    segment,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Sums of squares over each ``segment`` rows that count. Grid: COLUMNS columns x segments. Deterministic."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1) * segment
    end = tl.minimum(first + segment, rows)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        if MASKED:
            inside = inside & tl.load(valid_mask + row, mask=inside, other=0).to(tl.int1)
        place = row.to(tl.int64)[:, None] * stride + column[None, :]
        values = tl.load(matrix + place, mask=inside[:, None] & (column < columns)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(values * values, 0)
    tl.store(sums + tl.program_id(1).to(tl.int64) * columns + column, total, mask=column < columns)


@triton.jit
def row_part(source, mean, column, columns, WEIGHT: tl.constexpr):
    """Some of a row's numbers, of the weight less the mean row; and of the hidden states their part of the product."""
    x = tl.load(source + column, mask=column < columns, other=0.0).to(tl.float32)
    m = tl.load(mean + column, mask=column < columns, other=0.0)
    shift = 0.0
    if WEIGHT:
        x -= m
    else:
        shift = tl.sum(x * m, 0)
    return x, shift


@triton.jit
def quantize_rows_kernel(
    matrix,  # [R, stride]
    channels,  # [taken] int64
    mean,  # [columns] fp32
    values,  # [R, width] e4m3, written
    scales,  # [R] fp32, written
    shifts,  # [R] fp32, written unless WEIGHT
    stride,
    width,
    columns,
    taken,
    padding,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    MAX_OUTLIERS: tl.constexpr,
    PADDING: tl.constexpr,
    WEIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A row's scale and rounded values, its outlier channels again and what their rounding left, zeros for the rest.

    Of a row of the weight the mean row is subtracted before; a row of the hidden states has its product with that too.
    Grid: rows. WHOLE: COLUMNS are all, so that they are read once.
    """
    row = tl.program_id(0).to(tl.int64)
    source, result = matrix + row * stride, values + row * width
    column = tl.arange(0, COLUMNS)
    x, shift = row_part(source, mean, column, columns, WEIGHT)  # pyright: ignore
    largest = tl.max(tl.abs(x), 0)
    if not WHOLE:
        for first in range(COLUMNS, columns, COLUMNS):
            x, more = row_part(source, mean, first + column, columns, WEIGHT)  # pyright: ignore
            shift += more
            largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    if not WEIGHT:
        tl.store(shifts + row, shift)
    scale = tl.maximum(largest * UNIT, LEAST)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scales + row, scale)
    if WHOLE:
        tl.store(result + column, e4m3(x * inverse, INTERPRETED), mask=column < columns)
    else:
        for first in range(0, columns, COLUMNS):
            x, _ = row_part(source, mean, first + column, columns, WEIGHT)  # pyright: ignore
            tl.store(result + first + column, e4m3(x * inverse, INTERPRETED), mask=first + column < columns)

    lane = tl.arange(0, MAX_OUTLIERS)
    channel = tl.load(channels + lane, mask=lane < taken, other=0)
    outlier = tl.load(source + channel, mask=lane < taken, other=0.0).to(tl.float32)
    if WEIGHT:
        outlier -= tl.load(mean + channel, mask=lane < taken, other=0.0)
    outlier *= inverse
    rounded = e4m3(outlier, INTERPRETED)
    left_over = e4m3(outlier - rounded.to(tl.float32), INTERPRETED)
    tl.store(result + columns + lane, left_over if WEIGHT else rounded)
    tl.store(result + columns + MAX_OUTLIERS + lane, rounded if WEIGHT else left_over)
    rest = tl.arange(0, PADDING)
    tl.store(
        result + columns + 2 * MAX_OUTLIERS + rest,
        tl.zeros((PADDING,), tl.float32).to(tl.float8e4nv),
        mask=rest < padding,
    )


SUMMED_ROWS, SUMMED_COLUMNS, SUMMED_SEGMENTS = 32, 128, 64
WIDEST = 8192


def operand_width(hidden: int) -> int:
    """W, elements of a row of an operand."""
    return ceil_div(hidden + 2 * MAX_OUTLIERS, ALIGNMENT) * ALIGNMENT


def outlier_channels(
    hidden: torch.Tensor,  # [N, D]
    valid_mask: torch.Tensor | None,  # [N]
) -> torch.Tensor:
    """[C] int64 ascending indices of the channels whose mean square over the rows that count is largest."""
    rows, columns = hidden.shape
    segment = max(1, ceil_div(rows, SUMMED_SEGMENTS))
    sums = torch.empty(ceil_div(rows, segment), columns, dtype=torch.float32, device=hidden.device)
    column_squares_kernel[(ceil_div(columns, SUMMED_COLUMNS), sums.shape[0])](
        hidden,
        hidden if valid_mask is None else valid_mask,
        sums,
        hidden.stride(0),
        rows,
        columns,
        segment,
        ROWS=SUMMED_ROWS,
        COLUMNS=SUMMED_COLUMNS,
        MASKED=valid_mask is not None,
        num_warps=4,
    )
    return sums.sum(0).nan_to_num(torch.inf).topk(min(MAX_OUTLIERS, columns)).indices.sort().values


def quantize_rows(
    matrix: torch.Tensor,  # [R, D]
    channels: torch.Tensor,  # [C]
    mean: torch.Tensor,  # [D]
    operand: Rounded,
) -> None:
    """Fill an operand of the product, in the order of the weight, or of the hidden states where it has shifts."""
    rows, columns = matrix.shape
    if rows == 0:
        return
    size = min(WIDEST, triton.next_power_of_2(columns))
    values, weight = operand.values, operand.shifts is None
    quantize_rows_kernel[(rows,)](
        matrix,
        channels,
        mean,
        values,
        operand.scales,
        or_other(operand.shifts, operand.scales),
        matrix.stride(0),
        values.stride(0),
        columns,
        channels.shape[0],
        values.shape[1] - columns - 2 * MAX_OUTLIERS,
        COLUMNS=size,
        WHOLE=columns <= size,
        MAX_OUTLIERS=MAX_OUTLIERS,
        PADDING=ALIGNMENT,
        WEIGHT=weight,
        INTERPRETED=interpreted(),
        num_warps=max(1, min(8, size // 2048)),
        enable_fp_fusion=False,  # what rounding left is that of the product rounded to fp32
    )


def new_operand(rows: int, hidden: int, device: torch.device, *, weight: bool) -> Rounded:
    """Unwritten memory for that many rows of the weight or of the hidden states."""
    values = torch.empty(rows, operand_width(hidden), dtype=FORMAT, device=device)
    scales, shifts = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    return Rounded(values, scales, None if weight else shifts)


class Rounding:
    """Hidden states and weight in eight bits, the former some rows at a time."""

    def __init__(self, problem: Problem, rows: int) -> None:
        """For up to that many rows at a time; the weight is rounded at once."""
        self._channels = outlier_channels(problem.hidden, problem.valid_mask)
        weight, device = readable(problem.weight), problem.hidden.device
        self._mean = averaged_rows(weight).mean(0, dtype=torch.float32)
        self._hidden = new_operand(rows, problem.shape.hidden, device, weight=False)
        self._weight = new_operand(problem.shape.vocabulary, problem.shape.hidden, device, weight=True)
        quantize_rows(weight, self._channels, self._mean, self._weight)

    def operands(self, hidden: torch.Tensor) -> tuple[Rounded, Rounded]:
        """Rows [R, D] of the hidden states, and the weight; valid until the next call."""
        rounded = self._hidden.rows(hidden.shape[0])
        quantize_rows(hidden, self._channels, self._mean, rounded)
        return rounded, self._weight
