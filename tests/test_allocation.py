"""No strategy that promises it ever makes a tensor of tokens times vocabulary elements."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import logitless
import plain
from allocations import LargestTensor
from implementations import CHUNKED, LOSS_ONLY, WINDOWED, Implementation
from problems import Case, Problem, random_problem

TOKENS, HIDDEN, VOCABULARY = 384, 8, 4131
LOGITS = TOKENS * VOCABULARY  # more than either input holds

TILED = [
    replace(CHUNKED, rows=16),
    replace(WINDOWED, rows=16, window=500),
    Implementation("torch-sampled", "torch", "sampled", rows=16),
]


def gradient_of(implementation: Implementation) -> str | logitless.Sampled:
    # At most 1 / (1/2) + 1 sampled blocks of 128 entries a token and the target's: 512 entries of 4131.
    return logitless.Sampled(threshold=1 / 2) if implementation.strategy == "sampled" else "exact"


def largest(function, problem: Problem, **options) -> LargestTensor:
    """The largest tensor made in forward and backward."""
    with LargestTensor(problem.input, problem.linear_weight) as counter:
        output = problem.call(function, **options)
        if output.requires_grad:
            output.backward(torch.ones_like(output))
    return counter


BUSY = Case(
    dtype=torch.float32,
    vocabulary=VOCABULARY,
    leading=(TOKENS,),
    bias=True,
    class_weight=True,
    token_weight=True,
    ignored=True,
    label_smoothing=0.125,
    z_loss=2.0**-7,
)


def busy_problem(softcap: float | None, dtype: torch.dtype) -> Problem:
    problem = replace(BUSY, softcap=softcap, dtype=dtype).problem()
    narrow = random_problem(TOKENS, HIDDEN, VOCABULARY).to(dtype)
    return replace(problem, input=narrow.input, linear_weight=narrow.linear_weight)


def test_sizes_can_tell():
    assert max(TOKENS * HIDDEN, VOCABULARY * HIDDEN) < LOGITS


def test_counter_sees_the_logits_of_the_two_stage_pipeline():
    problem = random_problem(TOKENS, HIDDEN, VOCABULARY)
    assert largest(plain.linear_cross_entropy, problem).elements >= LOGITS


def test_counter_sees_the_reference():
    problem = random_problem(TOKENS, HIDDEN, VOCABULARY)
    assert largest(logitless.linear_cross_entropy, problem, backend="reference").elements >= LOGITS


def test_counter_sees_inside_custom_operators():
    @torch.library.custom_op("logitless_tests::square", mutates_args=())
    def square(side: torch.Tensor, length: int) -> torch.Tensor:
        return side.new_ones(length, length).sum()

    with LargestTensor() as counter:
        square(torch.zeros(3), 50)
    assert counter.elements == 2500
    assert "new_ones" in counter.operation


def test_counter_sees_backward():
    class Wasteful(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, upstream):
            return upstream.new_ones(77, 77).sum() * upstream

    value = torch.zeros(3, requires_grad=True)
    with LargestTensor() as counter:
        Wasteful.apply(value).sum().backward()
    assert counter.elements == 77 * 77


@pytest.mark.parametrize("implementation", TILED, ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_logits_in_loss_and_gradients(implementation, softcap, dtype):
    problem = busy_problem(softcap, dtype)
    counter = largest(implementation.linear_cross_entropy, problem, gradient=gradient_of(implementation))
    assert counter.elements < LOGITS, counter.operation


@pytest.mark.parametrize("implementation", TILED[1:], ids=str)
def test_no_logits_for_each_token(implementation):
    problem = random_problem(TOKENS, HIDDEN, VOCABULARY).with_options(reduction="none")
    counter = largest(implementation.linear_cross_entropy, problem, gradient=gradient_of(implementation))
    assert counter.elements < LOGITS, counter.operation


@pytest.mark.parametrize("implementation", TILED[1:], ids=str)
def test_no_logits_in_statistics(implementation):
    def summed(*args, **options):
        outputs = logitless.options.TOKEN_OUTPUTS
        statistics = implementation.token_statistics(*args, outputs=outputs, **options)
        return statistics.nll + statistics.logsumexp + statistics.entropy

    counter = largest(summed, random_problem(TOKENS, HIDDEN, VOCABULARY), gradient=gradient_of(implementation))
    assert counter.elements < LOGITS, counter.operation


def test_no_logits_without_gradients():
    problem = random_problem(TOKENS, HIDDEN, VOCABULARY)
    with torch.no_grad():
        counter = largest(LOSS_ONLY.linear_cross_entropy, problem)
    assert counter.elements < LOGITS, counter.operation


@pytest.mark.parametrize("gradient", ["exact", logitless.Sampled(threshold=1 / 2)], ids=["exact", "sampled"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_logits_under_a_workspace(gradient, reduction):
    """A workspace too small for the logits keeps them away without any strategy being forced."""
    problem = random_problem(TOKENS, HIDDEN, VOCABULARY).to(torch.float32).with_options(reduction=reduction)
    workspace = LOGITS * 3
    counter = largest(logitless.linear_cross_entropy, problem, gradient=gradient, workspace=workspace)
    assert counter.elements < LOGITS, counter.operation


@pytest.mark.parametrize("implementation", TILED, ids=str)
def test_frozen_weight_costs_no_gradient(implementation):
    """Nothing of the weight's size is made where the weight is frozen."""
    problem = random_problem(16, 600, 2060).to(torch.float32).freeze("linear_weight")
    narrow = replace(implementation, rows=4)
    counter = largest(narrow.linear_cross_entropy, problem, gradient=gradient_of(implementation))
    assert counter.elements < problem.linear_weight.numel(), counter.operation


@pytest.mark.parametrize("implementation", TILED[:2], ids=str)
def test_frozen_input_costs_no_gradient(implementation):
    """Nothing of the input's size is made where the input is frozen."""
    problem = random_problem(2060, 600, 16).to(torch.float32).freeze("input")
    narrow = replace(implementation, rows=16)
    counter = largest(narrow.linear_cross_entropy, problem, gradient=gradient_of(implementation))
    assert counter.elements < problem.input.numel(), counter.operation
