"""Measured memory: what a call holds above its inputs and gradients stays under ``workspace``."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace

import pytest
import torch

import logitless
import logitless.schedules
import plain
from allocations import peak_bytes
from problems import Case, Problem
from tolerance import gradients, upstream_for

FLOATS = ("nll", "logsumexp", "entropy")


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def statistics_sum(*args, **options) -> torch.Tensor:
    statistics = logitless.token_statistics(*args, outputs=FLOATS, **options)
    return torch.stack([getattr(statistics, name).sum() for name in FLOATS]).sum()


@dataclass(frozen=True)
class Scenario:
    """A call whose memory is measured."""

    name: str
    case: Case
    hidden: int = 64
    strategy: str | None = None
    gradient: str | logitless.Sampled = "exact"

    def __str__(self) -> str:
        return self.name

    def problem(self) -> Problem:
        problem = self.case.problem()
        repeats = -(-self.hidden // problem.input.shape[-1])

        def wider(tensor: torch.Tensor) -> torch.Tensor:
            wide = tensor.detach().repeat(*[1] * (tensor.ndim - 1), repeats)[..., : self.hidden].contiguous()
            return wide.requires_grad_(tensor.requires_grad)

        return replace(problem, input=wider(problem.input), linear_weight=wider(problem.linear_weight))

    def forced(self) -> contextlib.AbstractContextManager:
        if self.strategy is None:
            return contextlib.nullcontext()
        return logitless.schedules.force_strategy(self.strategy)


LARGE = Case(dtype=torch.float32, leading=(257,), vocabulary=2003)
BUSY = replace(
    LARGE, bias=True, class_weight=True, token_weight=True, ignored=True, label_smoothing=0.125, z_loss=2.0**-7
)
SAMPLED = logitless.Sampled(threshold=1 / 8)
ESTIMATED = logitless.Sampled(threshold=1 / 8, scan="fp8")

SCENARIOS = [
    Scenario("auto", LARGE),
    Scenario("auto-busy", BUSY),
    Scenario("auto-bf16", replace(BUSY, dtype=torch.bfloat16)),
    Scenario("auto-fp64", replace(BUSY, dtype=torch.float64)),
    Scenario("auto-none", replace(BUSY, reduction="none")),
    Scenario("auto-none-bf16", replace(LARGE, reduction="none", dtype=torch.bfloat16, softcap=5.0)),
    Scenario("auto-frozen-weight", replace(BUSY, frozen=("linear_weight",))),
    Scenario("auto-frozen-input", replace(BUSY, frozen=("input",))),
    Scenario("auto-few-tokens", replace(BUSY, leading=(3,))),
    Scenario("auto-small-vocabulary", replace(BUSY, leading=(1025,), vocabulary=128)),
    Scenario("auto-wide", replace(BUSY, leading=(33,), vocabulary=515), hidden=1536),
    Scenario("stored", LARGE, strategy="stored"),
    Scenario("stored-busy", BUSY, strategy="stored"),
    Scenario("chunked", LARGE, strategy="chunked"),
    Scenario("chunked-busy-bf16", replace(BUSY, dtype=torch.bfloat16, softcap=5.0), strategy="chunked"),
    Scenario("windowed", LARGE, strategy="windowed"),
    Scenario("windowed-busy-bf16", replace(BUSY, dtype=torch.bfloat16, softcap=5.0), strategy="windowed"),
    Scenario(
        "windowed-wide-bf16", replace(BUSY, dtype=torch.bfloat16, vocabulary=515), hidden=1536, strategy="windowed"
    ),
    Scenario("windowed-none", replace(BUSY, reduction="none"), strategy="windowed"),
    Scenario("sampled", LARGE, gradient=SAMPLED),
    Scenario("sampled-busy-bf16", replace(BUSY, dtype=torch.bfloat16, softcap=5.0), gradient=SAMPLED),
    Scenario("sampled-none", replace(BUSY, reduction="none"), gradient=SAMPLED),
    Scenario("sampled-flat", replace(LARGE, data="flat"), gradient=SAMPLED),
    Scenario("estimated", LARGE, gradient=ESTIMATED),
    Scenario("estimated-flat", replace(LARGE, data="flat"), gradient=ESTIMATED),
    Scenario("estimated-busy-bf16", replace(BUSY, dtype=torch.bfloat16, softcap=5.0), gradient=ESTIMATED),
    Scenario("estimated-busy", BUSY, gradient=ESTIMATED),
    Scenario("estimated-fp64", replace(BUSY, dtype=torch.float64), gradient=ESTIMATED),
    Scenario("estimated-wide", replace(BUSY, leading=(33,), vocabulary=515), hidden=1536, gradient=ESTIMATED),
]


def measured(scenario: Scenario, problem: Problem, function=logitless.linear_cross_entropy, **options) -> int:
    """Peak bytes of forward and backward above inputs and gradients."""
    with scenario.forced(), torch.no_grad():
        output = torch.zeros_like(problem.target, dtype=torch.float32)
    reduced = problem.options.get("reduction") != "none" or function is statistics_sum
    upstream = upstream_for(output.sum() if reduced else output)

    def call():
        with scenario.forced():
            loss = problem.call(function, gradient=scenario.gradient, **options)
        return loss, gradients([loss], [upstream.to(loss.dtype)], problem)

    peak = peak_bytes(call)
    return peak - sum(bytes_of(leaf) for leaf in problem.leaves().values())


def smallest_workspace(scenario: Scenario, problem: Problem, function=logitless.linear_cross_entropy) -> int:
    """The number that the error for a workspace too small names."""
    with scenario.forced(), pytest.raises(ValueError, match="workspace") as error:
        problem.call(function, gradient=scenario.gradient, workspace=1)
    found = re.search(r"at least ([\d,_]+)", str(error.value))
    assert found, f"no number of bytes in {error.value}"
    return int(re.sub(r"[,_]", "", found[1]))


def test_measure_sees_the_logits_of_the_two_stage_pipeline():
    scenario = Scenario("plain", LARGE)
    problem = scenario.problem()
    upstream = torch.tensor(1.0)

    def two_stage():
        loss = problem.call(plain.linear_cross_entropy)
        return loss, gradients([loss], [upstream], problem)

    logits = 257 * 2003 * 4
    gradient_bytes = sum(bytes_of(leaf) for leaf in problem.leaves().values())
    assert 2 * logits <= peak_bytes(two_stage) - gradient_bytes <= 6 * logits


def test_measure_is_exact():
    def call():
        first = torch.empty(1000, dtype=torch.uint8)
        del first
        second = torch.empty(600, dtype=torch.uint8)
        third = torch.empty(700, dtype=torch.uint8)
        return second, third

    assert peak_bytes(call) == 1300


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
@pytest.mark.parametrize("factor", [1, 1.5, 4])
def test_workspace_is_honoured(scenario, factor):
    """From the smallest that works upwards, by the error's own number."""
    problem = scenario.problem()
    workspace = int(smallest_workspace(scenario, problem) * factor)
    assert measured(scenario, problem, workspace=workspace) <= workspace


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_smallest_workspace_is_the_smallest(scenario):
    """One byte less than the number in the error is refused, with the same number."""
    problem = scenario.problem()
    smallest = smallest_workspace(scenario, problem)
    with scenario.forced(), pytest.raises(ValueError, match=rf"at least .*{smallest}"):
        problem.call(logitless.linear_cross_entropy, gradient=scenario.gradient, workspace=smallest - 1)


