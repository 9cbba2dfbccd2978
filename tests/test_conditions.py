"""Calls under the settings of training scripts: the numbers are those without them, or what plain PyTorch does happens.

Every condition meets every call. A call's inputs are made before the condition begins.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import logitless
import logitless.bench.cases
from implementations import (
    ANY_UPSTREAM,
    CHUNKED,
    DEVICE,
    ESTIMATES,
    FORWARD_ONLY,
    IMPLEMENTATIONS,
    SAMPLED,
    STORED,
    TORCH,
    TRITON,
    WINDOWED,
    Implementation,
    moved,
)
from logitless.options import ESTIMATED_OUTPUTS, TOKEN_OUTPUTS
from logitless_demo.config import ModelConfig
from logitless_demo.model import Decoder
from problems import Case, Problem, coarse
from tolerance import Results, floor, loss_and_gradients, loss_baseline, upstream_for

pytestmark = pytest.mark.usefixtures("one_thread")

Outputs = Callable[[], dict[str, Tensor]]

# --- calls ------------------------------------------------------------------------------------------------------------

RANK = 3
GRADIENT = "gradient of "
# Nothing is packed, copied or converted on the way. Three blocks of columns, so that some are left out.
BARE = Case(dtype=torch.float32, leading=(9,), vocabulary=300)
# All options that change the arithmetic.
BUSY = replace(
    BARE,
    normalizer=7.5,
    bias=True,
    class_weight=True,
    token_weight=True,
    ignored=True,
    label_smoothing=0.125,
    z_loss=2.0**-7,
)


@dataclass(frozen=True)
class Call:
    """A function, the implementation that serves it, and its options."""

    implementation: Implementation
    function: str = "loss"  # or "statistics", "adapter"
    case: Case = BUSY

    def __str__(self) -> str:
        case = "" if self.case == BUSY else str(replace(self.case, leading=(17,), vocabulary=203))
        return "-".join(part for part in (str(self.implementation), self.function, case) if part)

    @property
    def differentiated(self) -> bool:
        return self.implementation.strategy != "loss_only"

    @property
    def names(self) -> tuple[str, ...]:
        if self.function != "statistics":
            return ("loss",)
        return ESTIMATED_OUTPUTS if self.implementation.scan == "fp8" else TOKEN_OUTPUTS

    def inputs(self) -> Inputs:
        """The same each time."""
        problem = self.case.head_problem() if self.function == "statistics" else self.case.problem()
        if "normalizer" in problem.options:
            problem = problem.with_options(normalizer=torch.tensor(problem.options["normalizer"], dtype=torch.float32))
        if self.function == "adapter":
            low = coarse(*self.case.leading, RANK, low=-1, high=1, seed=8).to(self.case.dtype)
            appended = coarse(self.case.vocabulary, RANK, low=-1, high=1, seed=9).to(self.case.dtype)
            problem = problem.freeze("linear_weight").with_options(
                low=low.requires_grad_(), appended=appended.requires_grad_()
            )
        each_token = self.function == "statistics" or self.case.reduction == "none"
        output = torch.zeros(self.case.leading if each_token else (), dtype=torch.float32)
        names = [name for name in self.names if name not in logitless.options.INTEGER_OUTPUTS]
        upstream = {name: upstream_for(output, seed) for seed, name in enumerate(names)}
        return Inputs(self, problem, upstream if self.differentiated else {})


@dataclass(frozen=True)
class Inputs:
    """What a call is made on, and what its gradients are to be of."""

    call: Call
    problem: Problem
    upstream: dict[str, Tensor]

    @property
    def leaves(self) -> dict[str, Tensor]:
        adapter = {name: value for name, value in self.problem.options.items() if name in ("low", "appended")}
        return {**self.problem.leaves(), **adapter}

    def outputs(self) -> dict[str, Tensor]:
        """Of the call, by name."""
        call, options = self.call, dict(self.problem.options)
        recording = torch.is_grad_enabled() and call.differentiated
        implementation = call.implementation
        if not recording and call.differentiated:  # only the strategy that gives no gradients serves then
            implementation = replace(implementation, strategy=None)
        if implementation.sampled:  # a sample, which the seed decides
            seeded = torch.Generator("cpu").manual_seed(3)
            options["gradient"] = logitless.Sampled(1 / 4, scan=implementation.scan, generator=seeded)
        if call.function == "adapter":
            options["adapter"] = tuple(moved(options.pop(name), DEVICE) for name in ("low", "appended"))
        if call.function == "statistics":
            options["outputs"] = call.names
        problem = replace(self.problem, options=options)
        with torch.set_grad_enabled(recording):
            if call.function == "statistics":
                found = problem.call(implementation.token_statistics)
                return {name: getattr(found, name) for name in call.names}
            return {"loss": problem.call(implementation.linear_cross_entropy)}

    def gradients(self, outputs: dict[str, Tensor], **options) -> Results:
        """From ``backward``, which every kind of checkpoint knows."""
        if not self.upstream:
            return {}
        torch.autograd.backward([outputs[name] for name in self.upstream], list(self.upstream.values()), **options)
        return {GRADIENT + name: leaf.grad for name, leaf in self.leaves.items()}

    def results(self, around: Callable[[Outputs], Outputs] = lambda outputs: outputs) -> Results:
        """Outputs and gradients; ``around`` changes what makes the outputs."""
        outputs = around(self.outputs)()
        return {**{name: value.detach() for name, value in outputs.items()}, **self.gradients(outputs)}


TOKENS = [replace(BARE, reduction="none", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
CALLS = [
    *(Call(implementation) for implementation in (*IMPLEMENTATIONS, *ESTIMATES[:2], *FORWARD_ONLY)),
    *(Call(implementation, "statistics") for implementation in (*ANY_UPSTREAM, *ESTIMATES[:2])),
    # The interpreter converts to eight bits slowly: few rows on either side.
    *(Call(implementation, case=replace(BUSY, leading=(3,), vocabulary=130)) for implementation in ESTIMATES[2:]),
    *(Call(implementation, case=TOKENS[0]) for implementation in ANY_UPSTREAM),
    *(Call(implementation, case=TOKENS[1]) for implementation in ANY_UPSTREAM if implementation in TORCH),
    *(Call(implementation, case=replace(BARE, softcap=5.0, dtype=torch.float16)) for implementation in TORCH),
    *(Call(implementation, "adapter") for implementation in (*TORCH, *TRITON[:1])),
]


@lru_cache
def expected(call: Call) -> Results:
    """What it gives under no condition."""
    return call.inputs().results()


def assert_same_bits(ours: Results, theirs: Results) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), f"{name}: {(value - theirs[name]).abs().max()} apart"


def assert_near(ours: Results, theirs: Results) -> None:
    """Up to the order of sums: either side may be off by what no implementation stays under."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        exact, accumulated = theirs[name].double(), theirs[name].float()
        assert (value.double() - exact).norm() <= 2 * floor(exact, accumulated, value), name


