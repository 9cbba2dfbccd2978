"""Calls on the GPU under the settings of training scripts: the numbers are those without them.

``tests/test_conditions.py`` is the same without a GPU. Results of what a process does first, or must be asked for
before it begins, come from processes of their own: ``python tests/gpu/test_conditions.py inference`` is one.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import logitless
import plain
from implementations import KEEP_ALL
from logitless.options import ESTIMATED_OUTPUTS, FLOAT_OUTPUTS, TOKEN_OUTPUTS
from on_gpu import (
    ANY_UPSTREAM,
    DEVICE,
    NEEDS_GPU,
    STRATEGIES,
    Inputs,
    busy_options,
    captured,
    check,
    differentiated,
    each_any_upstream,
    float32_products,
    forced,
    make_inputs,
    take_data_of,
)
from tolerance import FACTOR, floor

pytestmark = NEEDS_GPU

Results = dict[str, Tensor]
SIZE = (600, 256, 4096)
EIGHT_BITS = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

# --- calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """A function, what serves it, and its options."""

    name: str
    strategy: str | None = None
    function: str = "loss"  # or "statistics"
    dtype: torch.dtype = torch.bfloat16
    backend: str = "triton"
    threshold: float | None = None
    scan: logitless.options.Scan = "input"
    reduction: str = "mean"
    busy: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def outputs(self) -> tuple[str, ...]:
        return ESTIMATED_OUTPUTS if self.scan == "fp8" else TOKEN_OUTPUTS

    @property
    def same_bits(self) -> bool:
        """Whether two calls give the same: blocks that are kept are added to hidden gradients in any order."""
        return self.threshold is None

    def inputs(self, seed: int = 0) -> Inputs:
        return make_inputs(*SIZE, self.dtype, bias=self.busy, seed=seed)

    def options(self, inputs: Inputs) -> dict[str, object]:
        """Made before a condition begins."""
        options: dict[str, object] = {"linear_bias": inputs.bias, "backend": self.backend}
        if self.function == "statistics":
            return {**options, "outputs": self.outputs}
        return {**options, "reduction": self.reduction, **(busy_options(inputs) if self.busy else {})}

    def values(self, inputs: Inputs, options: dict[str, object]) -> Results:
        """Outputs by name."""
        arguments = (inputs.hidden, inputs.weight, inputs.target)
        if self.threshold is not None:  # a seed that means the same on every device
            seeded = torch.Generator("cpu").manual_seed(3)
            options = {**options, "gradient": logitless.Sampled(self.threshold, self.scan, seeded)}
        demanded = self.strategy is not None and torch.is_grad_enabled()
        with forced(self.strategy) if demanded else contextlib.nullcontext():
            if self.function == "loss":
                return {"loss": logitless.linear_cross_entropy(*arguments, **options)}
            found = logitless.token_statistics(*arguments, **options)
            return {name: getattr(found, name) for name in self.outputs}

    def results(
        self, inputs: Inputs, options: dict[str, object], around: Callable[[Callable], Callable] = lambda make: make
    ) -> Results:
        """Outputs, and gradients of all that have one; ``around`` changes what makes the outputs."""
        return with_gradients(around(lambda: self.values(inputs, options))(), inputs)


def upstream_of(value: Tensor) -> Tensor:
    """Exact in every dtype, and not the same for all tokens."""
    if value.ndim == 0:
        return torch.full_like(value, 0.25)
    return (torch.arange(len(value), device=value.device) % 9 - 4).to(value.dtype) / 4


def upstream_for(values: Results) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs that have a gradient, and what it is to be of."""
    floats = [value for value in values.values() if value.is_floating_point()]
    return floats, [upstream_of(value.detach()) for value in floats]


def gradients(values: Results, inputs: Inputs) -> Results:
    """By leaf."""
    found = torch.autograd.grad(upstream_for(values)[0], list(inputs.leaves.values()), upstream_for(values)[1])
    return {f"gradient of {name}": gradient for name, gradient in zip(inputs.leaves, found, strict=True)}


def with_gradients(values: Results, inputs: Inputs) -> Results:
    found = gradients(values, inputs)
    return {**{name: value.detach() for name, value in values.items()}, **found}


