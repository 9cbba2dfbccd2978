"""Gradients of scalar outputs, prepared with the loss for an upstream gradient of 1.

``stored`` with ``prepared``: one product gives all logits, one kernel the statistics and, in the logits' place, their
gradient; the backward pass is two products. The upstream gradient enters with the hidden states on the way to the
weight gradient, and after the product of the hidden gradient: exact if it is a power of two, such as 1, and one more
rounding of each if not.

``chunked``: the same chunk by chunk, gradients and all, accumulated in fp32; the upstream gradient scales them before
they are rounded.
"""

from __future__ import annotations

import torch

from logitless.backends.contract import (
    AffineCoefficients,
    Gradients,
    Problem,
    Schedule,
    Shape,
    Statistics,
    TensorForm,
)
from logitless.backends.triton.dense import new_statistics, padded, slices
from logitless.backends.triton.launch import readable
from logitless.backends.triton.products import multiply, scale_left
from logitless.backends.triton.rowwise import gradient_in_place, scale_rows
from logitless.backends.triton.softmax_gradient import sum_columns


def saved_forms(shape: Shape) -> list[TensorForm]:
    """The gradient of the logits."""
    return [((shape.tokens, padded(shape.vocabulary)), shape.compute_dtype)]


def _operands(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and weight in the compute dtype."""
    dtype = problem.shape.compute_dtype
    return problem.hidden.to(dtype), readable(problem.weight.to(dtype))


def _empty(problem: Problem, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device=problem.hidden.device)


def forward(problem: Problem, ahead: AffineCoefficients) -> Statistics:
    """Statistics of every row; the gradient of the logits stays for ``finish``."""
    shape, (hidden, weight) = problem.shape, _operands(problem)
    ((size, dtype),) = saved_forms(shape)
    buffer = _empty(problem, *size, dtype=dtype)
    logits = buffer[:, : shape.vocabulary]
    multiply(hidden, weight.T, logits, add=False, scale=1.0)
    statistics = new_statistics(problem)
    gradient_in_place(problem, logits, 0, ahead, statistics)
    return statistics.with_saved((buffer,))


def finish(problem: Problem, schedule: Schedule, statistics: Statistics, upstream: torch.Tensor) -> Gradients:
    """Two products of the logits' gradient, and the upstream gradient."""
    del schedule
    shape, scale, unscaled = problem.shape, problem.head.logit_scale, upstream
    if not scale:  # as in ``scale_left``, but what is left of the forward pass must stay
        scale, upstream = 1.0, upstream * scale
    (buffer,) = statistics.saved
    gradient = buffer[:, : shape.vocabulary]
    weight_gradient = hidden_gradient = bias_gradient = None
    if shape.weight_gradient:
        rows = _empty(problem, shape.tokens, shape.weight_gradient_size[1], dtype=shape.compute_dtype)
        scale_rows(problem.hidden[:, shape.trained_columns], problem.valid_mask, upstream, rows)
        result = problem.main_grad
        if result is None:
            weight_gradient = result = _empty(problem, *shape.weight_gradient_size, dtype=shape.weight_dtype)
        multiply(gradient.T, rows, result, add=problem.main_grad is not None, scale=scale)
        del rows
    if shape.hidden_gradient:
        _, weight = _operands(problem)
        hidden_gradient = _empty(problem, shape.tokens, shape.hidden, dtype=shape.hidden_dtype)
        product = hidden_gradient
        if shape.hidden_dtype != shape.compute_dtype:  # the library could not round its sums to it
            product = _empty(problem, shape.tokens, shape.hidden)
        multiply(gradient, weight, product, add=False, scale=scale)
        scale_rows(product, problem.valid_mask, upstream, hidden_gradient)
        del product
    if shape.bias_gradient:
        bias_gradient = torch.zeros(shape.vocabulary, dtype=torch.float32, device=gradient.device)
        sum_columns(gradient, bias_gradient)
        bias_gradient.mul_(unscaled)
    return Gradients(hidden_gradient, weight_gradient, bias_gradient)


def forward_with_gradients(
    problem: Problem, schedule: Schedule, ahead: AffineCoefficients
) -> tuple[Statistics, Gradients]:
    """Row chunks: logits, their gradient in the same place, two products."""
    shape, (hidden, weight) = problem.shape, _operands(problem)
    statistics = new_statistics(problem)
    at_a_time = min(schedule.rows, shape.tokens)
    buffer = _empty(problem, at_a_time, padded(shape.vocabulary), dtype=shape.compute_dtype)
    valid_mask, cleared = problem.valid_mask, None
    if valid_mask is not None:
        cleared = _empty(problem, at_a_time, shape.weight_gradient_size[1], dtype=shape.compute_dtype)
    hidden_gradient = weight_gradient = bias_gradient = None
    if shape.hidden_gradient:
        hidden_gradient = _empty(problem, shape.tokens, shape.hidden)
    if shape.weight_gradient:
        weight_gradient = _empty(problem, *shape.weight_gradient_size)
        if shape.tokens == 0:
            weight_gradient.zero_()
    if shape.bias_gradient:
        bias_gradient = torch.zeros(shape.vocabulary, dtype=torch.float32, device=buffer.device)
    for rows in slices(0, shape.tokens, schedule.rows):
        gradient = buffer[: rows.stop - rows.start, : shape.vocabulary]
        multiply(hidden[rows], weight.T, gradient, add=False, scale=1.0)
        gradient_in_place(problem, gradient, rows.start, ahead, statistics)
        if bias_gradient is not None:
            sum_columns(gradient, bias_gradient)
        scale = scale_left(gradient, problem.head.logit_scale)
        if hidden_gradient is not None:
            multiply(gradient, weight, hidden_gradient[rows], add=False, scale=scale)
        if weight_gradient is not None:
            here = hidden[rows, shape.trained_columns]
            if valid_mask is not None and cleared is not None:
                here = scale_rows(
                    problem.hidden[rows, shape.trained_columns], valid_mask[rows], None, cleared[: here.shape[0]]
                )
            multiply(gradient.T, here, weight_gradient, add=rows.start > 0, scale=scale)
    return statistics, Gradients(hidden_gradient, weight_gradient, bias_gradient)
