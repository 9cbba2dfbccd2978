"""The sampled gradient as an estimator: unbiased, of the variance it promises, within the blocks it promises.

Statistical bounds are quantiles of the distribution under correct code, at most one in 100,000 beyond each. With the
seeds fixed here, a test that passes passes for ever; when the random stream changes, all tests of this file together
fail by chance with a probability under one in fifty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

import logitless
from logitless.options import BLOCK
from problems import DATA, UPSTREAM, Problem, coarse, generator, make_problem, smollm2_problem
from tolerance import loss_and_gradients, loss_baseline, statistics_and_gradients

DRAWS = 256
GROUPS = (1, 4, 16, 64, 256)
THRESHOLD = 1 / 4
TOKENS, HIDDEN, VOCABULARY = 16, 16, BLOCK * 12 + 37


pytestmark = pytest.mark.usefixtures("one_thread")
# The kernels' statistics are taken on a GPU; in Triton's interpreter they are compared with the torch backend's sample.
ON_GPU = pytest.param(
    "triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
each_backend = pytest.mark.parametrize("backend", ["reference", "torch", ON_GPU])
bit_for_bit = pytest.mark.usefixtures("deterministic")
# What rounding leaves of an entry of a probability that should be zero.
ROUNDING = {"reference": 1e-14, "torch": 1e-14, "triton": 1e-6}


def chi_square_bound(freedom: int) -> float:
    """What a chi-square variable exceeds once in 100,000 (Wilson and Hilferty; 2 % off at one degree of freedom)."""
    normal_quantile = 4.265
    spread = 2 / (9 * freedom)
    return 1.03 * freedom * (1 - spread + normal_quantile * spread**0.5) ** 3


def assert_unbiased(draws: Tensor, exact: Tensor) -> None:
    """The mean of K draws lies as far from the exact gradient as independent unbiased draws do, for each K of GROUPS.

    The expected square of that distance is the variance of one draw over K: an error that falls as 1/sqrt(K), to no
    floor. With M groups of K draws, the mean over groups relative to it is a chi-square variable with at least M
    degrees of freedom over that number; with exactly M where one direction dominates, which is the widest case and the
    one assumed. Looked at over the whole tensor, then along the exact gradient, where a wrong factor would show.
    """
    deviation = (draws - exact).flatten(1)
    along = deviation @ (exact.flatten() / exact.norm())[:, None]
    for samples in (deviation, along):
        variance = samples.var(0).sum().item()
        assert variance > 0, "the draws are all the same"
        for size in GROUPS:
            groups = len(samples) // size
            means = samples.unflatten(0, (groups, size)).mean(1)
            squared_distance = means.square().sum(1).mean().item()
            assert squared_distance <= variance / size * chi_square_bound(groups) / groups, f"mean of {size} draws"


def draw(call: Callable[..., dict[str, Tensor]], exact: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """DRAWS gradients for each tensor, from one generator."""
    sampled = logitless.Sampled(threshold=THRESHOLD, generator=generator(seed))
    results = [call(gradient=sampled) for _ in range(DRAWS)]
    return {name: torch.stack([result[name] for result in results]) for name in exact if name in GRADIENTS}


GRADIENTS = ("input", "linear_weight", "linear_bias")


def check(function: Callable, evaluate: Callable, problem: Problem, seed: int = 0) -> None:
    exact = evaluate(function, problem)
    draws = draw(partial(evaluate, function, problem), exact, seed)
    assert draws.keys() == problem.leaves().keys()
    for name, gradients in draws.items():
        assert_unbiased(gradients.double(), exact[name].double())


def served(value: object) -> object:
    """A tensor as the kernels take it: on the GPU, and no wider than fp32."""
    if not isinstance(value, Tensor):
        return value
    return value.cuda().float() if value.dtype == torch.float64 else value.cuda()


def called(function: Callable, backend: str) -> Callable:
    """A public function on a backend, on CPU tensors of any dtype."""

    def call(*args, **options) -> object:
        if backend == "triton":
            args, options = tuple(map(served, args)), {name: served(value) for name, value in options.items()}
        return function(*args, backend=backend, **options)

    return call


def loss_of(backend: str) -> Callable:
    loss = called(logitless.linear_cross_entropy, backend)
    return lambda *args, **options: loss(*args, **options).cpu()


def statistics_of(backend: str, *outputs: str) -> Callable:
    def statistics(*args, **options) -> dict[str, Tensor]:
        values = called(logitless.token_statistics, backend)(*args, outputs=outputs, **options)
        return {name: getattr(values, name).cpu() for name in outputs}

    return statistics


def problem_of(data: str) -> Problem:
    problem = make_problem(data, TOKENS, HIDDEN, VOCABULARY)
    bias = torch.randn(VOCABULARY, generator=generator(1), dtype=torch.float64) / 2
    return problem.with_options(linear_bias=bias.requires_grad_())


@each_backend
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.25, "softcap": 3.0}], ids=["bare", "busy"])
@pytest.mark.parametrize("data", DATA)
def test_unbiased(backend, data, options):
    check(loss_of(backend), loss_and_gradients, problem_of(data).with_options(**options))


OPTIONS = {
    "label_smoothing": {"label_smoothing": 0.25},
    "softcap": {"softcap": 3.0},
    "label_smoothing,softcap": {"label_smoothing": 0.25, "softcap": 3.0},
    "z_loss": {"z_loss": 0.25},
    "weight": {"weight": coarse(VOCABULARY, low=0.5, high=2, seed=3)},
    "weight,label_smoothing,softcap": {
        "weight": coarse(VOCABULARY, low=0.5, high=2, seed=3),
        "label_smoothing": 0.25,
        "softcap": 3.0,
    },
    "token_weight,logit_scale": {"token_weight": coarse(TOKENS, low=-1, high=2, seed=4), "logit_scale": 0.75},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 7.5},
}


@pytest.mark.parametrize("backend", ["torch", ON_GPU])
@pytest.mark.parametrize("name", OPTIONS)
def test_unbiased_with(name, backend):
    check(loss_of(backend), loss_and_gradients, problem_of("mixed").with_options(**OPTIONS[name]))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("name", OPTIONS)
def test_kernels_take_the_torch_backends_sample(name, data):
    """From the same uniforms the same blocks with the same weights: a block more or less is far above the tolerance."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("for Triton's interpreter, which takes tensors on the CPU")
    if data == "offset" and "softcap" in OPTIONS[name]:
        pytest.skip("a cap of 3 on logits of 48 leaves gradients of the size of rounding")
    problem = problem_of(data).with_options(**OPTIONS[name]).to(torch.float32)
    ours, expected = (
        loss_and_gradients(
            partial(logitless.linear_cross_entropy, backend=backend),
            problem,
            gradient=logitless.Sampled(THRESHOLD, generator=generator(2)),
        )
        for backend in ("triton", "torch")
    )
    for which, value in expected.items():
        assert (ours[which] - value).norm() <= 1e-5 * value.norm(), which


