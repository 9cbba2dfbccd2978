"""The scan in eight bits on the GPU; its statistics are in ``test_estimated.py``, its memory in the peak tests."""

from __future__ import annotations

import contextlib

import pytest
import torch

import logitless
from implementations import KEEP_ALL
from on_gpu import (
    DEVICE,
    NEEDS_GPU,
    Inputs,
    busy_options,
    captured,
    check,
    generator,
    inputs_with_strays,
    make_inputs,
    refusing_to_wait,
    take_data_of,
)
from problems import Problem
from tolerance import loss_and_gradients, loss_baseline

pytestmark = [
    *NEEDS_GPU,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no tensor cores for e4m3"
    ),
]


def estimating(threshold: float = 1 / 16, seed: int | None = None) -> logitless.Sampled:
    return logitless.Sampled(threshold, scan="fp8", generator=None if seed is None else generator(seed))


def options_for(inputs: Inputs, left_out: str) -> dict:
    """All options but one of the two that the scan does not take together."""
    return {name: value for name, value in busy_options(inputs).items() if name != left_out}


@pytest.mark.parametrize("size", [(2048, 512, 8192), (1, 64, 1000), (17, 136, 515), (150, 64, 24)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_errors_where_everything_is_kept(size, dtype):
    """Then every block is summed in full, and the loss is exact."""
    inputs = make_inputs(*size, dtype, ignored=0.25 if size[0] > 100 else 0)
    check(inputs.results(backend="triton", gradient=estimating(KEEP_ALL)), inputs)


@pytest.mark.parametrize("left_out", ["softcap", "label_smoothing"])
def test_options_where_everything_is_kept(left_out):
    inputs = make_inputs(1024, 256, 4096, bias=True)
    options = {**options_for(inputs, left_out), "linear_bias": inputs.bias}
    problem = Problem(inputs.hidden, inputs.weight, inputs.target, options)
    ours = loss_and_gradients(logitless.linear_cross_entropy, problem, backend="triton", gradient=estimating(KEEP_ALL))
    loss_baseline(problem).check(ours)


def exactly_rounded_inputs(tokens: int = 300, hidden: int = 256, vocabulary: int = 8192) -> Inputs:
    """Integers up to 7, which eight bits hold in a unit of 7/448, and whose products add up to less than 2^11 units.

    A Hopper GPU's tensor cores keep some 14 digits while they add up products of eight bits: of these, all.
    """
    random = generator(0)
    operands = [torch.randint(-3, 4, (rows, hidden), generator=random, device=DEVICE) for rows in (tokens, vocabulary)]
    for operand in operands:
        operand[:, 0] = 7
    half = vocabulary // 2
    operands[1][half : 2 * half] = -operands[1][:half]  # so that the mean row, which is subtracted, is 0
    target = torch.randint(vocabulary, (tokens,), generator=random, device=DEVICE)
    return Inputs(*(operand.float().requires_grad_() for operand in operands), target)


def test_backends_agree():
    """From the same uniforms the torch backend, which multiplies in fp32, keeps the same blocks with the same weights.

    Logits are multiples of 1/32, exact in both; masses differ by roundings, for which a row keeps another block once in
    some thousand calls, the sum over 64 blocks of 1e-6.
    """
    inputs = exactly_rounded_inputs()
    ours, theirs = (
        inputs.results(backend=backend, gradient=estimating(seed=3), reduction="sum", logit_scale=1 / 32)
        for backend in ("triton", "torch")
    )
    for name, value in theirs.items():
        assert (ours[name] - value).norm() <= 1e-4 * value.norm(), name


@pytest.mark.parametrize("left_out", ["softcap", "label_smoothing"])
def test_nothing_waits(left_out):
    inputs = inputs_with_strays(bias=True)
    options = options_for(inputs, left_out)
    for context in (contextlib.nullcontext, contextlib.nullcontext, refusing_to_wait):
        with context():
            inputs.loss(backend="triton", gradient=logitless.Sampled(scan="fp8"), **options).backward()


def test_graph_rounds_anew():
    """Each replay rounds the data it finds: its loss is that of the data, as near as the estimate is."""
    inputs = make_inputs()
    graph, results = captured(lambda: inputs.results(backend="triton", gradient=estimating()))
    for seed in (1, 2):
        other = make_inputs(seed=seed, ignored=0.5)
        take_data_of(inputs, other)
        graph.replay()
        exact = other.results(backend="triton")
        assert (results["loss"] - exact["loss"]).abs() < 1e-3
        assert (results["weight"].float() - exact["weight"].float()).norm() < 0.5 * exact["weight"].float().norm()


def test_gradients_do_not_depend_on_chunks():
    inputs = make_inputs(3000, 256, 8192)
    found = {}
    for rows in (1024, 3000):
        with logitless.schedules.force_strategy("sampled", rows=rows):
            found[rows] = inputs.results(backend="triton", gradient=estimating(seed=2))
    assert torch.equal(found[1024]["weight"], found[3000]["weight"])
    assert torch.equal(found[1024]["loss"], found[3000]["loss"])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_stays_one(value):
    inputs = make_inputs(300, 256, 4096, ignored=0)
    with torch.no_grad():
        inputs.hidden[5, 7] = value
    losses = inputs.loss(backend="triton", gradient=estimating(), reduction="none").detach()
    assert losses[5].isnan()
    assert losses[torch.arange(300, device=DEVICE) != 5].isfinite().all()
    with torch.no_grad():
        inputs.hidden[5, 7] = 0
        inputs.weight[9, 7] = value
    assert inputs.loss(backend="triton", gradient=estimating(), reduction="none").detach().isnan().all()