EXACT = [
    *(Call(f"busy-{name}", name, busy=True) for name in ("prepared", "chunked", "aliased", "kept")),
    Call("busy-float32", "kept", dtype=torch.float32, busy=True),
    *(Call(f"tokens-{name}", name, reduction="none") for name in ("stored", "windowed")),
    *(Call(f"statistics-{name}", name, "statistics") for name in ("stored", "aliased")),
    Call("torch", backend="torch", busy=True),
    Call("torch-tokens", backend="torch", reduction="none"),
]
DRAWN = [
    Call("sampled", threshold=1 / 16, busy=True),
    Call("sampled-tokens", threshold=1 / 16, reduction="none"),
    Call("sampled-statistics", function="statistics", threshold=1 / 16),
    *([Call("estimated", threshold=1 / 16, scan="fp8")] if EIGHT_BITS else []),
]
# PyTorch has no running sum of the same bits each time for its backend's sample.
TORCH_SAMPLED = Call("torch-sampled", backend="torch", threshold=1 / 16)
CALLS = [*EXACT, *DRAWN, TORCH_SAMPLED]
each_call = pytest.mark.parametrize("call", CALLS, ids=str)


@lru_cache
def expected(call: Call) -> Results:
    """What it gives under no condition."""
    inputs = call.inputs()
    return call.results(inputs, call.options(inputs))


