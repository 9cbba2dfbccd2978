"""One test for each way in which another fused linear cross-entropy has failed its users."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import logitless
import plain
from implementations import (
    ANY_UPSTREAM,
    CHUNKED,
    FORWARD_ONLY,
    IMPLEMENTATIONS,
    SAMPLED,
    WINDOWED,
    Implementation,
)
from problems import Case, Problem, generator, random_problem
from tolerance import loss_and_gradients, loss_baseline, statistics_and_gradients, statistics_baseline

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_any_upstream = pytest.mark.parametrize("implementation", ANY_UPSTREAM, ids=str)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


@each_any_upstream
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_an_unreduced_loss(implementation, dtype):
    """Each token's upstream gradient scales that token alone; zero switches it off, a negative one turns it round.

    Seen elsewhere: gradients zero, or those of the mean, whatever came from upstream.
    """
    problem = random_problem(11, 24, 203).to(dtype).with_options(reduction="none")
    upstream = torch.tensor([0.0, 1, -2, 0.5, 0, 3, 1, 1, -1, 0, 0.25])

    def weighted(function):
        return lambda *args, **options: (function(*args, **options) * upstream.to(dtype)).sum(dtype=torch.float64)

    ours = loss_and_gradients(weighted(implementation.linear_cross_entropy), problem)
    assert not ours["input"][upstream == 0].any()
    same = problem.with_options(reduction="sum", token_weight=upstream.to(dtype))
    loss_baseline(same).check(ours)


def distance(results: dict[str, torch.Tensor], exact: dict[str, torch.Tensor], name: str) -> float:
    return ((results[name].double() - exact[name]).norm() / exact[name].norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weight_gradient_does_not_drift_over_chunks(dtype):
    """256 chunks of one token are as exact as one chunk of 256, since sums are kept in fp32.

    Hidden states with a common direction make every chunk push the same way, where a low-precision sum stops growing.
    """
    problem = random_problem(256, 24, 33)
    problem = problem.map(lambda tensor: tensor + 1 if tensor.shape == problem.input.shape else tensor).to(dtype)
    exact = loss_and_gradients(plain.linear_cross_entropy, problem.to(torch.float64))
    whole, single = (loss_and_gradients(replace(CHUNKED, rows=rows).linear_cross_entropy, problem) for rows in (256, 1))
    # Both round the gradient once at the end; half an ulp is the most that can differ.
    assert distance(single, exact, "linear_weight") <= (
        1.1 * distance(whole, exact, "linear_weight") + torch.finfo(dtype).eps / 2
    )
    # A sum kept in the dtype itself would be off by far more than that.
    logits = plain.logits(problem.input, problem.linear_weight).detach()
    softmax_gradient = logits.float().softmax(1) - torch.nn.functional.one_hot(problem.target, 33)
    running = torch.zeros(33, 24, dtype=dtype)
    for token in range(256):
        running += (softmax_gradient[token, :, None] * problem.input.detach()[token].float() / 256).to(dtype)
    drifted = {"linear_weight": running * 0.3125}
    assert distance(drifted, exact, "linear_weight") > 2 * (
        1.1 * distance(whole, exact, "linear_weight") + torch.finfo(dtype).eps / 2
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", [WINDOWED, SAMPLED], ids=str)
def test_hidden_gradient_does_not_drift_over_windows(strategy, dtype):
    """As many windows as vocabulary entries are as exact as one window."""
    problem = random_problem(5, 24, 256)
    problem = problem.map(lambda tensor: tensor + 1 if tensor.shape == problem.linear_weight.shape else tensor)
    problem = problem.to(dtype)
    exact = loss_and_gradients(plain.linear_cross_entropy, problem.to(torch.float64))
    loss_baseline(problem).check(loss_and_gradients(strategy.linear_cross_entropy, problem))
    if strategy.window is not None:
        whole, single = (
            loss_and_gradients(replace(strategy, window=window).linear_cross_entropy, problem) for window in (256, 1)
        )
        assert distance(single, exact, "input") <= (1.1 * distance(whole, exact, "input") + torch.finfo(dtype).eps / 2)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_hot_is_subtracted_before_rounding(implementation, dtype):
    """At a confident token the target's gradient is p - 1, which rounding p first would lose up to all of.

    Logits are exact in the dtype, so only the rounding of the gradient itself is left: twice half an ulp.
    """
    vocabulary, confident = 203, 12.0
    weight = torch.zeros(vocabulary, 1, dtype=dtype)
    weight[7] = confident
    bias = torch.zeros(vocabulary, dtype=dtype, requires_grad=True)
    loss = implementation.linear_cross_entropy(
        torch.ones(1, 1, dtype=dtype), weight, torch.tensor([7]), linear_bias=bias
    )
    loss.backward()
    others = (vocabulary - 1) * math.exp(-confident)
    exact = -others / (1 + others)
    assert abs(bias.grad[7].item() - exact) <= (torch.finfo(dtype).eps + 1e-4) * abs(exact)


@each_implementation
def test_loss_is_not_scaled_by_accumulation_steps(implementation):
    """Micro-batches under one normalizer add up to the whole batch: loss and gradients, however uneven they are."""
    problem = Case(dtype=torch.float64, ignored=True).problem()
    count = int((problem.target != -100).sum())
    whole = loss_and_gradients(implementation.linear_cross_entropy, problem)
    total = {name: torch.zeros_like(value) for name, value in whole.items()}
    for tokens in torch.arange(len(problem.target)).split([1, 9, 2, 5]):
        part = replace(
            problem, input=problem.input.detach()[tokens].requires_grad_(), target=problem.target[tokens]
        ).with_options(normalizer=torch.tensor(count))
        results = loss_and_gradients(implementation.linear_cross_entropy, part)
        total["loss"] += results["loss"]
        total["linear_weight"] += results["linear_weight"]
        total["input"][tokens] += results["input"]
    for name, value in whole.items():
        torch.testing.assert_close(total[name], value)


def shifted(vocabulary: int, offset: float, dtype: torch.dtype = torch.float32) -> Problem:
    """Logits around ``offset``, in multiples of 1/16 so that all dtypes down to fp32 hold them exactly."""
    problem = random_problem(9, 4, vocabulary)
    problem = problem.map(lambda tensor: (tensor * 4).round() / 4)
    bias = torch.full((vocabulary,), offset, dtype=torch.float64, requires_grad=True)
    return problem.with_options(linear_bias=bias, reduction="sum").to(dtype)


@each_implementation
@pytest.mark.parametrize("vocabulary", [1, 127, 129, 257])
def test_padded_columns_are_not_in_the_sum(implementation, vocabulary):
    """With all logits near -30, one padded column of logit 0 would outweigh the vocabulary."""
    problem = shifted(vocabulary, -30.0)
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, problem))


@each_implementation
@pytest.mark.parametrize("vocabulary", [128, 129])
def test_maximum_is_not_seeded_with_zero(implementation, vocabulary):
    """With all logits under -200, exponentials relative to zero vanish and the loss would be infinite."""
    problem = shifted(vocabulary, -300.0)
    results = loss_and_gradients(implementation.linear_cross_entropy, problem)
    assert all(value.isfinite().all() for value in results.values())
    loss_baseline(problem).check(results)


@each_implementation
@pytest.mark.parametrize("ignore_index", [-1, 0, 5, 128, 129, 255, 256])
def test_ignored_label_meets_padding(implementation, ignore_index):
    """The ignored label may lie before the vocabulary, inside it, and where padded columns would be."""
    problem = random_problem(12, 24, 129).to(torch.float32)
    problem.target[::3] = ignore_index
    problem = problem.with_options(ignore_index=ignore_index)
    results = loss_and_gradients(implementation.linear_cross_entropy, problem)
    assert not results["input"][::3].any()
    loss_baseline(problem).check(results)


@each_any_upstream
@pytest.mark.parametrize("ignore_index", [-1, 5, 129])
def test_ignored_label_meets_padding_in_statistics(implementation, ignore_index):
    problem = random_problem(12, 24, 129).to(torch.float32)
    problem.target[::3] = ignore_index
    problem = problem.with_options(ignore_index=ignore_index)
    statistics_baseline(problem).check(statistics_and_gradients(implementation.float_statistics, problem))


@each_implementation
@each_reduction
def test_head_gradient_is_not_missing(implementation, reduction):
    """A head trained on frozen hidden states: the loss asks for a gradient and the head gets it."""
    problem = random_problem(9, 24, 203).to(torch.float32).freeze("input").with_options(reduction=reduction)
    loss = problem.call(implementation.linear_cross_entropy)
    assert loss.requires_grad
    loss.backward()
    assert problem.linear_weight.grad is not None
    assert problem.linear_weight.grad.abs().sum() > 0
    assert problem.input.grad is None


@each_implementation
@each_reduction
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=["bare", "busy"])
def test_all_ignored_is_not_nan(implementation, reduction, options):
    """The mean over no tokens is 0, with gradients 0, so that one empty micro-batch does not poison a run."""
    problem = random_problem(9, 24, 203).to(torch.bfloat16).with_options(reduction=reduction, **options)
    problem.target.fill_(-100)
    results = loss_and_gradients(implementation.linear_cross_entropy, problem)
    assert results["loss"].item() == 0
    for name in problem.leaves():
        assert not results[name].any()
        assert results[name].isfinite().all()


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *FORWARD_ONLY], ids=str)
def test_loss_is_not_summed_in_low_precision(implementation):
    """The sum of 2,048 equal token losses is right to fp32, where bf16 stops growing at 256 times one of them.

    All logits are 0, exact in bf16: each loss is log V.
    """
    tokens, vocabulary = 2048, 129
    hidden = torch.ones(tokens, 2, dtype=torch.bfloat16)
    weight = torch.zeros(vocabulary, 2, dtype=torch.bfloat16, requires_grad=implementation not in FORWARD_ONLY)
    implementation = replace(implementation, rows=implementation.rows and 100)
    loss = implementation.linear_cross_entropy(hidden, weight, torch.zeros(tokens, dtype=torch.int64), reduction="sum")
    assert loss.dtype == torch.float32
    # Sums in fp32 in any order: at most half an ulp for each of 2,048 terms, in fact far less.
    assert abs(loss.item() / (tokens * math.log(vocabulary)) - 1) <= tokens * torch.finfo(torch.float32).eps / 2


@each_implementation
@pytest.mark.parametrize("offset", [1024.0, -1024.0, 65536.0])
def test_large_common_offset(implementation, offset):
    """Adding one number to all logits changes neither loss nor gradients beyond the rounding of that number."""
    problem = shifted(203, offset)
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, problem))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_bias_gives_no_negative_loss(implementation, dtype):
    """With a bias, a label's loss is still minus a log-probability: not negative, and right."""
    problem = Case(dtype=dtype, data="peaked", bias=True, reduction="sum").problem()
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, problem))