@each_backend
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}], ids=["bare", "softcap"])
@pytest.mark.parametrize("outputs", [("entropy",), ("nll", "logsumexp", "entropy")], ids=",".join)
def test_unbiased_for_statistics(backend, options, outputs):
    problem = problem_of("mixed").with_options(**options)
    check(statistics_of(backend, *outputs), statistics_and_gradients, problem)


@pytest.mark.parametrize("backend", ["torch", ON_GPU])
def test_unbiased_on_a_trained_head(backend):
    """The weight's gradient is looked at through one projection of its rows, to keep 256 of them small."""
    problem = smollm2_problem(12, vocabulary=BLOCK * 24 + 37)
    direction = torch.randn(576, generator=generator(7))

    def evaluate(function, problem, **overrides):
        results = loss_and_gradients(function, problem, **overrides)
        return {**results, "linear_weight": results["linear_weight"] @ direction}

    check(loss_of(backend), evaluate, problem)


def test_check_can_fail():
    """A bias of half a standard error of one draw, and draws that are all the same, are found."""
    exact = torch.ones(50, dtype=torch.float64)
    noise = torch.randn(DRAWS, 50, generator=generator(0), dtype=torch.float64)
    assert_unbiased(exact + noise, exact)
    with pytest.raises(AssertionError, match="mean of"):
        assert_unbiased(exact + noise + 0.5, exact)
    with pytest.raises(AssertionError, match="all the same"):
        assert_unbiased(exact.expand(DRAWS, 50), exact)
    with pytest.raises(AssertionError, match="mean of"):
        assert_unbiased(exact + noise[:16].repeat_interleave(16, 0), exact)


# --- the loss ---------------------------------------------------------------------------------------------------------


@each_backend
@pytest.mark.parametrize("data", DATA)
def test_loss_is_exact(backend, data):
    """The loss under Sampled has the exact loss's error bound and does not depend on the seed."""
    problem = problem_of(data).to(torch.float32)
    losses = [
        problem.call(loss_of(backend), gradient=logitless.Sampled(THRESHOLD, generator=generator(seed)))
        for seed in range(3)
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])
    baseline = loss_baseline(problem)
    only_loss = {name: {"loss": getattr(baseline, name)["loss"]} for name in ("exact", "plain", "accumulated")}
    replace(baseline, **only_loss).check({"loss": losses[0].detach()})


# --- seeds ------------------------------------------------------------------------------------------------------------