# --- conditions -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    """Tensors that are not told where to be hold nothing."""
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
def deterministic_algorithms() -> Iterator[None]:
    """An operation without an algorithm that gives the same bits each time raises; new memory is filled with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def anomaly_mode() -> Iterator[None]:
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        mode = torch.autograd.detect_anomaly()
    with mode:
        yield


def repacked() -> saved_tensors_hooks:
    """What is saved comes back as another tensor."""
    return saved_tensors_hooks(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), lambda copy: copy)


def checkpointed(outputs: Outputs, *, reentrant: bool) -> Outputs:
    """Made once without what the backward pass needs, and again for it."""

    def made() -> dict[str, Tensor]:
        names: list[str] = []

        def tensors(_: Tensor) -> tuple[Tensor, ...]:
            found = outputs()
            names[:] = found
            return tuple(found.values())

        differentiable = torch.ones((), device="cpu", requires_grad=True)  # reentrant ones have gradients for such only
        values = checkpoint(tensors, differentiable, use_reentrant=reentrant)
        return dict(zip(names, values, strict=True))

    return made


def after_inference(outputs: Outputs) -> Outputs:
    """What the first call leaves behind for others must serve one that is differentiated."""

    def made() -> dict[str, Tensor]:
        with torch.inference_mode():
            outputs()
        return outputs()

    return made


@dataclass(frozen=True)
class Condition:
    """What a call is made under, forward and backward, or ``around`` what makes its outputs."""

    name: str
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    around: Callable[[Outputs], Outputs] = lambda outputs: outputs
    same_kernels: bool = True

    def __str__(self) -> str:
        return self.name


CONDITIONS = [
    Condition("default device", default_device),
    Condition("device context", lambda: torch.device("meta")),
    Condition("default float64", partial(default_dtype, torch.float64)),
    Condition("default bfloat16", partial(default_dtype, torch.bfloat16)),
    Condition("deterministic algorithms", deterministic_algorithms, same_kernels=False),
    Condition("anomaly mode", anomaly_mode),
    Condition("saved on the CPU", save_on_cpu),
    Condition("saved tensors repacked", repacked),
    Condition("checkpoint", around=partial(checkpointed, reentrant=False)),
    Condition("reentrant checkpoint", around=partial(checkpointed, reentrant=True)),
    Condition("after inference", around=after_inference),
]


# Takes seconds in the interpreter; to autograd it is a sampled call like the others.
IN_EIGHT_BITS = ESTIMATES[2:]
MAKES_TENSORS = ("default device", "default bfloat16", "deterministic algorithms")
DIFFERENTIATED = [call for call in CALLS if call.differentiated and call.implementation not in IN_EIGHT_BITS]
each_differentiated = pytest.mark.parametrize("call", DIFFERENTIATED, ids=str)


@pytest.mark.parametrize("condition", CONDITIONS, ids=str)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_numbers(call, condition):
    if call.implementation in IN_EIGHT_BITS and condition.name not in MAKES_TENSORS:
        pytest.skip("slow in the interpreter")
    theirs, inputs = expected(call), call.inputs()
    with condition.context():
        ours = inputs.results(condition.around)
    if condition.name == "reentrant checkpoint":
        # Outputs are of the pass that records nothing, which another strategy serves; gradients are of the other.
        ours, theirs = ({k: v for k, v in each.items() if k.startswith(GRADIENT)} for each in (ours, theirs))
    (assert_same_bits if condition.same_kernels else assert_near)(ours, theirs)


# --- autocast, and the precision of products --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_autocast(implementation, dtype):
    """Operands are rounded to its dtype, and nothing else is; also where it is on in the forward pass alone."""
    problem = replace(BUSY, reduction="sum", normalizer=None).problem()

    def under_autocast(*args, **options):
        with torch.autocast("cpu", dtype):
            return implementation.linear_cross_entropy(*args, **options)

    baseline = loss_baseline(problem, torch.autocast("cpu", dtype))
    baseline.check(loss_and_gradients(under_autocast, problem))
    with torch.autocast("cpu", dtype):
        baseline.check(loss_and_gradients(implementation.linear_cross_entropy, problem))


@contextlib.contextmanager
def float32_products(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("precision", ["high", "medium"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_float32_matmul_precision(implementation, dtype, precision):
    """A call is as near to exact as plain PyTorch with the same setting."""
    if implementation in TRITON and dtype == torch.float32:
        pytest.skip("the interpreter rounds operands as a GPU does, of which there is none to compare with")
    problem = replace(BUSY, dtype=dtype, reduction="sum", normalizer=None).problem()
    with float32_products(precision):
        ours = loss_and_gradients(implementation.linear_cross_entropy, problem)
        baseline = loss_baseline(problem)
    baseline.check(ours)


# --- several threads --------------------------------------------------------------------------------------------------

ROUNDS = 20


@pytest.mark.parametrize("shapes", ["same", "different"])
def test_threads(shapes):
    """Forward and backward in several threads at once. Triton's interpreter serves one thread at a time."""
    cases = [BUSY, *TOKENS, replace(BUSY, dtype=torch.bfloat16)]
    if shapes == "different":
        cases = [replace(case, leading=(5 + 4 * number,)) for number, case in enumerate(cases)]
    implementations = [
        Implementation(f"{backend}-{kind}", backend, sampled=kind != "exact", scan="fp8" if kind == "fp8" else "input")
        for backend in ("torch", "reference")
        for kind in ("exact", "sampled", "fp8")
    ]
    calls = [Call(implementation, case=case) for implementation in implementations for case in cases]
    theirs = [expected(call) for call in calls]
    failures: list[BaseException] = []
    everyone = threading.Barrier(4)

    def work(first: int) -> None:
        try:
            everyone.wait()
            for number in range(ROUNDS):
                at = (first + number) % len(calls)
                assert_near(calls[at].inputs().results(), theirs[at])
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(7 * number,)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


