"""No call waits for the GPU, so that the host can run ahead of it; and calls can be captured in a CUDA graph."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

import logitless
from logitless.options import FLOAT_OUTPUTS, TOKEN_OUTPUTS
from logitless.schedules import force_strategy
from on_gpu import (
    ANY_UPSTREAM,
    DEVICE,
    NEEDS_GPU,
    Inputs,
    busy_options,
    captured,
    differentiated,
    each_any_upstream,
    each_strategy,
    forced,
    inputs_with_strays,
    make_inputs,
    refusing_to_wait,
    take_data_of,
)

pytestmark = NEEDS_GPU


def test_waiting_is_refused():
    """The measure sees what it is to see, in a backward pass too."""

    class Waiting(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, upstream):
            return upstream * upstream.item()

    number = torch.ones((), device=DEVICE, requires_grad=True)
    with refusing_to_wait(), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()
    doubled = Waiting.apply(number)
    with refusing_to_wait(), pytest.raises(RuntimeError, match="synchroniz"):
        doubled.backward()


@each_strategy
@pytest.mark.parametrize("busy", [False, True], ids=["plain", "busy"])
def test_loss(strategy, busy):
    inputs = inputs_with_strays(bias=busy)
    options = busy_options(inputs) if busy else {}
    for context in (contextlib.nullcontext, refusing_to_wait):  # kernels are compiled in the first round
        with forced(strategy), context():
            loss = inputs.loss(backend="triton", **options)
            loss.backward(retain_graph=True)
            loss.backward()


@each_any_upstream
def test_loss_of_each_token(strategy):
    inputs = inputs_with_strays()
    for context in (contextlib.nullcontext, refusing_to_wait):
        with forced(strategy), context():
            inputs.loss(backend="triton", reduction="none").sum().backward()


@each_any_upstream
def test_statistics(strategy):
    inputs = inputs_with_strays()
    for context in (contextlib.nullcontext, refusing_to_wait):
        with forced(strategy), context():
            statistics = logitless.token_statistics(
                inputs.hidden, inputs.weight, inputs.target, outputs=TOKEN_OUTPUTS, backend="triton"
            )
            sum(getattr(statistics, name).sum() for name in FLOAT_OUTPUTS).backward()


@pytest.mark.parametrize("outputs", [None, TOKEN_OUTPUTS], ids=["loss", "statistics"])
def test_without_gradients(outputs):
    inputs = inputs_with_strays()
    for context in (contextlib.nullcontext, refusing_to_wait):
        with force_strategy("loss_only", rows=300), torch.no_grad(), context():
            if outputs is None:
                inputs.loss(backend="triton")
            else:
                logitless.token_statistics(inputs.hidden, inputs.weight, inputs.target, outputs=outputs)


@pytest.mark.parametrize("normalizer", [7.5, 7, "tensor"])
def test_normalizer(normalizer):
    """As a number it is not copied from the host in a way that waits."""
    inputs = inputs_with_strays()
    value = torch.tensor(7.5, device=DEVICE) if normalizer == "tensor" else normalizer
    for context in (contextlib.nullcontext, refusing_to_wait):
        with context():
            inputs.loss(normalizer=value).backward()


def test_main_grad():
    inputs = inputs_with_strays()
    main_grad = torch.zeros(inputs.weight.shape, device=DEVICE)
    for context in (contextlib.nullcontext, refusing_to_wait):
        with context():
            inputs.loss(main_grad=main_grad).backward()


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


@each_strategy
def test_graph_of_forward_and_backward(strategy):
    """Replayed with other data, of which another number of tokens counts, it gives the bits of a call."""
    inputs = make_inputs()
    with forced(strategy):
        graph, results = captured(lambda: inputs.results(backend="triton"))
        for seed, ignored in ((1, 0.5), (2, 0.0), (3, 1.0), (4, 0.1)):
            other = make_inputs(seed=seed, ignored=ignored)
            take_data_of(inputs, other)
            graph.replay()
            for name, expected in other.results(backend="triton").items():
                assert torch.equal(results[name], expected), f"{name} with {ignored:.0%} ignored"


@pytest.mark.parametrize("strategy", ANY_UPSTREAM[:2])
def test_graph_of_statistics(strategy):
    inputs = make_inputs()

    def call(inputs: Inputs = inputs) -> dict[str, Tensor]:
        statistics = logitless.token_statistics(
            inputs.hidden, inputs.weight, inputs.target, outputs=TOKEN_OUTPUTS, backend="triton"
        )
        total = sum(getattr(statistics, name).sum() for name in FLOAT_OUTPUTS)
        return {
            **differentiated(total, inputs),
            **{name: getattr(statistics, name).detach() for name in TOKEN_OUTPUTS},
        }

    with forced(strategy):
        graph, results = captured(call)
        other = make_inputs(seed=1, ignored=0.5)
        take_data_of(inputs, other)
        graph.replay()
        for name, expected in call(other).items():
            assert torch.equal(results[name], expected), name


def test_graph_that_adds_to_main_grad():
    """Each replay adds."""
    inputs = make_inputs()
    main_grad = torch.zeros(inputs.weight.shape, device=DEVICE)

    def call() -> dict[str, Tensor]:
        loss = inputs.loss(main_grad=main_grad)
        return {"loss": loss.detach(), "hidden": torch.autograd.grad(loss, inputs.hidden)[0]}

    graph, _ = captured(call)
    main_grad.zero_()
    graph.replay()
    once = main_grad.clone()
    graph.replay()
    assert once.any()
    torch.testing.assert_close(main_grad, 2 * once)
