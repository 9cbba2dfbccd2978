"""The operators under torch.compile: whole graphs, results of eager mode, and PyTorch's own checks of an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import logitless
from implementations import KEEP_ALL
from logitless import compiled
from logitless.options import HeadOptions
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


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
    wants = (True, True, False)
    settings = compiled.Settings(backend, None, HeadOptions(), None, "input", torch.float32, wants, forced)
    numbers = (1.0, None, 0.0, 0.01, None)
    texts = [compiled.written(settings, numbers, "mean", (), None)]
    if forced is None:
        texts += [compiled.written(settings, numbers, "mean", (), traced) for traced in ("windowed", "chunked")]
    for text in texts:
        arguments = (input, weight, None, target.clamp_min(0), None, scale, None, None, None, None, text)
        torch.library.opcheck(compiled.linear_head, arguments)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_opcheck_of_statistics(backend):
    input, weight, target, bias = inputs(bias=True, tokens=PADDED_TOKENS, vocabulary=PADDED_VOCABULARY)
    scale = torch.ones(PADDED_TOKENS)
    wants, outputs = (True, True, True), ("nll", "entropy", "prediction")
    settings = compiled.Settings(backend, None, HeadOptions(softcap=5.0), None, "input", torch.float32, wants, None)
    for traced in (None, "windowed"):
        text = compiled.written(settings, (1.0, 5.0, None, None, None), None, outputs, traced)
        arguments = (input, weight, bias, target.clamp_min(0), None, scale, None, None, None, None, text)
        torch.library.opcheck(compiled.linear_head, arguments)


# --- any number of tokens ---------------------------------------------------------------------------------------------

LENGTHS = range(10, 22)
FORMS = {
    "loss": {},
    "per token": {"reduction": "none"},
    "sum": {"reduction": "sum", "z_loss": 0.01},
    "busy": {"softcap": 5.0, "logit_scale": 0.75, "label_smoothing": 0.125, "z_loss": 2.0**-7},
    "busy, per token": {"softcap": 5.0, "label_smoothing": 0.125, "reduction": "none"},
    "sampled": {"gradient": logitless.Sampled(threshold=KEEP_ALL)},
    "sampled, per token": {"gradient": logitless.Sampled(threshold=KEEP_ALL), "reduction": "none"},
}


def plain_loss(input, weight, target, bias, reduction="mean", **_):
    return F.cross_entropy(F.linear(input, weight, bias), target, reduction=reduction)


def compilations(function: Callable, calls: list[tuple], dynamic: bool | None) -> tuple[int, list[list[torch.Tensor]]]:
    """How often it was compiled in one graph, and loss and gradients of each call."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(function, backend=counter, fullgraph=True, dynamic=dynamic)
    results = [loss_and_gradients(lambda *tensors: whole(*tensors).sum(), call) for call in calls]
    return counter.frame_count, results


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("form", FORMS)
def test_varying_lengths(form, backend, dynamic):
    """Twelve lengths take as many compilations as of the plain loss, and each has the results of eager mode.

    With ``dynamic=True`` the first takes two: numbers are variables until one has to be a constant.
    """
    options = {"backend": backend, **FORMS[form]}
    calls = [inputs(bias=True, tokens=tokens) for tokens in LENGTHS]

    def loss(input, weight, target, bias):
        return logitless.linear_cross_entropy(input, weight, target, linear_bias=bias, **options)

    count, given = compilations(loss, calls, dynamic)
    plain = compilations(lambda *tensors: plain_loss(*tensors, **options), calls, dynamic)[0]
    assert count <= plain + (dynamic is True)
    for call, results in zip(calls, given, strict=True):
        assert_same(results, loss_and_gradients(lambda *tensors: loss(*tensors).sum(), call))


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_statistics_of_varying_lengths(backend, dynamic):
    outputs = ("nll", "entropy", "prediction", "target_rank")

    def statistics(input, weight, target):
        given = logitless.token_statistics(input, weight, target, outputs=outputs, backend=backend)
        return given.nll, given.entropy, given.prediction, given.target_rank

    calls = [inputs(tokens=tokens) for tokens in LENGTHS]
    whole = torch.compile(statistics, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for call in calls:
        for ours, theirs in zip(whole(*call), statistics(*call), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=4e-6)
    count, given = compilations(lambda *tensors: sum(whole_of(statistics(*tensors))), calls, dynamic)
    assert count <= 2
    for call, results in zip(calls, given, strict=True):
        assert_same(results, loss_and_gradients(lambda *tensors: sum(whole_of(statistics(*tensors))), call))


def whole_of(statistics: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Sums of those that have a gradient."""
    return [value.sum() for value in statistics[:2]]


NUMBERS = {
    "logit_scale": (1.0, 0.5, 0.7, 0.9, 1.1),
    "softcap": (5.0, 7.0, 9.0, 30.0),
    "z_loss": (0.5, 0.25, 0.1, 0.01),
    "label_smoothing": (0.5, 0.25, 0.1, 0.01),
    "normalizer": (7.0, 9.0, 11.0, 12.5),
}


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("kind", [float, torch.tensor], ids=["number", "tensor"])
def test_numbers_that_change_from_call_to_call(name, kind):
    """Are compiled for at most twice: once for a constant, once for a variable."""
    if kind is torch.tensor and name != "normalizer":
        pytest.skip("a number")

    def loss(input, weight, target, number):
        return logitless.linear_cross_entropy(input, weight, target, **{name: number})

    counter = CompileCounterWithBackend("aot_eager")
    whole = torch.compile(loss, backend=counter, fullgraph=True)
    for number in NUMBERS[name]:
        given = loss_and_gradients(lambda *tensors: whole(*tensors, kind(number)), inputs())  # noqa: B023
        assert_same(given, loss_and_gradients(lambda *tensors: loss(*tensors, kind(number)), inputs()))  # noqa: B023
    assert counter.frame_count <= 2


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_marked_number_of_tokens(reduction):
    """In one graph from the first call on."""
    counter = CompileCounterWithBackend("aot_eager")

    def loss(input, weight, target):
        return logitless.linear_cross_entropy(input, weight, target, reduction=reduction)

    whole = torch.compile(loss, backend=counter, fullgraph=True)
    for tokens in LENGTHS:
        call = inputs(tokens=tokens)
        torch._dynamo.mark_dynamic(call[0], 0)
        torch._dynamo.mark_dynamic(call[2], 0)
        given = loss_and_gradients(lambda *tensors: whole(*tensors).sum(), call)
        assert_same(given, loss_and_gradients(lambda *tensors: loss(*tensors).sum(), inputs(tokens=tokens)))
    assert counter.frame_count == 1


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("strategy", ["stored", "windowed"])
def test_other_strategies_for_any_number_of_tokens_are_refused(strategy):
    """What they keep has a size that the graph was not traced for."""
    whole = torch.compile(logitless.linear_cross_entropy, backend="aot_eager", dynamic=True)
    with force_strategy(strategy), pytest.raises(Exception, match="cannot serve a graph for any number of tokens"):
        whole(*inputs())


def test_export_with_any_number_of_tokens():
    class Loss(torch.nn.Module):
        def forward(self, input, weight, target):
            return logitless.linear_cross_entropy(input, weight, target)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    call = tuple(tensor.detach() for tensor in inputs())
    exported = torch.export.export(Loss(), call, dynamic_shapes=({0: tokens}, None, {0: tokens}))
    for length in (5, 37, 300):
        call = tuple(tensor.detach() for tensor in inputs(tokens=length))
        torch.testing.assert_close(exported.module()(*call), Loss()(*call))


def test_main_grad_in_a_graph_is_refused():
    input, weight, target = inputs()

    def loss():
        return logitless.linear_cross_entropy(input, weight, target, main_grad=torch.zeros_like(weight))

    with pytest.raises(Exception, match=r"main_grad is not supported under torch\.compile"):
        torch.compile(loss, fullgraph=True, backend="aot_eager")()
