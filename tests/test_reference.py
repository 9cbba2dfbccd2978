"""The reference backend against plain PyTorch in fp64, and its gradients against finite differences."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

import logitless
import plain
from problems import Case, coarse, generator, loss_cases, random_problem, statistics_cases
from tolerance import (
    loss_and_gradients,
    loss_baseline,
    statistics_and_gradients,
    statistics_baseline,
)

reference_loss = partial(logitless.linear_cross_entropy, backend="reference")

FLOATS = ("nll", "logsumexp", "entropy")


def reference_statistics(*args, **options) -> dict[str, torch.Tensor]:
    statistics = logitless.token_statistics(*args, outputs=FLOATS, backend="reference", **options)
    return {name: getattr(statistics, name) for name in FLOATS}


@pytest.mark.parametrize("form", ["two_stage", "statistics"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.125, 1.0])
@pytest.mark.parametrize("class_weight", [False, True])
def test_plain_is_pytorch(form, reduction, label_smoothing, class_weight):
    """What the tests compare with is F.cross_entropy of F.linear wherever PyTorch has the option."""
    problem = random_problem(9, 4, 13)
    target = problem.target.masked_fill(torch.arange(9) == 2, -100)
    options = {
        "reduction": reduction,
        "label_smoothing": label_smoothing,
        "weight": coarse(13, low=0.5, high=2, seed=0) if class_weight else None,
    }
    bias = torch.randn(13, generator=generator(1), dtype=torch.float64)
    ours = plain.linear_cross_entropy(
        problem.input, problem.linear_weight, target, linear_bias=bias, form=form, **options
    )
    theirs = F.cross_entropy(F.linear(problem.input, problem.linear_weight, bias), target, **options)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", [c for c in loss_cases() if c.dtype == torch.float64], ids=str)
def test_loss_in_pairs(case):
    problem = case.problem()
    loss_baseline(problem).check(loss_and_gradients(reference_loss, problem))


ALL_OPTIONS = {
    "bias": True,
    "class_weight": True,
    "token_weight": True,
    "ignored": True,
    "label_smoothing": 0.125,
    "z_loss": 2.0**-7,
    "softcap": 5.0,
    "logit_scale": 0.75,
}
ONE_OPTION = [{}, *({name: value} for name, value in ALL_OPTIONS.items()), ALL_OPTIONS]
REDUCTIONS = [{"reduction": "mean"}, {"reduction": "sum"}, {"reduction": "none"}, {"normalizer": 7.5}]


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=str)
@pytest.mark.parametrize("options", ONE_OPTION, ids=lambda options: ",".join(options) if len(options) < 2 else "all")
def test_each_option_alone_and_all_together(options, reduction):
    problem = Case(**options, **reduction).problem()
    loss_baseline(problem).check(loss_and_gradients(reference_loss, problem))


@pytest.mark.parametrize("case", [c for c in statistics_cases() if c.dtype == torch.float64], ids=str)
def test_statistics_in_pairs(case):
    problem = case.head_problem()
    statistics_baseline(problem).check(statistics_and_gradients(reference_statistics, problem))


def small_problem():
    problem = random_problem(4, 3, 7)
    problem.target[1] = -100
    bias = torch.randn(7, generator=generator(1), dtype=torch.float64).requires_grad_()
    return problem.with_options(linear_bias=bias)


GRADCHECK_OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 2.5},
    "weight": {"weight": coarse(7, low=0.5, high=2, seed=3)},
    "token_weight": {"token_weight": coarse(4, low=-1, high=2, seed=4)},
    "label_smoothing": {"label_smoothing": 0.125},
    "z_loss": {"z_loss": 0.01},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.75},
}
GRADCHECK_OPTIONS["all"] = {
    name: value
    for options in list(GRADCHECK_OPTIONS.values())[4:]
    for name, value in (options | {"reduction": "none"}).items()
}


@pytest.mark.parametrize("name", GRADCHECK_OPTIONS)
def test_gradcheck_of_the_loss(name):
    problem = small_problem()

    def loss(input, linear_weight, linear_bias):
        return reference_loss(input, linear_weight, problem.target, linear_bias=linear_bias, **GRADCHECK_OPTIONS[name])

    assert torch.autograd.gradcheck(loss, tuple(problem.leaves().values()))


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"logit_scale": 0.75, "softcap": 2.0}], ids=str)
def test_gradcheck_of_all_statistics_at_once(options):
    problem = small_problem()

    def statistics(input, linear_weight, linear_bias):
        values = reference_statistics(input, linear_weight, problem.target, linear_bias=linear_bias, **options)
        return tuple(values.values())

    assert torch.autograd.gradcheck(statistics, tuple(problem.leaves().values()))