# --- backward passes --------------------------------------------------------------------------------------------------


@each_differentiated
def test_gradient_of_one_input(call):
    theirs = expected(call)
    for name in call.inputs().leaves:
        inputs = call.inputs()
        outputs = inputs.outputs()
        of = [outputs[name] for name in inputs.upstream]
        (found,) = torch.autograd.grad(of, inputs.leaves[name], list(inputs.upstream.values()))
        assert_same_bits({GRADIENT + name: found}, {GRADIENT + name: theirs[GRADIENT + name]})


@each_differentiated
def test_second_backward_pass(call):
    """With the graph retained it adds the same gradients once more; without it raises, as in PyTorch."""
    inputs, theirs = call.inputs(), expected(call)
    outputs = inputs.outputs()
    first = {name: value.clone() for name, value in inputs.gradients(outputs, retain_graph=True).items()}
    assert_same_bits(first, {name: value for name, value in theirs.items() if name.startswith(GRADIENT)})
    for leaf in inputs.leaves.values():
        leaf.grad = None
    assert_near(inputs.gradients(outputs), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        inputs.gradients(outputs)


@each_differentiated
def test_outputs_changed_in_place(call):
    """What is written to an output goes into the graph, and its gradient is that of the output before."""
    theirs, inputs = expected(call), call.inputs()
    outputs = inputs.outputs()
    for name in outputs:
        outputs[name] = outputs[name].mul_(2) if name in inputs.upstream else outputs[name].zero_()
    ours = inputs.gradients(outputs)
    assert_near(ours, {name: 2 * theirs[name] for name in ours})


@pytest.mark.parametrize("function", ["loss", "statistics"])
@pytest.mark.parametrize("implementation", [STORED, CHUNKED, WINDOWED, SAMPLED], ids=str)
def test_graph_is_freed_with_its_outputs(implementation, function):
    """By counting references: a cycle would hold memory until Python looks for cycles."""
    if function == "statistics" and not implementation.any_upstream:
        pytest.skip("this strategy needs a reduced loss")

    def tensors() -> int:
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    inputs = Call(implementation, function).inputs()
    inputs.gradients(inputs.outputs())
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        outputs = inputs.outputs()
        inputs.gradients(outputs, retain_graph=True)
        assert tensors() > before
        del outputs
        assert tensors() == before
    finally:
        gc.enable()


# --- tensors that are written to --------------------------------------------------------------------------------------

WRITTEN = ("input", "linear_weight", "linear_bias", "target", "weight", "token_weight", "normalizer", "low", "appended")


def in_buffers(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    """The inputs as parts of larger buffers, as a loader has them, and what is to be written there."""
    buffers, parts = {}, {}
    tensors = {
        "input": inputs.problem.input,
        "linear_weight": inputs.problem.linear_weight,
        "target": inputs.problem.target,
    }
    tensors |= {name: value for name, value in inputs.problem.options.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        whole = torch.stack((tensor.detach(), tensor.detach()))
        buffers[name] = whole
        parts[name] = whole[1].requires_grad_(tensor.requires_grad)
    given = {name: parts.pop(name) for name in ("input", "linear_weight", "target")}
    problem = replace(inputs.problem, **given, options={**inputs.problem.options, **parts})
    return replace(inputs, problem=problem), buffers


def write(buffer: Tensor) -> None:
    """Other values of the same kind, in place."""
    with torch.no_grad():
        if buffer.is_floating_point():
            buffer.mul_(-2).add_(1)
        else:
            buffer.copy_(buffer.flip(-1))


def checked(gradients: Callable[[], Results], theirs: Results) -> None:
    """Those of the forward pass's values, or PyTorch's error."""
    ours, refusal = {}, ""
    try:
        ours = gradients()
    except RuntimeError as error:
        refusal = str(error)
    assert ours or "modified by an inplace operation" in refusal
    assert_same_bits(ours, {name: theirs[name] for name in ours})


@pytest.mark.parametrize("name", WRITTEN)
@each_differentiated
def test_written_before_backward(call, name):
    theirs = expected(call)
    inputs, buffers = in_buffers(call.inputs())
    if name not in buffers:
        pytest.skip("has no such argument")
    outputs = inputs.outputs()
    write(buffers[name])
    checked(lambda: inputs.gradients(outputs), theirs)


# --- inference mode ---------------------------------------------------------------------------------------------------


def plainly(inputs: Inputs) -> Tensor:
    problem = inputs.problem
    return F.cross_entropy(F.linear(problem.input, problem.linear_weight), problem.target)


@pytest.mark.parametrize("name", ["input", "linear_weight"])
@pytest.mark.parametrize("implementation", [*TORCH, *TRITON[:1]], ids=str)
def test_tensor_of_inference_mode_is_not_differentiated(implementation, name):
    """It cannot be saved, as PyTorch says in the same words; where no gradient is wanted it serves."""
    inputs = Call(implementation, case=BARE).inputs()
    with torch.inference_mode():
        made = getattr(inputs.problem, name).detach().clone()
    other = {"input": "linear_weight", "linear_weight": "input"}[name]
    inputs = replace(inputs, problem=replace(inputs.problem, **{name: made}))
    assert getattr(inputs.problem, other).requires_grad
    for function in (plainly, Inputs.outputs):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            function(inputs)
    with torch.no_grad():
        torch.testing.assert_close(inputs.outputs()["loss"], plainly(inputs))


@pytest.mark.parametrize(
    "call", [Call(implementation, case=case) for implementation in TORCH for case in (BARE, BUSY)], ids=str
)
def test_other_tensors_of_inference_mode(call):
    """Targets and weights of tokens, such as a model that generates leaves, are read as they are."""
    inputs = call.inputs()
    with torch.inference_mode():
        target = inputs.problem.target.clone()
        others = {
            n: inputs.problem.options[n].clone() for n in ("weight", "token_weight") if n in inputs.problem.options
        }
    inputs = replace(inputs, problem=replace(inputs.problem, target=target).with_options(**others))
    assert_same_bits(inputs.results(), expected(call))


# --- compiled calls ---------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    Call(Implementation("torch", "torch"), case=BARE),
    Call(Implementation("torch", "torch"), "statistics"),
    Call(Implementation("torch-sampled", "torch", sampled=True), case=TOKENS[0]),
]
ONCE_COMPILED = [
    condition
    for condition in CONDITIONS
    if condition.name in ("default device", "default float64", "deterministic algorithms", "after inference")
]


def compiled_outputs(inputs: Inputs, backend: str = "aot_eager") -> Outputs:
    """As ``Inputs.outputs``, in one graph. A graph takes no generator: everything is kept, so it needs none."""
    call, problem = inputs.call, inputs.problem
    options = {"gradient": call.implementation.gradient, "backend": call.implementation.backend}

    def outputs(problem_input: Tensor, linear_weight: Tensor, target: Tensor, others: dict) -> dict[str, Tensor]:
        if call.function == "statistics":
            found = logitless.token_statistics(
                problem_input, linear_weight, target, outputs=call.names, **others, **options
            )
            return {name: getattr(found, name) for name in call.names}
        return {"loss": logitless.linear_cross_entropy(problem_input, linear_weight, target, **others, **options)}

    whole = torch.compile(outputs, fullgraph=True, backend=backend)
    return lambda: whole(problem.input, problem.linear_weight, problem.target, problem.options)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("condition", ONCE_COMPILED, ids=str)
@pytest.mark.parametrize("call", COMPILED, ids=str)
def test_compiled(call, condition):
    """Traced and run under the condition."""
    first, second = call.inputs(), call.inputs()
    outputs = compiled_outputs(first)()
    theirs = {**{name: value.detach() for name, value in outputs.items()}, **first.gradients(outputs)}
    torch._dynamo.reset()
    with condition.context():
        outputs = condition.around(compiled_outputs(second))()
        ours = {**{name: value.detach() for name, value in outputs.items()}, **second.gradients(outputs)}
    assert_near(ours, theirs)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", ["input", "linear_weight", "target"])
@pytest.mark.parametrize("call", COMPILED, ids=str)
def test_written_before_backward_of_a_graph(call, name, backend):
    plain = call.inputs()
    theirs = plain.gradients(compiled_outputs(plain, backend)())
    inputs, buffers = in_buffers(call.inputs())
    outputs = compiled_outputs(inputs, backend)()
    write(buffers[name])
    checked(lambda: inputs.gradients(outputs), theirs)


# --- the other functions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", CONDITIONS[:5], ids=str)
@pytest.mark.parametrize("scan", ["input", "fp8"])
def test_sampling_report(condition, scan):
    problem = replace(BUSY, softcap=5.0).problem()
    options = {name: value for name, value in problem.options.items() if name not in ("reduction", "normalizer")}
    reports = []
    for context in (contextlib.nullcontext, condition.context):
        seeded = torch.Generator("cpu").manual_seed(3)
        gradient = logitless.Sampled(1 / 4, scan=scan, generator=seeded)
        with context():
            reports.append(
                replace(problem, options=options).call(logitless.sampling_report, gradient=gradient, draws=2)
            )
    assert str(reports[0]) == str(reports[1])


@pytest.mark.parametrize("condition", CONDITIONS[:5], ids=str)
def test_counting_and_checking(condition):
    problem = BUSY.problem()
    weight = problem.options["weight"]
    counts = []
    for context in (contextlib.nullcontext, condition.context):
        with context():
            logitless.check_targets(problem.target, BUSY.vocabulary)
            with pytest.raises(ValueError, match="at token 0"):
                logitless.check_targets(problem.target, 1)
            counts.append(
                {
                    "tokens": logitless.count_tokens(problem.target),
                    "weights": logitless.count_tokens(problem.target, weight=weight),
                }
            )
    assert_same_bits(*counts)


@pytest.mark.parametrize("condition", CONDITIONS[:5], ids=str)
def test_module(condition):
    theirs, inputs = expected(Call(Implementation("auto", "auto"), case=BARE)), Call(TORCH[0], case=BARE).inputs()
    with condition.context():
        module = logitless.LinearCrossEntropyLoss()
        outputs = {"loss": inputs.problem.call(lambda *tensors, **_: module(*tensors))}
        ours = {"loss": outputs["loss"].detach(), **inputs.gradients(outputs)}
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("condition", CONDITIONS[:5], ids=str)
def test_generator_of_a_sample(condition):
    """Without one, PyTorch's of the tensors' device is drawn from, whichever device is the default."""
    draws = []
    for context in (contextlib.nullcontext, condition.context):
        inputs = Call(TORCH[0], case=BARE).inputs()
        torch.manual_seed(3)
        with context():
            loss = inputs.problem.call(logitless.linear_cross_entropy, gradient=logitless.Sampled(1 / 2))
            draws.append(inputs.gradients({"loss": loss}))
    assert_near(*draws)


@pytest.mark.parametrize("condition", CONDITIONS[:4], ids=str)
def test_inputs_of_the_benchmark(condition):
    case = logitless.bench.cases.Case("tiny", 7, 8, 30, False, "")
    found = []
    for context in (contextlib.nullcontext, condition.context):
        with context():
            inputs = logitless.bench.cases.make_inputs(case, torch.float32, torch.device("cpu"), 1, None)
            wider, _ = logitless.bench.cases.widen(inputs.hidden, inputs.weight, 16)
            found.append({**vars(inputs), "wider": wider})
    assert_same_bits(*found)


@pytest.mark.parametrize("condition", CONDITIONS[:2], ids=str)
def test_model_of_the_demo(condition):
    """The same weights whatever the device."""
    found = []
    for context in (contextlib.nullcontext, condition.context):
        with context():
            found.append(dict(Decoder(ModelConfig(8, 1, 2), vocabulary=30, sequence=5, seed=1).state_dict()))
    assert_same_bits(*found)
