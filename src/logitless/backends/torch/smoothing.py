"""Sums over rows and over the vocabulary, weighted by the smoothing of the labels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from logitless.backends.contract import Problem
from logitless.backends.torch.dense import PARTIAL
from logitless.backends.torch.tiles import slices


def smoothing_weights(problem: Problem, columns: slice) -> torch.Tensor:
    """[U] the smoothing of some columns, in the statistics dtype."""
    smoothing, dtype = problem.smoothing, problem.shape.statistics_dtype
    assert smoothing is not None
    if isinstance(smoothing, torch.Tensor):
        return smoothing[columns]
    return torch.full((columns.stop - columns.start,), smoothing, dtype=dtype, device=problem.hidden.device)


def smoothed_weight(problem: Problem) -> torch.Tensor:
    """[D] sum of s_v w_v."""
    return weighted_row_sum(
        problem.weight, lambda columns: smoothing_weights(problem, columns), problem.shape.statistics_dtype
    )  # fmt: skip


def weighted_row_sum(
    matrix: torch.Tensor,  # [R, D]
    weights: Callable[[slice], torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """[D] weighted sum of the rows of a matrix, a few at a time, in that dtype."""
    total = torch.zeros(matrix.shape[1], dtype=dtype, device=matrix.device)
    for rows in slices(matrix.shape[0], PARTIAL):
        total += weights(rows) @ matrix[rows].to(dtype)
    return total
