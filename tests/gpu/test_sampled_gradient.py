"""The sampled gradient on the GPU; its statistics are in ``tests/test_sampled.py``, its memory in the peak tests."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import logitless
from implementations import KEEP_ALL
from logitless.options import FLOAT_OUTPUTS
from on_gpu import (
    DEVICE,
    NEEDS_GPU,
    Inputs,
    busy_options,
    captured,
    check,
    differentiated,
    generator,
    inputs_with_strays,
    make_inputs,
    refusing_to_wait,
    take_data_of,
)
from problems import Problem
from tolerance import loss_and_gradients, loss_baseline

pytestmark = NEEDS_GPU


def sampled(threshold: float = 1 / 16, seed: int | None = None) -> logitless.Sampled:
    return logitless.Sampled(threshold, generator=None if seed is None else generator(seed))


def results_of(inputs: Inputs, gradient: logitless.Sampled, **options) -> dict[str, Tensor]:
    return inputs.results(backend="triton", gradient=gradient, **options)


@pytest.mark.parametrize("size", [(2048, 512, 8192), (1, 64, 1000), (17, 136, 515), (150, 64, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_errors_where_everything_is_kept(size, dtype):
    inputs = make_inputs(*size, dtype, ignored=0.25 if size[0] > 100 else 0)
    check(results_of(inputs, sampled(KEEP_ALL)), inputs)


def test_all_options_where_everything_is_kept():
    inputs = make_inputs(1024, 256, 4096, bias=True)
    options = {**busy_options(inputs), "linear_bias": inputs.bias}
    problem = Problem(inputs.hidden, inputs.weight, inputs.target, options)
    ours = loss_and_gradients(logitless.linear_cross_entropy, problem, backend="triton", gradient=sampled(KEEP_ALL))
    loss_baseline(problem).check(ours)


@pytest.mark.parametrize("busy", [False, True], ids=["plain", "busy"])
def test_bits_of_the_deterministic_gradient(busy, request):
    """With and without it the gradients of weight and bias are the same bits, whatever unwritten memory holds."""
    inputs = make_inputs(2048, 512, 8193, bias=True)
    options = busy_options(inputs) if busy else {}
    fast = results_of(inputs, sampled(seed=1), **options)
    request.getfixturevalue("deterministic")
    assert torch.empty(1, device=DEVICE).isnan()
    first, second = (results_of(inputs, sampled(seed=1), **options) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        if name != "hidden":
            assert torch.equal(value, fast[name]), name
    torch.testing.assert_close(first["hidden"], fast["hidden"], rtol=2**-7, atol=1e-8)


def test_gradients_do_not_depend_on_chunks():
    """Rows whose table exists at a time: what is kept is the same, bit for bit."""
    inputs = make_inputs(3000, 256, 8192)
    budgets = {}
    for rows in (1024, 3000):
        with logitless.schedules.force_strategy("sampled", rows=rows):
            budgets[rows] = results_of(inputs, sampled(seed=2))
    assert torch.equal(budgets[1024]["weight"], budgets[3000]["weight"])
    assert torch.equal(budgets[1024]["loss"], budgets[3000]["loss"])


@pytest.mark.parametrize("host_generator", [False, True], ids=["default", "on the host"])
@pytest.mark.parametrize("busy", [False, True], ids=["plain", "busy"])
def test_nothing_waits(host_generator, busy):
    inputs = inputs_with_strays(bias=busy)
    options = busy_options(inputs) if busy else {}
    source = torch.Generator().manual_seed(1) if host_generator else None
    gradient = logitless.Sampled(generator=source)
    for context in (contextlib.nullcontext, contextlib.nullcontext, refusing_to_wait):
        with context():
            inputs.loss(backend="triton", gradient=gradient, **options).backward()
            statistics = logitless.token_statistics(
                inputs.hidden, inputs.weight, inputs.target, outputs=FLOAT_OUTPUTS, gradient=gradient
            )
            sum(getattr(statistics, name).sum() for name in FLOAT_OUTPUTS).backward()


def test_graph_draws_anew():
    """Each replay has the loss of its data, bit for bit, and another sample; their mean nears the exact gradient."""
    inputs = make_inputs()
    graph, results = captured(lambda: inputs.results(backend="triton", gradient=sampled()))
    other = make_inputs(seed=1, ignored=0.5)
    take_data_of(inputs, other)
    exact = other.results(backend="triton")["weight"].float()
    draws = []
    for _ in range(16):
        graph.replay()
        draws.append(results["weight"].float().clone())
    expected = other.results(backend="triton", gradient=sampled())["loss"]
    assert torch.equal(results["loss"], expected)
    assert not torch.equal(draws[0], draws[1])
    errors = [(draw - exact).norm().item() for draw in draws]
    mean = (torch.stack(draws).mean(0) - exact).norm().item()
    assert 0.15 < mean / (sum(errors) / len(errors)) < 0.4  # a quarter, but for chance and rounding


def test_target_out_of_range():
    """Its gradients are NaN; other tokens' losses and hidden gradients stay finite."""
    inputs = make_inputs(300, 256, 4096)
    stray = replace(inputs, target=inputs.target.clone())
    stray.target[3] = 4096
    results = results_of(stray, sampled(seed=1), reduction="sum")
    assert results["loss"].isnan()
    assert results["hidden"][3].isnan().all()
    assert results["hidden"][torch.arange(300, device=DEVICE) != 3].isfinite().all()
    assert results["weight"].isnan().any()


def test_autocast():
    inputs = make_inputs(2048, 256, 8192, torch.float32)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = inputs.loss(backend="triton", gradient=sampled(KEEP_ALL))
    check(differentiated(loss, inputs), inputs, context=lambda: torch.autocast(DEVICE, torch.bfloat16))


def test_compiled():
    inputs = make_inputs(1024, 256, 4096)

    @torch.compile(fullgraph=True)
    def loss(hidden, weight, target):
        return logitless.linear_cross_entropy(hidden, weight, target, gradient=logitless.Sampled(KEEP_ALL))

    check(differentiated(loss(inputs.hidden, inputs.weight, inputs.target), inputs), inputs)