@each_backend
@bit_for_bit
def test_seed_decides_the_gradient(backend):
    problem = problem_of("flat").to(torch.float32)

    def with_seed(seed: int) -> dict[str, Tensor]:
        sampled = logitless.Sampled(THRESHOLD, generator=generator(seed))
        return loss_and_gradients(loss_of(backend), problem, gradient=sampled)

    first, again, other = with_seed(1), with_seed(1), with_seed(2)
    for name in problem.leaves():
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@each_backend
@bit_for_bit
def test_default_generator_decides_the_gradient(backend):
    problem = problem_of("flat").to(torch.float32)

    def with_seed(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return loss_and_gradients(loss_of(backend), problem, gradient=logitless.Sampled(THRESHOLD))

    first, again, other = with_seed(1), with_seed(1), with_seed(2)
    for name in problem.leaves():
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@each_backend
def test_generator_moves_on(backend):
    """Two calls with one generator draw independently."""
    problem = problem_of("flat").to(torch.float32)
    sampled = logitless.Sampled(THRESHOLD, generator=generator(1))
    first, second = (loss_and_gradients(loss_of(backend), problem, gradient=sampled) for _ in range(2))
    assert not torch.equal(first["input"], second["input"])


@each_backend
@bit_for_bit
def test_backward_again_gives_the_same_sample(backend):
    problem = problem_of("flat").to(torch.float32)
    leaves = list(problem.leaves().values())
    loss = problem.call(loss_of(backend), gradient=logitless.Sampled(THRESHOLD))
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for once, again in zip(first, second, strict=True):
        assert torch.equal(once, again)


# --- what is kept -----------------------------------------------------------------------------------------------------
# With an identity as hidden states, token i's logits are column i of the weight, and column i of the weight's gradient
# is the gradient of its logits: which blocks were kept, and with what factor, can be read off.

COLUMNS = 128
MANY_BLOCKS = BLOCK * 24 + 37


def columns_problem(data: str) -> Problem:
    """An independent row of logits for each of COLUMNS tokens, with the shapes of softmax that matter."""
    scores = 2 * torch.randn(MANY_BLOCKS, COLUMNS, generator=generator(11), dtype=torch.float64)
    favourite = torch.randint(MANY_BLOCKS, (COLUMNS,), generator=generator(12))
    if data == "flat":
        scores = scores / 64
    if data == "peaked":
        scores[favourite, torch.arange(COLUMNS)] = 16
    if data == "steep":
        scores = scores * 3
    if data == "equal":
        scores = torch.zeros_like(scores)
    target = torch.randint(MANY_BLOCKS, (COLUMNS,), generator=generator(13))
    target = torch.where(torch.arange(COLUMNS) % 2 == 0, favourite, target)
    return Problem(torch.eye(COLUMNS, dtype=torch.float64), scores.requires_grad_(), target, {"reduction": "sum"})


COLUMN_DATA = ("random", "flat", "peaked", "steep", "equal")


def blocks_of(per_entry: Tensor) -> Tensor:
    """``[vocabulary, tokens]`` to ``[blocks, BLOCK, tokens]``, the last block padded with zeros."""
    padding = -per_entry.shape[0] % BLOCK
    return torch.nn.functional.pad(per_entry, (0, 0, 0, padding)).unflatten(0, (-1, BLOCK))


def softmax_gradient(problem: Problem, backend: str, threshold: float, seed: int) -> Tensor:
    """The sampled gradient of the logits with the one-hot taken off again: sampled probabilities."""
    sampled = logitless.Sampled(threshold, generator=generator(seed))
    gradient = loss_and_gradients(loss_of(backend), problem, gradient=sampled, reduction="sum")["linear_weight"]
    # `loss_and_gradients` uses an upstream gradient other than one.
    gradient = gradient / UPSTREAM
    gradient[problem.target, torch.arange(COLUMNS)] += 1
    return gradient


@each_backend
@pytest.mark.parametrize("threshold", [1 / 4, 1 / 16, 1.0])
@pytest.mark.parametrize("data", COLUMN_DATA)
def test_kept_blocks(backend, data, threshold):
    """Each block of each token is left out whole or weighted by the inverse of min(1, mass / threshold); the target's
    one-hot is always there; no token keeps more than 1 / threshold + 1 blocks.
    """
    problem = columns_problem(data)
    probability = blocks_of(problem.linear_weight.detach().softmax(0))
    mass = probability.sum(1, keepdim=True)
    weighted = probability / (mass / threshold).clamp(max=1)
    drawn = blocks_of(softmax_gradient(problem, backend, threshold, seed=1))
    # The one-hot of a block left out leaves rounding behind, the one-hot of a kept one too.
    close = 1e-5 * weighted.amax(1, keepdim=True) + ROUNDING[backend]
    kept = (drawn - weighted).abs().amax(1) <= close.squeeze(1)
    left_out = drawn.abs().amax(1) <= ROUNDING[backend]
    assert (kept | left_out).all()
    counts = (kept & ~left_out).sum(0)
    assert counts.max() <= 1 / threshold + 1
    certain = mass.squeeze(1) >= threshold * (1 + 1e-6)
    assert kept[certain].all()
    if data in ("flat", "equal") and threshold < 1:
        # Systematic sampling: the count is the sum of the probabilities, rounded down or up.
        assert counts.min() >= int(1 / threshold) - 1


@each_backend
def test_rows_are_sampled_independently(backend):
    """Tokens with equal logits do not keep the same blocks."""
    problem = columns_problem("equal")
    drawn = blocks_of(softmax_gradient(problem, backend, THRESHOLD, seed=1)).abs().amax(1) > ROUNDING[backend]
    patterns = {tuple(column.tolist()) for column in drawn.T}
    # At least six patterns are possible (four blocks of 25, equally spaced): all tokens on one is what must not be.
    assert len(patterns) >= 5


@each_backend
def test_blocks_are_kept_as_often_as_promised(backend):
    """Over COLUMNS equal tokens and several seeds, each block's count is binomial with probability mass / threshold.

    Bound: the exponential tail of a binomial variable (Bernstein), at one in 100,000 for all blocks together.
    """
    problem = columns_problem("random")
    scores = problem.linear_weight.detach()[:, :1].expand(-1, COLUMNS).clone().requires_grad_()
    problem = replace(problem, linear_weight=scores)
    probability = blocks_of(scores.detach().softmax(0))[:, :, 0].sum(1).div(THRESHOLD).clamp(max=1)
    seeds = 10
    counts = sum(
        (blocks_of(softmax_gradient(problem, backend, THRESHOLD, seed)).abs().amax(1) > ROUNDING[backend]).sum(1)
        for seed in range(seeds)
    )
    trials = seeds * COLUMNS
    log_odds = torch.log(torch.tensor(2e5 * len(probability)))
    variance = trials * probability * (1 - probability)
    bound = log_odds / 3 + (log_odds**2 / 9 + 2 * variance * log_odds).sqrt()
    assert ((counts - trials * probability).abs() <= bound).all()


@each_backend
@pytest.mark.parametrize("data", COLUMN_DATA)
def test_variance(backend, data):
    """The variance of each token's logit gradient is what keeping blocks with those probabilities gives, and at most
    the threshold times the mass of the blocks that are not certain.

    The squared error of one call, summed over its tokens, is a mean of independent bounded terms: five standard errors
    (estimated from the calls) with forty calls, of which a Student variable exceeds fewer than one in 50,000.
    """
    problem = columns_problem(data)
    probability = blocks_of(problem.linear_weight.detach().softmax(0))
    mass = probability.sum(1)
    keep = (mass / THRESHOLD).clamp(max=1)
    expected = ((1 / keep - 1) * probability.square().sum(1)).sum(0)
    small = (mass * (keep < 1)).sum(0)
    assert (expected <= THRESHOLD * small + 1e-12).all()
    squared_error = torch.stack(
        [
            (blocks_of(softmax_gradient(problem, backend, THRESHOLD, seed)) - probability).square().sum()
            for seed in range(40)
        ]
    )
    standard_error = squared_error.std() / len(squared_error) ** 0.5
    assert (squared_error.mean() - expected.sum()).abs() <= 5 * standard_error + 1e-9 * expected.sum()
    assert squared_error.mean() <= THRESHOLD * small.sum() + 5 * standard_error


@each_backend
def test_everything_kept_is_exact(backend):
    """Where every block holds more mass than the threshold, nothing is random."""
    problem = columns_problem("flat")
    drawn = softmax_gradient(problem, backend, 1 / 1024, seed=1)
    torch.testing.assert_close(drawn, problem.linear_weight.detach().softmax(0), atol=ROUNDING[backend], rtol=1e-5)


@each_backend
def test_ignored_tokens_keep_nothing(backend):
    problem = columns_problem("random")
    problem.target[::2] = -100
    sampled = logitless.Sampled(THRESHOLD, generator=generator(1))
    gradient = loss_and_gradients(loss_of(backend), problem, gradient=sampled)["linear_weight"]
    assert not gradient[:, ::2].any()
    assert gradient[:, 1::2].any(0).all()


def test_blocks_are_padded():
    entries = torch.ones(MANY_BLOCKS, 2)
    assert blocks_of(entries).shape == (25, BLOCK, 2)
    assert blocks_of(entries).sum() == entries.sum()
