"""Settings of ordinary training scripts, as an axis: every way to compute gives the bits that it gives without them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import logitless
from implementations import ESTIMATES, FORWARD_ONLY, IMPLEMENTATIONS, SAMPLED, WINDOWED, Implementation
from problems import Case, Problem
from tolerance import gradients, upstream_for

pytestmark = pytest.mark.usefixtures("one_thread")

BUSY = Case(
    dtype=torch.float32,
    leading=(2, 5),
    vocabulary=150,
    bias=True,
    class_weight=True,
    token_weight=True,
    ignored=True,
    label_smoothing=0.125,
    z_loss=2.0**-7,
)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    """Another device than the tensors'; "meta" holds no numbers, so what is made there cannot be used unnoticed."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """Deterministic algorithms, with which memory that nothing was written to holds NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def after_inference() -> Iterator[None]:
    """A call in inference mode has come before."""
    problem = BUSY.problem()
    with torch.inference_mode():
        problem.call(logitless.linear_cross_entropy)
        logitless.token_statistics(problem.input, problem.linear_weight, problem.target, outputs=("nll", "entropy"))
    yield


CONDITIONS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "default device": default_device,
    "device context": lambda: torch.device("meta"),
    "default dtype fp64": lambda: default_dtype(torch.float64),
    "default dtype bf16": lambda: default_dtype(torch.bfloat16),
    "filled memory": filled_memory,
    "anomaly mode": torch.autograd.detect_anomaly,
    "saved tensors on the CPU": torch.autograd.graph.save_on_cpu,
    "after inference": after_inference,
}
each_condition = pytest.mark.parametrize("condition", CONDITIONS)

CALLS = [*IMPLEMENTATIONS, *ESTIMATES, *FORWARD_ONLY]


def reduced(implementation: Implementation) -> Problem:
    """A problem with every option that the implementation has."""
    reduction = "none" if implementation.any_upstream else "mean"
    return replace(BUSY, reduction=reduction).problem()


def loss_of(implementation: Implementation, problem: Problem) -> list[Tensor]:
    """Loss and gradients, the sample drawn anew from one seed."""
    torch.manual_seed(0)
    with implementation.grad_mode():
        loss = problem.call(implementation.linear_cross_entropy)
    if not loss.requires_grad:
        return [loss]
    return [loss.detach(), *gradients([loss], [upstream_for(loss.detach())], problem).values()]


def statistics_of(implementation: Implementation, problem: Problem) -> list[Tensor]:
    """Statistics, those of integers too, and gradients of all floats at the same time."""
    torch.manual_seed(0)
    outputs = ("nll", "logsumexp") if implementation.scan == "fp8" else logitless.options.TOKEN_OUTPUTS
    with implementation.grad_mode():
        found = implementation.token_statistics(
            problem.input, problem.linear_weight, problem.target, outputs=outputs, **head_options(problem)
        )
    values = [getattr(found, name) for name in outputs]
    floats = [value for value in values if value.requires_grad]
    given = gradients(floats, [upstream_for(value.detach()) for value in floats], problem) if floats else {}
    return [*(value.detach() for value in values), *given.values()]


def head_options(problem: Problem) -> dict[str, object]:
    return {"linear_bias": problem.options["linear_bias"]}


def assert_same_bits(ours: list[Tensor], expected: list[Tensor]) -> None:
    for number, (value, other) in enumerate(zip(ours, expected, strict=True)):
        assert (value.dtype, value.device) == (other.dtype, other.device), number
        assert torch.equal(value, other), number


