"""``main_grad``: the weight's gradient is added to an fp32 buffer of the caller's."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import logitless
import logitless.schedules
from implementations import DEVICE, IMPLEMENTATIONS, SAMPLED, Implementation
from problems import Case, Problem, generator
from tolerance import gradients, loss_baseline, statistics_and_gradients, statistics_baseline, upstream_for

pytestmark = pytest.mark.usefixtures("one_thread")

# The chunked strategy forms the gradient before it is known by how much to scale it, so that it cannot be added.
ADDING = tuple(implementation for implementation in IMPLEMENTATIONS if implementation.strategy != "chunked")
each_implementation = pytest.mark.parametrize("implementation", ADDING, ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

BUSY = Case(
    dtype=torch.float32, bias=True, class_weight=True, ignored=True, label_smoothing=0.125, z_loss=2.0**-7, softcap=5.0
)


def buffer_for(problem: Problem, *, filled: bool = False) -> torch.Tensor:
    """Zeros, or numbers of the size of gradients."""
    size = problem.linear_weight.shape
    return torch.randn(size, generator=generator(11)).to(DEVICE) if filled else torch.zeros(size, device=DEVICE)


def called(implementation: Implementation, problem: Problem, main_grad: torch.Tensor, **overrides) -> torch.Tensor:
    return problem.call(implementation.linear_cross_entropy, main_grad=main_grad, **overrides)


@each_implementation
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("frozen", [(), ("input",), ("input", "linear_bias")], ids=str)
def test_gradient_is_added(implementation, dtype, reduction, frozen):
    """It is as exact as the gradient the weight would get, and all other results are what they are without it."""
    if reduction == "none" and not implementation.any_upstream:
        pytest.skip("this strategy needs a reduced loss")
    problem = replace(BUSY, dtype=dtype, reduction=reduction, frozen=frozen).problem()
    main_grad = buffer_for(problem)
    loss = called(implementation, problem, main_grad)
    upstream = upstream_for(loss)
    others = problem.leaves()
    weight = others.pop("linear_weight")
    results = (
        dict(zip(others, torch.autograd.grad(loss, list(others.values()), upstream), strict=True)) if others else {}
    )
    if not others:
        loss.backward(upstream)
    assert weight.grad is None
    results = {"loss": loss.detach(), "linear_weight": main_grad.cpu(), **results}
    loss_baseline(problem).check(results)
    # The sum has more digits than the weight, where the library's product has.
    narrow = dtype == torch.float32 or (implementation.backend == "torch" and dtype == torch.bfloat16)
    assert narrow or (main_grad.to(dtype) != main_grad).any()


@each_implementation
@each_dtype
def test_what_is_there_stays(implementation, dtype):
    """The buffer's own values are added to, call after call, and nothing reaches ``linear_weight.grad``."""
    problem = replace(BUSY, dtype=dtype).problem()
    alone, start = buffer_for(problem), buffer_for(problem, filled=True)
    main_grad = start.clone()
    called(implementation, problem, alone).backward()
    called(implementation, problem, main_grad).backward()
    torch.testing.assert_close(main_grad, start + alone)
    called(implementation, problem, main_grad, reduction="sum").backward()
    summed = buffer_for(problem)
    called(implementation, problem, summed, reduction="sum").backward()
    torch.testing.assert_close(main_grad, start + alone + summed)
    assert problem.linear_weight.grad is None
    assert problem.input.grad is not None


@each_implementation
def test_gradient_in_the_weight_stays(implementation):
    problem = BUSY.problem()
    problem.linear_weight.grad = torch.ones_like(problem.linear_weight)
    called(implementation, problem, buffer_for(problem)).backward()
    assert (problem.linear_weight.grad == 1).all()


@each_implementation
def test_retained_graph_adds_each_time(implementation):
    problem = BUSY.problem()
    main_grad = buffer_for(problem)
    loss = called(implementation, problem, main_grad)
    loss.backward(retain_graph=True)
    once = main_grad.clone()
    assert once.any()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(main_grad, 2 * once)
    loss.backward(torch.full_like(loss, -2))
    torch.testing.assert_close(main_grad, torch.zeros_like(once), atol=once.abs().max().item() * 1e-6, rtol=0)


@each_implementation
@pytest.mark.parametrize("how", ["frozen weight", "no_grad", "inference_mode", "no backward", "no tokens", "ignored"])
def test_untouched(implementation, how):
    """Nothing is added, to the bit, where no gradient of the weight is wanted or none comes."""
    case = replace(BUSY, frozen=("linear_weight",) if how == "frozen weight" else ())
    problem = replace(case, leading=(0,) if how == "no tokens" else (7,)).problem()
    if how == "ignored":
        problem.target.fill_(-100)
    main_grad = buffer_for(problem, filled=True)
    before = main_grad.clone()
    if how in ("no_grad", "inference_mode"):
        with getattr(torch, how)():
            natural = Implementation("natural", implementation.backend)
            called(natural, problem, main_grad)
    else:
        loss = called(implementation, problem, main_grad)
        if how != "no backward":
            loss.backward()
            assert problem.input.grad is not None
    assert torch.equal(main_grad, before)