@pytest.mark.parametrize("implementation", [*ANY_UPSTREAM, *FORWARD_ONLY], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_log_probabilities_are_not_positive(implementation, dtype, softcap):
    """The target's logit is rounded as it was in the sum, so that no probability exceeds one.

    What is left is the rounding of log-sum-exp and of one difference in fp32.
    """
    problem = Case(dtype=dtype, data="peaked", leading=(64,)).head_problem().with_options(softcap=softcap)
    with implementation.grad_mode():
        statistics = problem.call(implementation.token_statistics, outputs=("nll", "logsumexp"))
    assert (statistics.nll >= -2 * torch.finfo(torch.float32).eps * statistics.logsumexp.abs()).all()
    assert (statistics.nll < 0.1).any()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_evaluation_between_training_steps(context, backend):
    """A loss without gradients, between two with, of the same parameters."""
    problem = random_problem(9, 24, 203).to(torch.float32)
    before = loss_and_gradients(logitless.linear_cross_entropy, problem, backend=backend)
    with context():
        evaluated = problem.call(logitless.linear_cross_entropy, backend=backend)
    after = loss_and_gradients(logitless.linear_cross_entropy, problem, backend=backend)
    torch.testing.assert_close(evaluated.clone(), before["loss"])
    for name in before:
        assert torch.equal(before[name], after[name])


@each_any_upstream
def test_policy_gradient_norm(implementation: Implementation):
    """The gradient of a policy loss through token log-probabilities is that of plain PyTorch, not a multiple of it."""
    problem = random_problem(12, 24, 203).to(torch.float64)
    advantage = torch.randn(12, generator=generator(3), dtype=torch.float64)
    old = torch.full((12,), -5.0, dtype=torch.float64)

    def policy_loss(nll: torch.Tensor) -> torch.Tensor:
        ratio = (-nll.double() - old).exp()
        return -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()

    leaves = list(problem.leaves().values())
    ours = torch.autograd.grad(policy_loss(problem.call(implementation.token_statistics).nll), leaves)
    theirs = torch.autograd.grad(policy_loss(problem.call(plain.token_statistics)["nll"]), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-9)


@each_implementation
@pytest.mark.parametrize("label_smoothing", [0.0, 0.125])
def test_vocabulary_of_one(implementation, label_smoothing):
    """The loss and every gradient are zero, up to some ulps of the terms that cancel."""
    problem = random_problem(9, 24, 1).to(torch.float32).with_options(reduction="sum", label_smoothing=label_smoothing)
    problem = problem.with_options(linear_bias=torch.ones(1, requires_grad=True))
    ours = loss_and_gradients(implementation.linear_cross_entropy, problem)
    size = problem.input.detach().norm(dim=1).max() * problem.linear_weight.detach().norm()  # of a logit
    sizes = {"loss": 1 + size, "input": size, "linear_weight": size, "linear_bias": 1}
    for name, value in ours.items():
        assert value.abs().max() <= 9 * 4 * torch.finfo(torch.float32).eps * (1 + size) * sizes[name], name