def assert_same_under(
    condition: str, implementation: Implementation, ours: list[Tensor], expected: list[Tensor]
) -> None:
    """The same bits, but for what deterministic algorithms add up in an order of their own."""
    if condition == "filled memory" and implementation.backend == "triton" and implementation.sampled:
        for value, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(value, other, rtol=4e-6, atol=4e-6 * float(other.abs().max()))
        return
    assert_same_bits(ours, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@each_condition
@pytest.mark.parametrize("implementation", CALLS, ids=str)
def test_loss_under(condition, implementation):
    problem = reduced(implementation)
    expected = loss_of(implementation, problem)
    with CONDITIONS[condition]():
        given = loss_of(implementation, problem)
    assert_same_under(condition, implementation, given, expected)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@each_condition
@pytest.mark.parametrize("implementation", [i for i in CALLS if i.any_upstream], ids=str)
def test_statistics_under(condition, implementation):
    problem = reduced(implementation)
    expected = statistics_of(implementation, problem)
    with CONDITIONS[condition]():
        given = statistics_of(implementation, problem)
    assert_same_under(condition, implementation, given, expected)


@each_condition
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_report_and_counts_under(condition):
    problem = BUSY.problem()

    def results() -> str:
        torch.manual_seed(0)
        logitless.check_targets(problem.target, BUSY.vocabulary)
        report = logitless.sampling_report(problem.input, problem.linear_weight, problem.target, draws=2)
        return f"{report} {logitless.count_tokens(problem.target)}"

    expected = results()
    with CONDITIONS[condition]():
        assert results() == expected


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("gradient", ["exact", logitless.Sampled(1 / 2)], ids=["exact", "sampled"])
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_activation_checkpointing(backend, gradient, use_reentrant):
    """The loss within a checkpoint is computed again in the backward pass, from the same sample."""
    problem = BUSY.problem().with_options(backend=backend, gradient=gradient)
    if backend == "triton":
        pytest.importorskip("triton")

    def results(call: Callable[[], Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        leaves = problem.leaves().values()
        for leaf in leaves:
            leaf.grad = None
        loss = call()
        loss.backward(upstream_for(loss.detach()))
        return [loss.detach(), *(leaf.grad for leaf in leaves)]

    def within() -> Tensor:
        return checkpoint(
            lambda input: replace(problem, input=input).call(logitless.linear_cross_entropy),
            problem.input,
            use_reentrant=use_reentrant,
        )

    for value, expected in zip(
        results(within), results(lambda: problem.call(logitless.linear_cross_entropy)), strict=True
    ):  # the reentrant one computes the loss without gradients first, which is another way to add up
        torch.testing.assert_close(value, expected, rtol=4e-6, atol=4e-6 * float(expected.abs().max()))


# --- tensors written to between the passes ----------------------------------------------------------------------------

# Of these the backward pass reads the caller's own memory, of the others what the forward pass made of them.
READ_AGAIN = ("input", "linear_weight", "linear_bias", "target")
WRITTEN = (*READ_AGAIN, "weight", "token_weight", "normalizer")


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_a_tensor_written_to_before_the_backward_pass(implementation, name):
    """An error, as of PyTorch's own loss, or the gradients of what the forward pass saw; never of something else."""
    case = replace(BUSY, normalizer=7.5) if name == "normalizer" else replace(BUSY, ignored=False)
    problem = case.problem()
    if name == "normalizer":
        problem = problem.with_options(normalizer=torch.tensor(7.5))
    expected = loss_of(implementation, problem)
    torch.manual_seed(0)
    loss = problem.call(implementation.linear_cross_entropy)
    written = getattr(problem, name, None) if name in ("input", "linear_weight", "target") else problem.options[name]
    with torch.no_grad():
        written.copy_(written.flip(0) if written.ndim else written * 2)
    raised = contextlib.nullcontext()
    if name in READ_AGAIN:
        raised = pytest.raises(RuntimeError, match="modified by an inplace operation")
    given = {}
    with raised:
        given = gradients([loss], [upstream_for(loss.detach())], problem)
    if name not in READ_AGAIN:
        assert_same_bits([loss.detach(), *given.values()], expected)


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [WINDOWED, SAMPLED], ids=str)
def test_calls_from_several_threads(implementation):
    """Each of its own shape, all at the same time, many times over."""
    problems = [replace(BUSY, leading=(tokens,), vocabulary=150 + tokens).problem() for tokens in (3, 8, 21, 40)]
    gradient = logitless.Sampled(threshold=1e-30) if implementation.sampled else "exact"

    def results(problem: Problem) -> list[Tensor]:
        loss = problem.call(logitless.linear_cross_entropy, gradient=gradient, backend="torch")
        return [loss.detach(), *gradients([loss], [upstream_for(loss.detach())], problem).values()]

    expected = [results(problem) for problem in problems]
    failures: list[BaseException] = []

    def repeat(problem: Problem, wanted: list[Tensor]) -> None:
        try:
            for _ in range(10):
                assert_same_bits(results(problem), wanted)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(problems, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
