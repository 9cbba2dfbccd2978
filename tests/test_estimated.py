"""A scan in eight bits, corrected: the loss as an estimate, the gradient as an estimator, and the rounding itself.

Gradients are unbiased up to the square of the loss's error, which is far below what the draws here can show.
Statistical bounds are those of ``test_sampled.py``.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import logitless
import test_sampled
from logitless import backends
from logitless.fp8 import LEAST_SCALE, MAX_OUTLIERS, left_operand, mean_row, outlier_channels, quantize, right_operand
from logitless.options import BLOCK
from problems import DATA, Problem, generator, make_problem, random_problem, smollm2_problem
from test_sampled import (
    DRAWS,
    HIDDEN,
    ON_GPU,
    OPTIONS,
    THRESHOLD,
    TOKENS,
    VOCABULARY,
    assert_unbiased,
    blocks_of,
    loss_of,
    problem_of,
)
from tolerance import loss_and_gradients

pytestmark = pytest.mark.usefixtures("one_thread")

each_backend = pytest.mark.parametrize("backend", ["reference", "torch"])


def estimating(seed: int, threshold: float = THRESHOLD) -> logitless.Sampled:
    return logitless.Sampled(threshold, scan="fp8", generator=generator(seed))


def outlier_problem() -> Problem:
    """A few channels of the hidden states are a hundred times as large as the rest, as trained models have them."""
    problem = make_problem("mixed", TOKENS, 96, VOCABULARY)
    hidden, weight = problem.input.detach().clone(), problem.linear_weight.detach().clone()
    hidden[:, :3] *= 100
    weight[:, :3] /= 40
    return replace(problem, input=hidden.requires_grad_(), linear_weight=weight.requires_grad_())


def draws_of(problem: Problem, sampled: logitless.Sampled, backend: str = "torch") -> dict[str, Tensor]:
    loss = loss_of(backend)
    results = [loss_and_gradients(loss, problem, gradient=sampled) for _ in range(DRAWS)]
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


# --- gradients --------------------------------------------------------------------------------------------------------


def check_unbiased(problem: Problem, backend: str = "torch") -> None:
    exact = loss_and_gradients(loss_of(backend), problem)
    draws = draws_of(problem, estimating(0), backend)
    for name in problem.leaves():
        assert_unbiased(draws[name].double(), exact[name].double())


@pytest.mark.parametrize("backend", ["reference", "torch", ON_GPU])
@pytest.mark.parametrize("data", DATA)
def test_unbiased(backend, data):
    check_unbiased(problem_of(data), backend)


def capped_and_smoothed(name: str) -> bool:
    """Together these need the smoothed sum of capped logits, which the kernels do not correct."""
    return {"label_smoothing", "softcap"} <= OPTIONS[name].keys()


@pytest.mark.parametrize("backend", ["torch", ON_GPU])
@pytest.mark.parametrize("name", OPTIONS)
def test_unbiased_with(name, backend):
    if backend == "triton" and capped_and_smoothed(name):
        pytest.skip("refused")
    check_unbiased(problem_of("mixed").with_options(**OPTIONS[name]), backend)


def test_kernels_refuse_smoothing_under_a_cap():
    pytest.importorskip("triton")
    problem = problem_of("mixed").with_options(**OPTIONS["label_smoothing,softcap"]).to(torch.float32)
    with pytest.raises(ValueError, match=r"backend='triton'.*under a softcap.*Sampled\(scan='input'\)"):
        problem.call(logitless.linear_cross_entropy, backend="triton", gradient=estimating(0))


@pytest.mark.parametrize("backend", ["torch", ON_GPU])
def test_unbiased_where_channels_are_loud(backend):
    check_unbiased(outlier_problem(), backend)


@pytest.mark.parametrize("backend", ["torch", ON_GPU])
def test_unbiased_on_a_trained_head(backend, monkeypatch):
    """As in ``test_sampled.py``, with this scan."""
    input_scan = logitless.Sampled
    monkeypatch.setattr(logitless, "Sampled", partial(input_scan, scan="fp8"))
    test_sampled.test_unbiased_on_a_trained_head(backend)


@pytest.mark.parametrize("name", ["label_smoothing,softcap", "weight,label_smoothing,softcap", "z_loss", "none"])
@pytest.mark.parametrize("data", [*DATA, "outliers"])
def test_backends_agree(data, name):
    """From the same uniforms the same blocks with the same weights, and the same estimate."""
    problem = outlier_problem() if data == "outliers" else make_problem(data, TOKENS, HIDDEN, VOCABULARY)
    problem = problem.with_options(**OPTIONS[name])
    ours, expected = (
        loss_and_gradients(partial(logitless.linear_cross_entropy, backend=backend), problem, gradient=estimating(2))
        for backend in ("torch", "reference")
    )
    for which, value in expected.items():
        assert (ours[which] - value).norm() <= 1e-11 * value.norm(), which


@pytest.mark.parametrize("name", [name for name in OPTIONS if not capped_and_smoothed(name)])
@pytest.mark.parametrize("data", ["mixed", "outliers"])
def test_kernels_agree(data, name):
    """As above, with some tokens ignored."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter, which takes tensors on the CPU")
    problem = outlier_problem() if data == "outliers" else make_problem(data, TOKENS, HIDDEN, VOCABULARY)
    problem = problem.with_options(**OPTIONS[name]).to(torch.float32)
    problem.target[::5] = -100
    ours, expected = (
        loss_and_gradients(partial(logitless.linear_cross_entropy, backend=backend), problem, gradient=estimating(2))
        for backend in ("triton", "torch")
    )
    for which, value in expected.items():
        assert (ours[which] - value).norm() <= 1e-5 * value.norm(), which


