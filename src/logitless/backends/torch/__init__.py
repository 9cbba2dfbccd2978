"""Torch operations in row chunks or vocabulary windows: for CPUs, and devices without kernels of their own."""

from __future__ import annotations

import torch

from logitless.backends.contract import (
    AffineCoefficients,
    Coefficients,
    Gradients,
    Problem,
    Schedule,
    Shape,
    Statistics,
    TensorForm,
)
from logitless.backends.torch import dense, sampled
from logitless.backends.torch.dense import forward_with_gradients as forward_with_gradients
from logitless.backends.torch.dense import recomputed as recomputed
from logitless.backends.torch.memory import workspace as workspace

READS_MATRIX = False


def unsupported(shape: Shape) -> str | None:
    """None: it serves every problem."""
    del shape
    return None


def window_multiple(shape: Shape) -> int:
    """Any window will do."""
    del shape
    return 1


def cost(shape: Shape, schedule: Schedule) -> float | None:
    """None: the planner's order of preference decides."""
    del shape, schedule


def saved_forms(shape: Shape, schedule: Schedule) -> list[TensorForm]:
    """What ``forward`` leaves under a schedule."""
    if schedule.strategy == "sampled":
        return sampled.saved_forms(shape)
    return dense.saved_forms(shape, schedule)


def forward(problem: Problem, schedule: Schedule, ahead: AffineCoefficients | None) -> Statistics:
    """Statistics of every row, and what the schedule keeps for the backward pass."""
    del ahead
    return (sampled if schedule.strategy == "sampled" else dense).forward(problem, schedule)


def backward(problem: Problem, schedule: Schedule, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Gradients from statistics and coefficients."""
    if schedule.strategy == "sampled":
        return sampled.backward(problem, statistics, coefficients)
    return dense.backward(problem, schedule, statistics, coefficients)


def finish(problem: Problem, schedule: Schedule, statistics: Statistics, upstream: torch.Tensor) -> Gradients:
    """Never asked for: no schedule of this backend prepares gradients."""
    raise NotImplementedError