@pytest.mark.parametrize("implementation", [i for i in ADDING if i.any_upstream], ids=str)
@each_dtype
def test_statistics(implementation, dtype):
    """All floats of ``token_statistics`` with their own upstream gradients add to one buffer."""
    problem = replace(BUSY, dtype=dtype).head_problem()
    main_grad = buffer_for(problem)
    frozen = replace(problem, linear_weight=problem.linear_weight.detach())

    def call(input, linear_weight, target, **options):
        del linear_weight
        return implementation.float_statistics(input, problem.linear_weight, target, main_grad=main_grad, **options)

    results = statistics_and_gradients(call, frozen)
    statistics_baseline(problem).check({**results, "linear_weight": main_grad.cpu()})
    assert problem.linear_weight.grad is None


def test_sampled_gradient_is_added():
    """What is sampled is what the weight would get from the same seed."""
    problem = replace(BUSY, leading=(33,), vocabulary=600).problem()

    def seeded() -> logitless.Sampled:
        return logitless.Sampled(threshold=1 / 4, generator=generator(3))

    main_grad = buffer_for(problem)
    loss = called(replace(SAMPLED, backend="torch"), problem, main_grad, gradient=seeded())
    loss.backward()
    assert problem.linear_weight.grad is None
    expected = problem.call(SAMPLED.linear_cross_entropy, gradient=seeded())
    torch.testing.assert_close(main_grad.cpu(), gradients([expected], [torch.ones(())], problem)["linear_weight"])


def test_module():
    problem = BUSY.problem()
    main_grad, expected = buffer_for(problem).cpu(), buffer_for(problem).cpu()
    module = logitless.LinearCrossEntropyLoss()
    module(problem.input, problem.linear_weight, problem.target, main_grad=main_grad).backward()
    logitless.linear_cross_entropy(problem.input, problem.linear_weight, problem.target, main_grad=expected).backward()
    assert torch.equal(main_grad, expected)
    assert main_grad.any()


# --- planning ---------------------------------------------------------------------------------------------------------

SHAPES = [
    {"tokens": tokens, "hidden": hidden, "vocabulary": vocabulary, "workspace": workspace}
    for tokens, hidden, vocabulary in [(4096, 64, 50_000), (16384, 512, 32_000), (512, 4096, 128_000)]
    for workspace in (None, "4GiB")
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_planner_never_chunks(shape, dtype):
    """A chunked gradient would need a tensor of its own until it is scaled."""
    assert logitless.plan(**shape, dtype=dtype, main_grad=True).strategy != "chunked"


def test_planner_would_chunk():
    """The shapes above are such that it does chunk without ``main_grad``."""
    assert "chunked" in {logitless.plan(**shape).strategy for shape in SHAPES}


def test_planned_gradients_are_those_of_the_hidden_states():
    arguments = {"tokens": 512, "hidden": 64, "vocabulary": 5000, "dtype": torch.bfloat16}
    assert logitless.plan(**arguments, main_grad=True).gradients == 512 * 64 * 2


# --- mistakes ---------------------------------------------------------------------------------------------------------

WEIGHT = torch.ones(11, 8)
MISTAKES = {
    "not a tensor": (True, TypeError, ["main_grad", "bool"]),
    "another shape": (torch.zeros(11, 7), ValueError, ["main_grad", "(11, 8)", "(11, 7)"]),
    "transposed": (torch.zeros(8, 11), ValueError, ["main_grad", "(8, 11)"]),
    "bf16": (torch.zeros(11, 8, dtype=torch.bfloat16), TypeError, ["main_grad", "torch.float32", "torch.bfloat16"]),
    "fp64": (torch.zeros(11, 8, dtype=torch.float64), TypeError, ["main_grad", "torch.float32", "torch.float64"]),
    "another device": (torch.zeros(11, 8, device="meta"), ValueError, ["main_grad", "cpu", "meta"]),
    "with gaps": (torch.zeros(8, 11).T, ValueError, ["main_grad", "contiguous", "(1, 11)"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("function", [logitless.linear_cross_entropy, logitless.token_statistics])
@pytest.mark.parametrize("frozen", [False, True])
def test_mistakes(mistake, function, frozen):
    """Refused where they are made, also when no gradient of the weight is wanted."""
    main_grad, kind, names = MISTAKES[mistake]
    weight = WEIGHT.clone().requires_grad_(not frozen)
    with pytest.raises(kind) as error:
        function(torch.ones(3, 8), weight, torch.zeros(3, dtype=torch.int64), main_grad=main_grad)
    for name in names:
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error.value)), name


def test_chunked_is_refused():
    """A test that forces the strategy that cannot add is told so; the gradient must not go elsewhere."""
    problem = BUSY.problem()
    with logitless.schedules.force_strategy("chunked"), pytest.raises(ValueError, match="main_grad"):
        problem.call(logitless.linear_cross_entropy, backend="torch", main_grad=buffer_for(problem).cpu())
