"""The operators under torch.compile: whole graphs, results of eager mode, and PyTorch's own checks of an operator."""

from __future__ import annotations

import pytest
import torch

import logitless
from logitless import compiled
from logitless.objective import LossObjective, StatisticsObjective
from logitless.options import HeadOptions, LossOptions
from logitless.schedules import Forced, force_strategy
from problems import generator, random_problem

TOKENS, HIDDEN, VOCABULARY = 37, 24, 515

STRATEGIES = (
    None,
    Forced("stored", None, 128),
    Forced("windowed", None, 128),
    Forced("windowed", None, 128, kept=2),
    Forced("chunked", 10, None),
)
BACKENDS = [
    *(pytest.param("torch", forced, id=f"torch-{number}") for number, forced in enumerate(STRATEGIES)),
    pytest.param("reference", None, id="reference"),
    *(pytest.param("triton", forced, id=f"triton-{number}") for number, forced in enumerate(STRATEGIES[1:])),
    pytest.param("triton", Forced("stored", None, None, prepared=True), id="triton-prepared"),
]


def inputs(bias: bool = False, tokens: int = TOKENS, vocabulary: int = VOCABULARY) -> tuple[torch.Tensor, ...]:
    problem = random_problem(tokens, HIDDEN, vocabulary).to(torch.float32)
    target = problem.target.masked_fill(torch.arange(tokens) % 5 == 2, -100)
    tensors = (problem.input, problem.linear_weight, target)
    if not bias:
        return tensors
    return (*tensors, torch.randn(vocabulary, generator=generator(3)).requires_grad_())


def demanded(forced: Forced | None):
    if forced is None:
        return torch.enable_grad()
    return force_strategy(
        forced.strategy, rows=forced.rows, window=forced.window, kept=forced.kept, prepared=forced.prepared
    )


def loss_and_gradients(function, tensors):
    loss = function(*tensors)
    leaves = [tensor for tensor in tensors if tensor.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * 0.3125, leaves)]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Equal but for the order of a few fp32 sums."""
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=4e-6 * float(b.abs().max()))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(("backend", "forced"), BACKENDS)
def test_loss_in_one_graph(backend, forced):
    def loss(input, weight, target):
        return logitless.linear_cross_entropy(input, weight, target, z_loss=0.01, softcap=5.0, backend=backend)

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with demanded(forced):
        assert_same(loss_and_gradients(whole, inputs()), loss_and_gradients(loss, inputs()))


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_statistics_in_one_graph(backend):
    """Several outputs, one not differentiable, one not used, with upstream gradients that depend on them."""

    def objective(input, weight, target, bias):
        names = ("nll", "prediction", "entropy", "logsumexp")
        statistics = logitless.token_statistics(
            input, weight, target, outputs=names, linear_bias=bias, logit_scale=0.75, backend=backend
        )
        right = statistics.prediction == target
        return (statistics.nll.square() * right.logical_not()).sum() + statistics.entropy.mean()

    whole = torch.compile(objective, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(whole, inputs(bias=True)), loss_and_gradients(objective, inputs(bias=True)))


@pytest.mark.parametrize("scan", ["input", "fp8"])
def test_sampled_in_one_graph(scan):
    """Keeping every block, sampled equals exact."""

    def loss(input, weight, target):
        gradient = logitless.Sampled(threshold=1e-30, scan=scan)
        return logitless.linear_cross_entropy(input, weight, target, gradient=gradient, label_smoothing=0.125)

    def exact(input, weight, target):
        return logitless.linear_cross_entropy(input, weight, target, label_smoothing=0.125)

    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(loss_and_gradients(whole, inputs()), loss_and_gradients(exact, inputs()))


def test_loss_without_gradients_in_one_graph():
    whole = torch.compile(logitless.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(whole(*inputs()), logitless.linear_cross_entropy(*inputs()))


def test_target_out_of_range_in_a_graph_is_nan():
    """A graph cannot raise: the token's loss is NaN, as on an accelerator, and the others' are what they are."""
    input, weight, target = inputs()
    target[3] = VOCABULARY
    whole = torch.compile(logitless.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    losses = whole(input, weight, target, reduction="none")
    assert losses.isnan().nonzero().flatten().tolist() == [3]
    with pytest.raises(ValueError, match="at token 3"):
        logitless.check_targets(target, VOCABULARY)


@pytest.mark.parametrize("upstream", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize(("backend", "forced"), BACKENDS)
def test_upstream_gradient_that_is_not_finite(backend, forced, upstream):
    """As in plain PyTorch: it reaches every gradient but those of hidden states whose target is ignored."""

    def loss(input, weight, target, bias):
        return logitless.linear_cross_entropy(input, weight, target, linear_bias=bias, backend=backend)

    input, weight, target, bias = inputs(bias=True)
    whole = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with demanded(forced):
        of_input, of_weight, of_bias = torch.autograd.grad(
            whole(input, weight, target, bias), (input, weight, bias), torch.tensor(upstream)
        )
    ignored = target == -100
    assert not of_input[ignored].any()
    assert not of_input[~ignored].isfinite().any()
    assert not of_weight.isfinite().any()
    assert not of_bias.isfinite().any()


# An operator's outputs are compared bit for bit, with what it leaves for its gradient among them. Sizes that need no
# padding, and rows that all count, leave nothing unwritten there.
PADDED_TOKENS, PADDED_VOCABULARY = 48, 512


@pytest.mark.parametrize(("backend", "forced"), BACKENDS)
def test_opcheck_of_the_loss(backend, forced):
    input, weight, target = inputs(tokens=PADDED_TOKENS, vocabulary=PADDED_VOCABULARY)
    scale = torch.full((PADDED_TOKENS,), 1 / PADDED_TOKENS)
    objective = LossObjective(LossOptions(z_loss=0.01), None, scale, None, 1.0)
    wants = (True, True, False)
    settings = compiled.Settings(backend, None, HeadOptions(), None, "input", torch.float32, wants, forced)
    text = compiled.written(settings, objective, None)
    arguments = (input, weight, None, target.clamp_min(0), None, scale, None, None, None, text)
    torch.library.opcheck(compiled.linear_head, arguments)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_opcheck_of_statistics(backend):
    input, weight, target, bias = inputs(bias=True, tokens=PADDED_TOKENS, vocabulary=PADDED_VOCABULARY)
    scale = torch.ones(PADDED_TOKENS)
    objective = StatisticsObjective(("nll", "entropy", "prediction"), None, scale)
    wants = (True, True, True)
    settings = compiled.Settings(backend, None, HeadOptions(softcap=5.0), None, "input", torch.float32, wants, None)
    text = compiled.written(settings, objective, None)
    arguments = (input, weight, bias, target.clamp_min(0), None, scale, None, None, None, text)
    torch.library.opcheck(compiled.linear_head, arguments)


def test_main_grad_in_a_graph_is_refused():
    input, weight, target = inputs()

    def loss():
        return logitless.linear_cross_entropy(input, weight, target, main_grad=torch.zeros_like(weight))

    with pytest.raises(Exception, match=r"main_grad is not supported under torch\.compile"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")()