def assert_near(ours: Results, theirs: Results) -> None:
    """Up to the order of sums: either side may be off by what no implementation stays under."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        exact, accumulated = theirs[name].double(), theirs[name].float()
        assert (value.double() - exact).norm() <= 2 * floor(exact, accumulated, value), name


def assert_same(call: Call, ours: Results, theirs: Results) -> None:
    """The same bits, where two calls give the same."""
    if not call.same_bits:
        assert_near(ours, theirs)
        return
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


# --- conditions -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def anomaly_mode() -> Iterator[None]:
    with pytest.warns(UserWarning, match="Anomaly Detection"):
        mode = torch.autograd.detect_anomaly()
    with mode:
        yield


def checkpointed(make: Callable[[], Results], *, reentrant: bool) -> Callable[[], Results]:
    """Outputs made once without what the backward pass needs, and again for it."""

    def made() -> Results:
        names: list[str] = []

        def tensors(_: Tensor) -> tuple[Tensor, ...]:
            found = make()
            names[:] = found
            return tuple(found.values())

        differentiable = torch.ones((), device=DEVICE, requires_grad=True)
        values = checkpoint(tensors, differentiable, use_reentrant=reentrant)
        return dict(zip(names, values, strict=True))

    return made


CONTEXTS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "default device cuda": partial(default_device, "cuda"),
    "default device meta": partial(default_device, "meta"),
    "device context": lambda: torch.device("cuda"),
    "default float64": partial(default_dtype, torch.float64),
    "anomaly mode": anomaly_mode,
    "saved on the CPU": torch.autograd.graph.save_on_cpu,
}


@pytest.mark.parametrize("condition", CONTEXTS)
@each_call
def test_same_numbers(call, condition):
    theirs, inputs = expected(call), call.inputs()
    options = call.options(inputs)
    with CONTEXTS[condition]():
        ours = call.results(inputs, options)
    assert_same(call, ours, theirs)


@each_call
def test_checkpoint(call):
    theirs, inputs = expected(call), call.inputs()
    ours = call.results(inputs, call.options(inputs), partial(checkpointed, reentrant=False))
    assert_same(call, ours, theirs)


@pytest.mark.parametrize("call", EXACT, ids=str)
def test_reentrant_checkpoint(call):
    """Outputs are of the pass that records nothing, which another strategy serves; gradients are of the other."""
    theirs, inputs = expected(call), call.inputs()
    options = call.options(inputs)
    values = checkpointed(lambda: call.values(inputs, options), reentrant=True)()
    torch.autograd.backward(*upstream_for(values))
    for name, leaf in inputs.leaves.items():
        assert torch.equal(leaf.grad, theirs[f"gradient of {name}"]), name


def test_tensors_of_the_host_while_the_gpu_is_the_default_device():
    tensors = [tensor.cpu().requires_grad_() for tensor in (torch.randn(60, 16), torch.randn(500, 16))]
    target = torch.randint(500, (60,))
    target[3:9] = -100

    def results() -> tuple[Tensor, ...]:
        seeded = torch.Generator("cpu").manual_seed(3)
        return torch.autograd.grad(
            logitless.linear_cross_entropy(*tensors, target)
            + logitless.linear_cross_entropy(*tensors, target, gradient=logitless.Sampled(generator=seeded)),
            tensors,
        )

    theirs = results()
    with default_device("cuda"):
        ours = results()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


# --- devices and streams ----------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_call
def test_other_current_device(call):
    """Kernels start where the tensors are, and the current device is the same afterwards."""
    with torch.cuda.device(1):
        first, inputs = call.inputs(), call.inputs()
        options = call.options(inputs)
        theirs = call.results(first, options)
    assert inputs.hidden.device.index == 1
    assert torch.cuda.current_device() == 0
    ours = call.results(inputs, options)
    assert torch.cuda.current_device() == 0
    assert_same(call, ours, theirs)


@contextlib.contextmanager
def side_stream() -> Iterator[None]:
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        yield
    torch.cuda.current_stream().wait_stream(aside)


@pytest.mark.parametrize("backward_aside", [True, False])
@each_call
def test_side_stream(call, backward_aside):
    """On which the inputs come late: what ran on another would see those before."""
    theirs, inputs, other = expected(call), call.inputs(seed=1), call.inputs()
    options = call.options(other)
    if inputs.bias is not None:
        options["linear_bias"] = inputs.bias
    torch.cuda.synchronize()
    with side_stream():
        torch.cuda._sleep(20_000_000)  # some 10 ms
        take_data_of(inputs, other)
        if inputs.bias is not None:
            with torch.no_grad():
                inputs.bias.copy_(other.bias)
        values = call.values(inputs, options)
        if backward_aside:
            found = gradients(values, inputs)
    if not backward_aside:
        found = gradients(values, inputs)
    torch.cuda.synchronize()
    assert_same(call, {**{name: value.detach() for name, value in values.items()}, **found}, theirs)


@pytest.mark.parametrize("call", [call for call in EXACT if call.backend == "triton"], ids=str)
def test_graph(call):
    """Replayed with other data it gives the numbers of a call on these."""
    inputs = call.inputs(seed=1)
    options = call.options(inputs)

    graph, ours = captured(lambda: call.results(inputs, options))
    other = call.inputs()
    take_data_of(inputs, other)
    if inputs.bias is not None:
        with torch.no_grad():
            inputs.bias.copy_(other.bias)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(call, ours, expected(call))


# --- several threads --------------------------------------------------------------------------------------------------

THREADS, ROUNDS = 4, 12


@pytest.mark.parametrize("streams", ["one stream", "a stream each"])
def test_threads(streams):
    """Forward and backward in several threads at once, none with a strategy demanded, which is for all threads."""
    calls = [replace(call, strategy=None) for call in CALLS]
    theirs = [expected(call) for call in calls]
    inputs = [[call.inputs() for call in calls] for _ in range(THREADS)]
    options = [[call.options(own) for call, own in zip(calls, mine, strict=True)] for mine in inputs]
    torch.cuda.synchronize()
    failures: list[BaseException] = []
    everyone = threading.Barrier(THREADS)

    def work(number: int) -> None:
        try:
            everyone.wait()
            with side_stream() if streams == "a stream each" else contextlib.nullcontext():
                for turn in range(ROUNDS):
                    at = (3 * number + turn) % len(calls)
                    ours = calls[at].results(inputs[number][at], options[number][at])
                    torch.cuda.current_stream().synchronize()
                    assert_same(calls[at], ours, theirs[at])
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


# --- autocast ---------------------------------------------------------------------------------------------------------


@each_any_upstream
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_autocast(strategy, dtype, autocast):
    """Products are of operands in its dtype, whatever the tensors'; gradients have the tensors'."""
    inputs = make_inputs(*SIZE, dtype)
    upstream = upstream_of(torch.zeros(SIZE[0], device=DEVICE))
    with forced(strategy), torch.autocast(DEVICE, autocast):
        loss = inputs.loss(backend="triton", reduction="none")
    check(
        differentiated(loss, inputs, upstream),
        inputs,
        upstream,
        lambda: torch.autocast(DEVICE, autocast),
        reduction="none",
    )


# --- the precision of fp32 products -----------------------------------------------------------------------------------

each_precision = pytest.mark.parametrize("precision", ["high", "medium"])
each_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@each_precision
@each_dtype
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("strategy", [*STRATEGIES, "sampled"])
def test_precision_of_the_loss(strategy, reduction, dtype, precision):
    """As near to exact as plain PyTorch with the setting, which says nothing of 16-bit operands."""
    if strategy in ("prepared", "chunked") and (reduction == "none" or dtype == torch.float16):
        pytest.skip("this strategy needs a reduced loss, and products that are not in fp16")
    inputs = make_inputs(*SIZE, dtype)
    upstream = upstream_of(torch.zeros(SIZE[0] if reduction == "none" else (), device=DEVICE))
    gradient = logitless.Sampled(KEEP_ALL) if strategy == "sampled" else "exact"
    with float32_products(precision):
        with forced(strategy) if strategy in STRATEGIES else contextlib.nullcontext():
            ours = inputs.results(upstream, backend="triton", gradient=gradient, reduction=reduction)
        check(ours, inputs, upstream, reduction=reduction)


@pytest.mark.skipif(not EIGHT_BITS, reason="no tensor cores for e4m3")
@each_precision
@each_dtype
def test_precision_of_the_scan_in_eight_bits(dtype, precision):
    """Where everything is kept every block is summed in full."""
    inputs = make_inputs(*SIZE, dtype)
    with float32_products(precision):
        ours = inputs.results(0.25, backend="triton", gradient=logitless.Sampled(KEEP_ALL, scan="fp8"))
        check(ours, inputs, 0.25)


def statistics_and_gradients(function: Callable[..., Results], inputs: Inputs, **options) -> Results:
    return with_gradients(function(inputs.hidden, inputs.weight, inputs.target, **options), inputs)


@each_precision
@each_dtype
@pytest.mark.parametrize("strategy", [*ANY_UPSTREAM, "sampled"])
def test_precision_of_statistics(strategy, dtype, precision):
    inputs = make_inputs(*SIZE, dtype)
    gradient = logitless.Sampled(KEEP_ALL) if strategy == "sampled" else "exact"

    def statistics(*tensors: Tensor) -> Results:
        found = logitless.token_statistics(*tensors, outputs=TOKEN_OUTPUTS, backend="triton", gradient=gradient)
        assert found.prediction is not None
        return {name: getattr(found, name) for name in FLOAT_OUTPUTS}

    with float32_products(precision):
        with forced(strategy) if strategy in STRATEGIES else contextlib.nullcontext():
            ours = statistics_and_gradients(statistics, inputs)
        theirs = statistics_and_gradients(plain.token_statistics, inputs)
    exact = statistics_and_gradients(plain.token_statistics, inputs.map(Tensor.double))
    accumulated = statistics_and_gradients(plain.token_statistics, inputs.map(Tensor.float), form="statistics")
    for name, value in ours.items():
        allowed = FACTOR * (theirs[name].double() - exact[name]).norm() + floor(exact[name], accumulated[name], value)
        assert (value.double() - exact[name]).norm() <= allowed, name


# --- processes of their own -------------------------------------------------------------------------------------------


def under_deterministic_algorithms() -> None:
    """There is an algorithm for everything, and nothing is read that was not written."""
    for call in CALLS:
        if call == TORCH_SAMPLED:
            continue
        theirs, inputs = expected(call), call.inputs()
        options = call.options(inputs)
        torch.use_deterministic_algorithms(True)
        assert torch.empty(1, device=DEVICE).isnan()
        ours, again = call.results(inputs, options), call.results(inputs, options)
        torch.use_deterministic_algorithms(False)
        assert_near(ours, theirs)
        assert_same(replace(call, threshold=None), again, ours)
        print(call)


def after_inference() -> None:
    """What the first call of a process leaves behind for others must serve one that is differentiated."""
    for call in CALLS:
        inputs = call.inputs()
        options = call.options(inputs)
        with torch.inference_mode():
            call.values(inputs, options)
        ours = call.results(inputs, options)
        assert_same(call, ours, expected(call))
        print(call)


ALONE = {"deterministic": under_deterministic_algorithms, "inference": after_inference}


@pytest.mark.parametrize("condition", ALONE)
def test_in_a_process_of_its_own(condition):
    tests = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without which its products are not deterministic
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, __file__, condition], env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert run.returncode == 0, run.stdout[-1000:] + run.stderr[-3000:]


if __name__ == "__main__":
    ALONE[sys.argv[1]]()