def test_chunks_do_not_matter():
    problem = outlier_problem().to(torch.float32)
    results = []
    for rows in (5, 16):
        with logitless.schedules.force_strategy("sampled", rows=rows):
            results.append(loss_and_gradients(logitless.linear_cross_entropy, problem, gradient=estimating(1)))
    for name, value in results[0].items():
        assert (results[1][name] - value).norm() <= 1e-5 * value.norm(), name


# --- the loss ---------------------------------------------------------------------------------------------------------


def errors_of(
    problem: Problem, threshold: float = THRESHOLD, draws: int = DRAWS, backend: str = "torch"
) -> Tensor:  # fmt: skip
    """[draws, N] error of each token's loss, in fp64."""
    loss = partial(logitless.linear_cross_entropy, reduction="none", backend=backend)
    exact = problem.call(loss).detach()
    sampled = estimating(1, threshold)
    losses = [problem.call(loss, gradient=sampled) for _ in range(draws)]
    return torch.stack([loss.detach() - exact for loss in losses])


@pytest.mark.parametrize("data", [*DATA, "outliers"])
def test_bias_of_the_loss_is_at_most_half_its_variance(data):
    """The normaliser is unbiased and its logarithm, to second order, off by half the variance, downwards.

    Five standard errors of the mean of the draws, and a tenth for the third order. Where the blocks that are not
    certain hold so little that fewer than twelve are expected in all draws, the error may be as much as they hold.
    """
    problem = outlier_problem() if data == "outliers" else problem_of(data)
    errors = errors_of(problem)
    variance, mean = errors.var(0), errors.mean(0)
    bias = problem.options.get("linear_bias", torch.zeros(()))
    mass = blocks_of((problem.input @ problem.linear_weight.T + bias).detach().softmax(1).T).sum(1)
    uncertain = (mass * (mass < THRESHOLD)).sum(0)
    slack = 5 * (variance / DRAWS).sqrt() + torch.where(uncertain < 12 * THRESHOLD / DRAWS, uncertain, 1e-12)
    assert (mean <= 0.1 * variance + slack).all()
    assert (mean >= -0.6 * variance - slack).all()


def test_errors_on_a_trained_head():
    """Loss per token on real text: at most half the error of bf16 logits, and hardly biased."""
    problem = smollm2_problem(256).to(torch.bfloat16).to(torch.float64)
    errors = errors_of(problem, threshold=1 / 64, draws=4)
    hidden, weight = problem.input.detach().bfloat16(), problem.linear_weight.detach().bfloat16()
    target = problem.target.long()
    plain = torch.nn.functional.cross_entropy((hidden @ weight.T).double(), target, reduction="none")
    exact = torch.nn.functional.cross_entropy(hidden.double() @ weight.double().T, target, reduction="none")
    rms = errors.square().mean().sqrt()
    assert rms <= 0.5 * (plain - exact).square().mean().sqrt()
    assert errors.mean().abs() <= 3e-4 + 4 * rms / math.sqrt(errors.numel())


def test_correction_is_worth_it():
    """The scan alone is off by many times the corrected loss."""
    problem = smollm2_problem(128).to(torch.float64)
    hidden, weight = problem.input.detach(), problem.linear_weight.detach()
    scanned = products_in_eight_bits(hidden, weight, outlier_channels(hidden))
    exact = hidden @ weight.T
    alone = (scanned.logsumexp(1) - exact.logsumexp(1)).square().mean().sqrt()
    assert errors_of(problem, threshold=1 / 64, draws=2).square().mean().sqrt() < alone / 10


