"""Properties that hold for every shape and every option, over problems that hypothesis draws."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from implementations import CHUNKED, SAMPLED, TORCH, WINDOWED, Implementation
from problems import DATA, Case, Problem, generator, make_problem
from tolerance import loss_and_gradients, loss_baseline, statistics_and_gradients, statistics_baseline

pytestmark = pytest.mark.usefixtures("one_thread")

# The same examples on every run and machine.
reproducible = settings(deadline=None, max_examples=40, derandomize=True, database=None)

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])


@st.composite
def implementations(draw, among=TORCH) -> Implementation:
    """Any implementation with any tile sizes."""
    implementation = draw(st.sampled_from(among))
    if implementation.rows is not None:
        implementation = replace(implementation, rows=draw(st.integers(3, 15)))
    if implementation.window is not None:
        implementation = replace(implementation, window=draw(st.integers(7, 300)))
    return implementation


@st.composite
def problems(draw, dtype=dtypes, reductions=("mean", "sum", "none"), min_tokens=0) -> Problem:
    """Any shape, kind of logits, and combination of options."""
    # Not 1: the gradient would be zero, and what is left the rounding of terms that cancel, which has no scale.
    vocabulary = draw(st.one_of(st.integers(2, 20), st.integers(120, 300)))
    leading = draw(st.sampled_from([(draw(st.integers(min_tokens, 13)),), (2, draw(st.integers(min_tokens, 5)))]))
    case = Case(
        dtype=draw(dtype),
        data=draw(st.sampled_from(DATA)),
        vocabulary=vocabulary,
        leading=leading,
        reduction=draw(st.sampled_from(reductions)),
        bias=draw(st.booleans()),
        class_weight=draw(st.booleans()),
        token_weight=draw(st.booleans()),
        ignored=draw(st.booleans()),
        label_smoothing=draw(st.sampled_from([0.0, 0.125, 1.0])),
        z_loss=draw(st.sampled_from([0.0, 2.0**-7])),
        softcap=draw(st.sampled_from([None, 2.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.5, -2.0])),
        frozen=draw(st.sampled_from([(), ("input",), ("linear_weight",)])),
    )
    return case.problem()


def head_of(problem: Problem) -> Problem:
    names = ("linear_bias", "softcap", "logit_scale")
    return replace(problem, options={k: v for k, v in problem.options.items() if k in names})


def select(problem: Problem, tokens: torch.Tensor) -> Problem:
    """Some tokens of a problem, in the order given."""
    options = dict(problem.options)
    if "token_weight" in options:
        options["token_weight"] = options["token_weight"].flatten()[tokens]
    rows = problem.input.detach().flatten(0, -2)[tokens].requires_grad_(problem.input.requires_grad)
    return replace(problem, input=rows, target=problem.target.flatten()[tokens], options=options)


@reproducible
@given(implementations(), problems())
def test_loss_and_gradients(implementation, problem):
    if problem.options["reduction"] == "none" and not implementation.any_upstream:
        problem = problem.with_options(reduction="sum")
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, problem))


@reproducible
@given(implementations([i for i in TORCH if i.any_upstream]), problems().map(head_of))
def test_statistics_and_gradients(implementation, problem):
    statistics_baseline(problem).check(statistics_and_gradients(implementation.float_statistics, problem))


fp64_sums = problems(st.just(torch.float64), ("sum",), min_tokens=1)


@reproducible
@given(implementations(), fp64_sums, st.integers(0, 2**32))
def test_order_of_tokens_does_not_matter(implementation, problem, seed):
    order = torch.randperm(problem.target.numel(), generator=generator(seed))
    ordered = loss_and_gradients(implementation.linear_cross_entropy, select(problem, order))
    given_order = loss_and_gradients(implementation.linear_cross_entropy, problem)
    if "input" in given_order:
        given_order["input"] = given_order["input"].flatten(0, -2)[order]
    for name in given_order:
        torch.testing.assert_close(ordered[name], given_order[name])


@reproducible
@given(implementations(), fp64_sums)
def test_ignored_tokens_might_as_well_be_absent(implementation, problem):
    kept = (problem.target.flatten() != -100).nonzero().squeeze(1)
    short = loss_and_gradients(implementation.linear_cross_entropy, select(problem, kept))
    whole = loss_and_gradients(implementation.linear_cross_entropy, problem)
    if "input" in whole:
        flat = whole["input"].flatten(0, -2)
        assert not flat[(problem.target.flatten() == -100).nonzero()].any()
        whole["input"] = flat[kept]
    for name in whole:
        torch.testing.assert_close(whole[name], short[name])


@reproducible
@given(st.sampled_from(TORCH), fp64_sums, st.integers(0, 2**32))
def test_order_of_the_vocabulary_does_not_matter(implementation, problem, seed):
    """Renaming the vocabulary entries permutes rows of the weight's gradient and changes nothing else."""
    vocabulary = problem.linear_weight.shape[0]
    order = torch.randperm(vocabulary, generator=generator(seed))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(vocabulary))
    options = {
        name: value.detach()[order].requires_grad_(value.requires_grad) if name in ("linear_bias", "weight") else value
        for name, value in problem.options.items()
    }
    weight = problem.linear_weight
    renamed = replace(
        problem,
        linear_weight=weight.detach()[order].requires_grad_(weight.requires_grad),
        target=torch.where(problem.target == -100, problem.target, place[problem.target.clamp(min=0)]),
        options=options,
    )
    ours = loss_and_gradients(implementation.linear_cross_entropy, renamed)
    expected = loss_and_gradients(implementation.linear_cross_entropy, problem)
    for name, value in expected.items():
        permuted = value[order] if name in ("linear_weight", "linear_bias") else value
        torch.testing.assert_close(ours[name], permuted)


@reproducible
@given(
    st.sampled_from([CHUNKED, WINDOWED, SAMPLED]),
    problems(st.just(torch.float32), ("sum",)),
    st.lists(st.tuples(st.integers(1, 13), st.integers(1, 20)), min_size=2, max_size=3),
)
def test_tile_sizes_do_not_matter(implementation, problem, pieces):
    """Into however many chunks and windows a problem is cut, the error stays within the same bound."""
    baseline = loss_baseline(problem)
    for chunks, windows in pieces:
        rows = max(1, problem.target.numel() // chunks)
        window = implementation.window and max(1, len(problem.linear_weight) // windows)
        tiled = replace(implementation, rows=rows, window=window)
        baseline.check(loss_and_gradients(tiled.linear_cross_entropy, problem))


@reproducible
@given(implementations(), st.sampled_from(DATA), st.floats(-1e4, 1e4))
def test_common_offset_of_the_logits_does_not_matter(implementation, data, offset):
    problem = make_problem(data, 6, 4, 150).with_options(reduction="sum")
    bias = torch.zeros(150, dtype=torch.float64)
    plain = loss_and_gradients(implementation.linear_cross_entropy, problem.with_options(linear_bias=bias))
    moved = loss_and_gradients(implementation.linear_cross_entropy, problem.with_options(linear_bias=bias + offset))
    for name in plain:
        # Logits, log-sum-exp and their difference are each rounded at the size of the offset.
        slack = 16 * torch.finfo(torch.float64).eps * max(1.0, abs(offset))
        torch.testing.assert_close(moved[name], plain[name], atol=slack * 6 * 150, rtol=slack)
