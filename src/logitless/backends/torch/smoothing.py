"""Sums over rows and over the vocabulary, weighted by the smoothing of the labels."""

from __future__ import annotations

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
    """[D] sum of s_v w_v, a few rows at a time."""
    shape = problem.shape
    total = torch.zeros(shape.hidden, dtype=shape.statistics_dtype, device=problem.weight.device)
    for columns in slices(shape.vocabulary, PARTIAL):
        total += smoothing_weights(problem, columns) @ problem.weight[columns].to(total.dtype)
    return total


def weighted_hidden(problem: Problem, weights: torch.Tensor) -> torch.Tensor:
    """[D] sum of weights_i x_i, a few rows at a time."""
    shape = problem.shape
    total = torch.zeros(shape.hidden, dtype=shape.statistics_dtype, device=weights.device)
    for rows in slices(shape.tokens, PARTIAL):
        total += weights[rows] @ problem.hidden_rows(rows).to(total.dtype)
    return total