@pytest.mark.parametrize("gradient", ["exact", SAMPLED], ids=["exact", "sampled"])
@pytest.mark.parametrize("factor", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_workspace_of_statistics(gradient, factor, dtype):
    scenario = Scenario("statistics", replace(BUSY, dtype=dtype), gradient=gradient)
    problem = scenario.problem()
    problem = replace(problem, options={"linear_bias": problem.options["linear_bias"]})
    workspace = smallest_workspace(scenario, problem, statistics_sum) * factor
    # The sum of the three outputs is this test's own.
    own = 8 * len(FLOATS)
    assert measured(scenario, problem, statistics_sum, workspace=workspace) <= workspace + own


CONVERTED = {
    "hidden bf16": lambda problem: replace(problem, input=problem.input.detach().bfloat16().requires_grad_()),
    "weight bf16": lambda problem: replace(
        problem, linear_weight=problem.linear_weight.detach().bfloat16().requires_grad_()
    ),
    "transposed": lambda problem: problem.map(lambda t: t.mT.contiguous().mT if t.ndim > 1 else t),
    "leading": lambda problem: replace(
        problem,
        input=problem.input.detach().expand(2, -1, -1).transpose(0, 1).requires_grad_(),
        target=problem.target.expand(2, -1).transpose(0, 1),
    ),
    "slice": lambda problem: replace(
        problem,
        input=torch.stack([problem.input.detach()] * 2).requires_grad_()[:, :-1],
        target=torch.stack([problem.target] * 2)[:, :-1],
    ),
}


@pytest.mark.parametrize("conversion", CONVERTED)
@pytest.mark.parametrize("gradient", ["exact", SAMPLED], ids=["exact", "sampled"])
def test_copies_count(conversion, gradient):
    """Copies that conversion to another dtype or layout needs are part of the workspace."""
    scenario = Scenario(conversion, LARGE, gradient=gradient)
    problem = CONVERTED[conversion](scenario.problem())
    workspace = smallest_workspace(scenario, problem)
    assert measured(scenario, problem, workspace=workspace) <= workspace


@pytest.mark.parametrize("gradient", ["exact", SAMPLED], ids=["exact", "sampled"])
def test_autocast_counts(gradient):
    scenario = Scenario("autocast", LARGE, gradient=gradient)
    problem = scenario.problem()

    def autocast(*args, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return logitless.linear_cross_entropy(*args, **options)

    workspace = smallest_workspace(scenario, problem, autocast)
    assert measured(scenario, problem, autocast, workspace=workspace) <= workspace


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_default_workspace_is_what_the_plan_says(dtype):
    """Without ``workspace=`` the measured peak stays under the plan's own figure."""
    scenario = Scenario("default", replace(LARGE, dtype=dtype))
    problem = scenario.problem()
    plan = logitless.plan(tokens=257, hidden=64, vocabulary=2003, dtype=dtype)
    assert plan.strategy
    assert plan.reason
    assert plan.strategy in str(plan)
    assert measured(scenario, problem) <= plan.workspace


def test_without_gradients():
    problem = Scenario("loss only", BUSY).problem()
    with torch.no_grad():
        with pytest.raises(ValueError, match="workspace") as error:
            problem.call(logitless.linear_cross_entropy, workspace=1)
        smallest = int(re.search(r"at least (\d+)", str(error.value))[1])
        peak = peak_bytes(lambda: problem.call(logitless.linear_cross_entropy, workspace=smallest))
    assert peak <= smallest
