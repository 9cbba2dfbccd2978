"""``adapter``: a low-rank addition to the head. The problem is one whose last columns are the adapter's."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import logitless
from allocations import peak_bytes
from implementations import IMPLEMENTATIONS, TORCH, Implementation, moved, on_device
from problems import Case, Problem, generator
from tolerance import (
    Baseline,
    Results,
    loss_and_gradients,
    loss_baseline,
    statistics_and_gradients,
    statistics_baseline,
)

pytestmark = pytest.mark.usefixtures("one_thread")

RANK = 3
STATISTICS = ("nll", "logsumexp", "entropy")
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

BUSY = Case(
    dtype=torch.float32, bias=True, class_weight=True, ignored=True, label_smoothing=0.125, z_loss=2.0**-7, softcap=5.0
)


def split(input: Tensor, linear_weight: Tensor, *, frozen: bool) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Hidden states, weight, and the last columns of both as an adapter."""
    base = linear_weight[:, :-RANK]
    return input[..., :-RANK], base.detach() if frozen else base, (input[..., -RANK:], linear_weight[:, -RANK:])


def frozen_loss(input: Tensor, linear_weight: Tensor, target: Tensor, *, frozen: bool = True, **options) -> Tensor:
    hidden, weight, adapter = split(input, linear_weight, frozen=frozen)
    return logitless.linear_cross_entropy(hidden, weight, target, adapter=adapter, **options)


def frozen_statistics(input: Tensor, linear_weight: Tensor, target: Tensor, **options) -> dict[str, Tensor]:
    hidden, weight, adapter = split(input, linear_weight, frozen=True)
    found = logitless.token_statistics(hidden, weight, target, adapter=adapter, outputs=STATISTICS, **options)
    return {name: getattr(found, name) for name in STATISTICS}


def by(implementation: Implementation, function):
    def call(*args, **options):
        options = {"backend": implementation.backend, "gradient": implementation.gradient, **options}
        with implementation.forced():
            found = on_device(function, *args, **options)
        return {k: moved(v, "cpu") for k, v in found.items()} if isinstance(found, dict) else moved(found, "cpu")

    return call


def without_base(baseline: Baseline) -> Baseline:
    """The same where nothing but the adapter's columns of the weight has a gradient."""

    def cleared(results: Results) -> Results:
        gradient = results["linear_weight"].clone()
        gradient[:, :-RANK] = 0
        return {**results, "linear_weight": gradient}

    return replace(
        baseline,
        exact=cleared(baseline.exact),
        plain=cleared(baseline.plain),
        accumulated=cleared(baseline.accumulated),
    )


@each_implementation
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_and_gradients(implementation, dtype, reduction):
    if reduction == "none" and not implementation.any_upstream:
        pytest.skip("this strategy needs a reduced loss")
    problem = replace(BUSY, dtype=dtype, reduction=reduction).problem()
    results = loss_and_gradients(by(implementation, frozen_loss), problem)
    without_base(loss_baseline(problem)).check(results)


@pytest.mark.parametrize("implementation", [i for i in IMPLEMENTATIONS if i.any_upstream], ids=str)
def test_statistics(implementation):
    problem = Case(dtype=torch.float32, bias=True, ignored=True, softcap=5.0).head_problem()
    results = statistics_and_gradients(by(implementation, frozen_statistics), problem)
    without_base(statistics_baseline(problem)).check(results)


@pytest.mark.parametrize("implementation", TORCH, ids=str)
def test_weight_with_a_gradient_of_its_own(implementation):
    def loss(*args, **options):
        return frozen_loss(*args, frozen=False, **options)

    problem = BUSY.problem()
    loss_baseline(problem).check(loss_and_gradients(by(implementation, loss), problem))


@pytest.mark.parametrize("implementation", TORCH, ids=str)
def test_adapter_without_a_gradient(implementation):
    """Then the hidden states alone have one."""
    problem = BUSY.problem().freeze("linear_weight")
    loss_baseline(problem).check(loss_and_gradients(by(implementation, frozen_loss), problem))


@pytest.mark.parametrize("implementation", TORCH, ids=str)
@each_dtype
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(implementation, dtype, autocast):
    """Both weights side by side, whatever their dtype is to autocast's."""

    def under_autocast(*args, **options):
        with torch.autocast("cpu", autocast):
            return frozen_loss(*args, **options)

    problem = replace(BUSY, dtype=dtype).problem()
    results = loss_and_gradients(by(implementation, under_autocast), problem)
    without_base(loss_baseline(problem, torch.autocast("cpu", autocast))).check(results)


@pytest.mark.parametrize("gradient", ["exact", logitless.Sampled()], ids=str)
def test_no_gradient_of_the_base_is_formed(gradient):
    """No tensor of the weight's size is allocated in the backward pass: the copy of both weights is the forward's."""
    tokens, hidden, vocabulary = 32, 64, 16384
    input = torch.randn(tokens, hidden + RANK, generator=generator(1)).requires_grad_()
    weight = torch.randn(vocabulary, hidden + RANK, generator=generator(2)).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), generator=generator(3))
    base = weight[:, :-RANK].detach()
    low, appended = input[:, -RANK:].detach().requires_grad_(), weight[:, -RANK:].detach().clone().requires_grad_()
    loss = logitless.linear_cross_entropy(input[:, :-RANK], base, target, adapter=(low, appended), gradient=gradient)
    assert peak_bytes(loss.backward) < vocabulary * hidden * weight.element_size()
    assert appended.grad.shape == (vocabulary, RANK)


def test_dtypes():
    """Hidden states and weight of an adapter in fp32 beside a head in bf16; each gradient has its tensor's dtype."""
    problem: Problem = replace(BUSY, dtype=torch.bfloat16).problem()
    hidden, weight, adapter = split(problem.input.detach(), problem.linear_weight.detach(), frozen=True)
    low, appended = (part.float().requires_grad_() for part in adapter)
    hidden = hidden.clone().requires_grad_()
    logitless.linear_cross_entropy(hidden, weight, problem.target, adapter=(low, appended)).backward()
    assert (hidden.grad.dtype, low.grad.dtype, appended.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def given(**changes) -> dict:
    tensors = {
        "input": torch.zeros(4, 6),
        "linear_weight": torch.zeros(9, 6),
        "target": torch.zeros(4, dtype=torch.int64),
        "adapter": (torch.zeros(4, 2), torch.zeros(9, 2)),
    }
    return {**tensors, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"adapter": torch.zeros(4, 2)}, TypeError, "adapter must be a pair of tensors, hidden states and weight"),
        ({"adapter": (torch.zeros(4, 2), 1)}, TypeError, "adapter[1] must be a torch.Tensor, got int"),
        ({"adapter": (torch.zeros(4, 2), torch.zeros(8, 2))}, ValueError, "adapter[1] must have shape (9, R)"),
        ({"adapter": (torch.zeros(3, 2), torch.zeros(9, 2))}, ValueError, "adapter[0] must have shape (4, 2)"),
        ({"main_grad": torch.zeros(9, 6)}, ValueError, "main_grad must be None with adapter"),
    ],
)
def test_errors(changes, error, words):
    with pytest.raises(error, match=re.escape(words)):
        logitless.linear_cross_entropy(**given(**changes))