@each_backend
def test_never_below_what_is_known(backend):
    """A scan that sees mass where there is none: a loss is finite, and no less than what the listed blocks alone give.

    All channels are outliers, so most are not taken twice; logits of a hundred are then off by several units.
    """
    problem = random_problem(64, 256, BLOCK * 8).to(torch.float64)
    problem = replace(problem, input=(problem.input.detach() * 12).requires_grad_())
    logits = (problem.input @ problem.linear_weight.T).detach()
    rows = torch.arange(64)
    best = logits.argmax(1)
    problem = replace(problem, target=best)
    errors = errors_of(problem, threshold=1.0, draws=64, backend=backend)
    assert errors.isfinite().all()
    assert (errors + problem.call(logitless.linear_cross_entropy, reduction="none").detach() > -1e-9).all()
    # The target's block is always listed: the loss is no less than its own.
    own = logits.unflatten(1, (-1, BLOCK))[rows, best // BLOCK].logsumexp(1) - logits[rows, best]
    losses = errors + problem.call(logitless.linear_cross_entropy, reduction="none").detach()
    assert (losses >= own - 1e-9).all()
    assert (losses <= own + 1e-9).any(), "the guard was never needed: the test is too easy"


@each_backend
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_stays_one(backend, value):
    problem = random_problem(6, 16, 300).to(torch.float32)
    spoilt = problem.input.detach().clone()
    spoilt[2, 5] = value
    problem = replace(problem, input=spoilt.requires_grad_())
    losses = problem.call(
        logitless.linear_cross_entropy, gradient=estimating(0), reduction="none", backend=backend
    )  # fmt: skip
    assert not losses[2].isfinite()
    assert losses[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.parametrize("backend", ["reference", "torch", ON_GPU])
@pytest.mark.parametrize("tokens", [0, 5])
def test_nothing_counts(tokens, backend):
    """No tokens, or all ignored: no loss, and no gradient."""
    problem = random_problem(tokens, 16, 300).to(torch.float32)
    problem = replace(problem, target=torch.full_like(problem.target, -100))
    results = loss_and_gradients(loss_of(backend), problem, gradient=estimating(0))
    assert all(torch.equal(value.cpu(), torch.zeros_like(value.cpu())) for value in results.values())


@each_backend
def test_seed_decides_loss_and_gradient(backend):
    problem = problem_of("flat").to(torch.float32)
    loss = partial(logitless.linear_cross_entropy, backend=backend)
    first, again, other = (loss_and_gradients(loss, problem, gradient=estimating(seed)) for seed in (1, 1, 2))
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert not torch.equal(value, other[name])


def test_without_gradients_the_loss_is_exact():
    problem = problem_of("random")
    with torch.no_grad():
        losses = [problem.call(logitless.linear_cross_entropy, gradient=g) for g in (estimating(0), "exact")]
    assert torch.equal(*losses)


@each_backend
def test_inputs_stay_as_they_are(backend):
    problem = problem_of("random").to(torch.float32)
    before = problem.map(torch.clone)
    loss_and_gradients(partial(logitless.linear_cross_entropy, backend=backend), problem, gradient=estimating(0))
    assert torch.equal(before.input, problem.input)
    assert torch.equal(before.linear_weight, problem.linear_weight)


@pytest.mark.parametrize("output", ["entropy", "prediction", "target_rank"])
def test_outputs_it_does_not_know(output):
    problem = random_problem(4, 16, 300)
    with pytest.raises(ValueError, match=rf"outputs='{output}' needs every logit in full.*scan='input'"):
        problem.call(logitless.token_statistics, outputs=("nll", output), gradient=estimating(0))


@pytest.mark.parametrize("edit", ["in place", "data", "memory", "storage", "optimizer"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_no_rounded_weight_outlives_its_call(backend, edit):
    """However a weight is changed between two calls, the second is that of the weight as it is."""
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("for Triton's interpreter, which takes tensors on the CPU")
    problem = random_problem(6, 16, 300).to(torch.float32)
    weight = problem.linear_weight.requires_grad_()
    loss = partial(problem.call, logitless.linear_cross_entropy, backend=backend)
    loss(gradient=estimating(0)).backward()
    if edit == "in place":
        with torch.no_grad():
            weight.mul_(-2)
    elif edit == "data":
        weight.data.mul_(-2)
    elif edit == "memory":
        weight.detach().numpy()[...] *= -2
    elif edit == "storage":
        changed = weight.detach().mul(-2)
        weight.untyped_storage().copy_(changed.untyped_storage())
    else:
        torch.optim.SGD([weight], lr=5.0).step()
    fresh = replace(problem, linear_weight=weight.detach().clone().requires_grad_())
    expected = fresh.call(logitless.linear_cross_entropy, backend=backend, gradient=estimating(1))
    assert torch.equal(loss(gradient=estimating(1)), expected)


def test_without_matrix_units_it_says_so(monkeypatch):
    """On a GPU nothing is rounded to eight bits to be multiplied in fp32, unless the torch backend is named."""
    sizes = {"tokens": 256, "hidden": 64, "vocabulary": 1000, "dtype": torch.float16, "device": "cuda"}
    triton = backends.load("triton") if importlib.util.find_spec("triton") else None
    if triton is not None:
        monkeypatch.setattr(triton.tiles, "has_fp8_mma", lambda index: False)
    with pytest.raises(ValueError, match=r"Sampled\(scan='fp8'\) saves time only in the triton.*use scan='input'"):
        logitless.plan(**sizes, gradient=estimating(0))
    plan = logitless.plan(**sizes, gradient=estimating(0), backend="torch")
    assert plan.backend == "torch"


def test_statistics():
    """The log-likelihood and the log-sum-exp are those of the loss."""
    problem = random_problem(9, 16, 300)
    statistics = problem.call(logitless.token_statistics, outputs=("nll", "logsumexp"), gradient=estimating(3))
    losses = problem.call(logitless.linear_cross_entropy, reduction="none", gradient=estimating(3))
    assert statistics.nll is not None
    assert torch.equal(statistics.nll, losses)


# --- rounding ---------------------------------------------------------------------------------------------------------


def test_rounded_rows():
    """Four digits of two, in units that make a row's largest magnitude 448; what is left over is below half a digit."""
    matrix = torch.randn(40, 64, generator=generator(0), dtype=torch.float64)
    channels = torch.arange(0, 64, 5)
    quantized = quantize(matrix, channels)
    assert torch.equal(quantized.values.double().abs().amax(1), torch.full((40,), 448.0, dtype=torch.float64))
    restored = quantized.values.double() * quantized.scale[:, None]
    assert (restored - matrix).abs().le(2.0**-4 * matrix.abs() + 2.0**-10 * quantized.scale[:, None]).all()
    twice = restored[:, channels] + quantized.left_over.double() * quantized.scale[:, None]
    wide = matrix[:, channels]
    assert (twice - wide).abs().le(2.0**-8 * wide.abs() + 2.0**-9 * quantized.scale[:, None]).all()


def test_rows_of_zeros():
    quantized = quantize(torch.tensor([0.0, 2.0**-120])[:, None].expand(2, 8), torch.arange(2))
    assert quantized.scale.tolist() == [LEAST_SCALE] * 2
    assert not quantized.values.float().any()


def test_loud_channels():
    hidden = torch.ones(300, 200)
    hidden[:, 50 : 50 + MAX_OUTLIERS] = -3
    hidden[7, 3] = 30  # large in one row of many makes no outlier
    assert outlier_channels(hidden).tolist() == list(range(50, 50 + MAX_OUTLIERS))
    assert outlier_channels(torch.ones(4, 5)).tolist() == [0, 1, 2, 3, 4]


def products_in_eight_bits(hidden: Tensor, weight: Tensor, channels: Tensor) -> Tensor:
    mean = mean_row(weight)
    return left_operand(hidden, channels, mean) @ right_operand(weight, channels, mean).T


def test_operands_hold_three_products():
    hidden, weight = (torch.randn(rows, 80, generator=generator(rows), dtype=torch.float64) for rows in (7, 9))
    channels, mean = outlier_channels(hidden), mean_row(weight)
    x, w = quantize(hidden, channels), quantize(weight - mean, channels)
    parts = [
        (x.values, w.values),
        (x.values.double()[:, channels], w.left_over),
        (x.left_over, w.values.double()[:, channels]),
    ]
    expected = sum(a.double() @ b.double().T for a, b in parts) * x.scale[:, None] * w.scale
    expected += (hidden @ mean)[:, None]
    torch.testing.assert_close(products_in_eight_bits(hidden, weight, channels), expected)


@pytest.mark.parametrize("shift", [0.0, 1e2, 1e5])
def test_what_logits_have_in_common_costs_no_accuracy(shift):
    """A part of the weight that all rows share fills no digits of theirs: products are off by no more than without."""
    hidden, weight = (torch.randn(rows, 80, generator=generator(rows), dtype=torch.float64) for rows in (16, 300))
    hidden[:, 0], weight[:, 0] = 1.0, shift
    error = products_in_eight_bits(hidden, weight, outlier_channels(hidden)) - hidden @ weight.T
    weight[:, 0] = 0
    without = products_in_eight_bits(hidden, weight, outlier_channels(hidden)) - hidden @ weight.T
    assert error.norm() <= 1.1 * without.norm()


def test_loud_channels_cost_no_accuracy():
    """Logits have many times the error where such channels are not taken twice."""
    hidden, weight = (torch.randn(rows, 96, generator=generator(rows), dtype=torch.float64) for rows in (64, 500))
    hidden[:, :3] *= 100
    exact = hidden @ weight.T
    none, some = torch.arange(0), outlier_channels(hidden)
    without, given = (
        (products_in_eight_bits(hidden, weight, channels) - exact).square().mean().sqrt() for channels in (none, some)
    )
    assert given < without / 10
