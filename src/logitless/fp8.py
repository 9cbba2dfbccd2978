"""Operands of the scan in eight bits: what a product of them computes, for backends to follow and tests to hold.

Each row of the hidden states and of the weight is divided by its largest magnitude over 448 and rounded to e4m3, four
digits of two. A logit's error is then a sum over channels of 2 % of their products, and a few channels make most of it:
real hidden states have some that are ten to a hundred times as large as the rest. Those channels are taken twice:
with what their rounding left over, rounded again, on either side. The product is

    <x, w>  ~  s_x s_w (<q(x), q(w)> + <q(x)_C, r(w)_C> + <r(x)_C, q(w)_C>)

with q a rounded row, r what that left over, rounded, and C the ``MAX_OUTLIERS`` channels whose hidden states have the
largest mean square. On SmolLM2's head that leaves 0.4 of the error for ``2 MAX_OUTLIERS`` more columns.

What all rows of the weight have in common shifts all logits of a token alike, which no softmax sees, and would fill
the eight bits: of a shift of 1e4 they would lose nats. So a mean row w of the weight is subtracted before it is
rounded, and ``<x, w>``, one number for each token, is added to its products in full.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_OUTLIERS = 32
FORMAT = torch.float8_e4m3fn
LARGEST = 448.0
# Least scale of a row, whose inverse is finite: rows of smaller numbers, and of zeros, have this one.
LEAST_SCALE = 2.0**-100
# Rows whose squares are added up at a time, which bounds their copy in fp32.
SUMMED_ROWS = 256
# Rows of the weight, evenly spaced, that the row subtracted from all is the mean of. Any row would be right; the mean
# of this many has a sixty-fourth of their scatter, and costs a few hundredths of reading the weight.
AVERAGED_ROWS = 4096


@dataclass(frozen=True)
class Quantised:
    """A matrix [R, D] in eight bits.

    Attributes:
        values: [R, D] e4m3, in units of the row's scale.
        left_over: [R, C] e4m3, in the same units: what rounding the outlier channels left.
        scale: [R] fp32 (fp64 for fp64 matrices).
    """

    values: torch.Tensor
    left_over: torch.Tensor
    scale: torch.Tensor


def outlier_channels(hidden: torch.Tensor) -> torch.Tensor:
    """[C] int64 ascending indices of the channels of hidden states [N, D] that are taken twice."""
    size = min(MAX_OUTLIERS, hidden.shape[1])
    energy = torch.zeros(hidden.shape[1], dtype=torch.float32, device=hidden.device)
    for rows in hidden.split(SUMMED_ROWS):
        energy += rows.float().square().sum(0)
    return energy.nan_to_num(torch.inf).topk(size).indices.sort().values


def quantize(
    matrix: torch.Tensor,  # [R, D]
    channels: torch.Tensor,  # [C]
) -> Quantised:
    """Rows in eight bits. A row with NaN or infinity has NaN."""
    wide = matrix.to(_wide(matrix.dtype))
    scale = (wide.abs().amax(1) * (1 / LARGEST)).clamp_min(LEAST_SCALE)
    scaled = wide * (1 / scale)[:, None]
    values = scaled.to(FORMAT)
    left_over = scaled[:, channels] - values[:, channels].to(wide.dtype)
    return Quantised(values, left_over.to(FORMAT), scale)


def averaged_rows(weight: torch.Tensor) -> torch.Tensor:
    """[R, D] rows of the weight [V, D] that the row subtracted from all is the mean of."""
    return weight[:: max(1, weight.shape[0] // AVERAGED_ROWS)]


def mean_row(weight: torch.Tensor) -> torch.Tensor:
    """[D] mean of some rows of the weight [V, D], in fp32, or fp64."""
    total = torch.zeros(weight.shape[1], dtype=_wide(weight.dtype), device=weight.device)
    some = averaged_rows(weight)
    for rows in some.split(SUMMED_ROWS):
        total += rows.to(total.dtype).sum(0)
    return total / some.shape[0]


def left_operand(matrix: torch.Tensor, channels: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """[R, D + 2 C + 1] what a product takes of the hidden states, scales multiplied in; in fp32, or fp64."""
    quantized = quantize(matrix, channels)
    values = quantized.values.to(quantized.scale.dtype)
    left_over = quantized.left_over.to(quantized.scale.dtype)
    shift = (matrix.to(mean.dtype) @ mean).to(values.dtype)[:, None]
    return torch.cat((torch.cat((values, values[:, channels], left_over), 1) * quantized.scale[:, None], shift), 1)


def right_operand(matrix: torch.Tensor, channels: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """[R, D + 2 C + 1] what it takes of the weight, whose ``mean_row`` is subtracted."""
    quantized = quantize(matrix.to(mean.dtype) - mean, channels)
    values = quantized.values.to(quantized.scale.dtype)
    left_over = quantized.left_over.to(quantized.scale.dtype)
    rounded = torch.cat((values, left_over, values[:, channels]), 1) * quantized.scale[:, None]
    return torch.cat((rounded, torch.ones_like(rounded[:, :1])), 1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
