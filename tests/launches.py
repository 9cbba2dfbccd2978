"""The variants of kernels that calls ask Triton for, on a GPU that need not be there: recorded, and none is run.

A variant is what Triton compiles: a kernel, the types of its arguments, integers equal to 1, and its constants. They
are not listed here: the public functions are called with every combination of dtypes, precision, options and
strategies, and what they launch is written down. Needs a process without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

import logitless
from implementations import KERNELS, TRITON_ESTIMATED, TRITON_LOSS_ONLY
from logitless.backends import triton as package
from logitless.backends.triton import memory, tiles
from logitless.calls import Tokens
from logitless.options import TOKEN_OUTPUTS
from logitless.schedules import force_strategy
from problems import loss_cases, statistics_cases
from tolerance import loss_and_gradients

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Capability = tuple[int, int]
Dtypes = tuple[torch.dtype, torch.dtype, torch.dtype | None]
Sizes = tuple[int, int, int]
# Of Ampere, Ada, whose tensor cores know eight bits, and Hopper.
CAPABILITIES: tuple[Capability, ...] = ((8, 0), (8, 9), (9, 0))


@dataclass(frozen=True)
class Variant:
    """What Triton compiles, as values that hash, compare and travel between processes.

    Attributes:
        module: where the kernel is.
        kernel: its name.
        types: by parameter its type, ``constexpr`` for constants.
        constants: by parameter its value.
        options: what a launch gives besides: warps, stages.
        aligned: places of the parameters that are multiples of 16.
    """

    module: str
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...] = field(compare=False)
    aligned: tuple[int, ...] = field(compare=False)

    @property
    def form(self) -> tuple:
        """The variant but for its sizes: dtypes, flags and names. Variants of one form differ in numbers alone."""
        constants = dict(self.constants)
        types = [
            (name, kind.partition("[")[0])
            for name, kind in self.types
            if kind not in ("constexpr", "i32", "i64", "fp32")
        ]
        flags = [(name, value) for name, value in constants.items() if isinstance(value, bool | str)]
        return (self.kernel, *types, *flags)

    def __str__(self) -> str:
        types = {name: kind for name, kind in self.types if kind != "constexpr"}
        return f"{self.kernel}({', '.join(f'{name}: {kind}' for name, kind in types.items())}; {dict(self.constants)})"


class Recorder:
    """Takes the place of launches on a GPU of some compute capability."""

    def __init__(self, capability: Capability) -> None:
        self.variants: dict[Variant, None] = {}
        self._backend = make_backend(GPUTarget("cuda", 10 * capability[0] + capability[1], 32))
        self._seen: set[tuple] = set()

    @functools.cache  # noqa: B019 - as long as the recorder
    def _binder(self, kernel: JITFunction) -> Callable:
        return create_function_from_signature(kernel.signature, kernel.params, self._backend)

    def launch(
        self, kernel: JITFunction, *args: object, grid: tuple[int, ...], warmup: bool, **options: object
    ) -> None:
        """What ``JITFunction.run`` does up to its look for a compiled kernel."""
        assert all(isinstance(size, int) and size > 0 for size in grid), (kernel, grid)
        assert not warmup
        bound, specialization, _ = self._binder(kernel)(*args, **options)
        constants = [
            (name, bound[name]) for name, (kind, _) in zip(bound, specialization, strict=True) if kind == "constexpr"
        ]
        names = {parameter.name for parameter in kernel.params}
        variant = Variant(
            module=kernel.fn.__module__,
            kernel=kernel.fn.__name__,
            types=tuple((name, kind) for name, (kind, _) in zip(bound, specialization, strict=True)),
            constants=tuple(constants),
            options=tuple((name, value) for name, value in options.items() if name not in names),
            aligned=tuple(place for place, (_, how) in enumerate(specialization) if how == "D"),
        )
        self.variants.setdefault(variant)


@contextlib.contextmanager
def recording(capability: Capability) -> Iterator[Recorder]:
    """Within, calls on CPU tensors do what they would do on such a GPU, but for running kernels.

    Memory that kernels would write is zero, since the host takes some of it for indices.
    """
    recorder, unsupported, tokens_of = Recorder(capability), package.unsupported, Tokens.of

    def on_an_accelerator(*args: object) -> Tokens:
        """All rows stay, with a mask, as where the host may not ask which of them count."""
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            return tokens_of(*args)

    replaced = [
        (torch.cuda, "get_device_capability", lambda index: capability),
        (torch.cuda, "get_device_properties", lambda index: SimpleNamespace(multi_processor_count=108)),
        (torch, "empty", torch.zeros),
        (torch, "empty_like", torch.zeros_like),
        (tiles, "device_index", lambda device: 0),
        (memory, "index_of", lambda shape: 0),
        (package, "index_of", lambda shape: 0),
        (package, "unsupported", lambda shape: unsupported(replace(shape, device_type="cuda"))),
        (Tokens, "of", on_an_accelerator),
        (JITFunction, "run", lambda kernel, *args, **options: recorder.launch(kernel, *args, **options)),
    ]
    with contextlib.ExitStack() as stack:
        for cached in (tiles.architecture, tiles.has_fp8_mma, tiles.num_sms, tiles.tile):
            cached.cache_clear()
            stack.callback(cached.cache_clear)
        for owner, name, replacement in replaced:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield recorder


# --- every call -------------------------------------------------------------------------------------------------------

# Dtypes of hidden states and weight, and autocast's: whatever operands are multiplied in a dtype kernels know.
PURE = ((BF16, BF16, None), (FP16, FP16, None), (FP32, FP32, None))
MIXED = (
    *((of_hidden, FP32, None) for of_hidden in (BF16, FP16)),
    *((FP32, of_weight, None) for of_weight in (BF16, FP16)),
    (BF16, FP16, None),
    (FP16, BF16, None),
    *((of_hidden, FP32, autocast) for of_hidden in (FP32, BF16, FP16) for autocast in (BF16, FP16)),
)
EXACT: dict[str, dict] = {
    "prepared": {"strategy": "stored", "prepared": True},
    "chunked": {"strategy": "chunked", "rows": 16},
    "stored": {"strategy": "stored"},
    "windowed": {"strategy": "windowed", "window": 256, "aliased": 0},
    "aliased": {"strategy": "windowed", "window": 256},
    "kept": {"strategy": "windowed", "window": 256, "aliased": 0, "kept": 1},
    "loss_only": {"strategy": "loss_only", "rows": 16},
}
SCALAR = ("prepared", "chunked")
SAMPLED = ("input", "fp8")
# Tokens, hidden size, vocabulary: several windows and rows of tiles; then numbers that are 1, which Triton takes for
# constants; and rows that are not read at once.
SIZES = (40, 64, 1100)
EDGES = ((1, 8, 1), (40, 8, 1), (1, 8, 1100))
WIDE = (2, 8200, 130)


@dataclass(frozen=True)
class Call:
    """One call of a public function, and its backward pass."""

    dtypes: Dtypes
    strategy: str
    sizes: Sizes = SIZES
    softcap: bool = False
    smoothing: str | None = None  # or "uniform", "vector"
    z_loss: bool = False
    bias: torch.dtype | None = None
    wanted: str = "hwb"  # gradients
    main_grad: bool = False
    outputs: tuple[str, ...] | None = None  # of token_statistics; None for the loss
    deterministic: bool = False
    precision: str = "highest"  # of fp32 products, as torch.set_float32_matmul_precision takes it

    def make(self) -> None:
        """Raises ``ValueError`` where the library refuses."""
        tokens, hidden, vocabulary = self.sizes
        of_hidden, of_weight, autocast = self.dtypes
        x = torch.zeros(tokens, hidden, dtype=of_hidden, requires_grad="h" in self.wanted)
        weight = torch.zeros(vocabulary, hidden, dtype=of_weight, requires_grad="w" in self.wanted)
        target, options = torch.zeros(tokens, dtype=torch.int64), {"softcap": 5.0 if self.softcap else None}
        if self.bias is not None:
            options["linear_bias"] = torch.zeros(vocabulary, dtype=self.bias, requires_grad="b" in self.wanted)
        if self.main_grad:
            options["main_grad"] = torch.zeros(vocabulary, hidden)
        if self.strategy in SAMPLED:
            options["gradient"] = logitless.Sampled(scan=self.strategy)
        with contextlib.ExitStack() as stack:
            torch.set_float32_matmul_precision(self.precision)
            stack.callback(torch.set_float32_matmul_precision, "highest")
            if autocast is not None:
                stack.enter_context(torch.autocast("cpu", autocast))
            if self.strategy in EXACT:
                stack.enter_context(force_strategy(**EXACT[self.strategy]))
            if self.deterministic:
                torch.use_deterministic_algorithms(True)
                stack.callback(torch.use_deterministic_algorithms, False)
            results = [result for result in self._results(x, weight, target, options) if result.requires_grad]
            torch.autograd.backward(results, [torch.ones_like(result) for result in results])

    def _results(
        self, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, options: dict
    ) -> list[torch.Tensor]:
        with torch.set_grad_enabled(self.strategy != "loss_only"):
            if self.outputs is not None:
                given = logitless.token_statistics(x, weight, target, outputs=self.outputs, backend="triton", **options)
                return [getattr(given, name) for name in self.outputs]
            loss = logitless.linear_cross_entropy(
                x,
                weight,
                target,
                weight=torch.ones(weight.shape[0]) if self.smoothing == "vector" else None,
                label_smoothing=0.125 if self.smoothing else 0.0,
                z_loss=0.125 if self.z_loss else 0.0,
                reduction="mean" if self.strategy in SCALAR else "none",
                backend="triton",
                **options,
            )
            return [loss]


def losses(dtypes: Dtypes, sizes: Sizes = SIZES, strategies: tuple[str, ...] = (*EXACT, *SAMPLED)) -> Iterator[Call]:
    """Calls of ``linear_cross_entropy`` with every combination of options that a kernel could tell apart."""
    for strategy in strategies:
        for softcap, smoothing, (bias, wanted), main_grad, z_loss, deterministic in itertools.product(
            (False, True),
            (None, "uniform", "vector"),
            [
                (None, "hw"),
                (None, "h"),
                (None, "w"),
                *itertools.product((FP32, BF16, FP16), ("hwb", "hw", "h", "w", "b")),
            ],
            (False, True),
            (False, True) if strategy in SCALAR else (False,),
            (False, True) if strategy in SAMPLED else (False,),
        ):
            if main_grad and "w" not in wanted:
                continue
            yield Call(
                dtypes, strategy, sizes, softcap, smoothing, z_loss, bias, wanted, main_grad, None, deterministic
            )


def statistics(dtypes: Dtypes, sizes: Sizes = SIZES) -> Iterator[Call]:
    """Calls of ``token_statistics`` likewise."""
    others = ("entropy", "prediction", "target_rank")
    for strategy in ("stored", "windowed", "aliased", "kept", "loss_only", "input"):
        for softcap, bias, chosen in itertools.product(
            (False, True), (None, FP32, BF16, FP16), itertools.product((False, True), repeat=len(others))
        ):
            outputs = ("nll", *itertools.compress(others, chosen))
            yield Call(dtypes, strategy, sizes, softcap, bias=bias, outputs=outputs)


def every_call() -> Iterator[Call]:
    """What says which kernels are launched, in every combination.

    But for two: where operands are converted, a cap is always there; and sizes are 1 in fp32 alone.
    """
    usual = [call for dtypes in PURE for call in (*losses(dtypes), *statistics(dtypes))]
    for dtypes in MIXED:
        usual += [call for call in losses(dtypes) if call.bias in (None, FP32) and call.softcap and not call.z_loss]
    usual += [call for dtypes in PURE for call in losses(dtypes, WIDE, ("fp8",))]
    for call in usual:
        yield call
        yield replace(call, precision="high")
    for sizes in EDGES:
        yield from (call for call in losses(PURE[-1], sizes) if call.bias in (None, FP32))
        yield from (call for call in statistics(PURE[-1], sizes) if call.bias in (None, FP32))


def recorded(capability: Capability, calls: Iterable[Call]) -> tuple[list[Variant], int]:
    """What calls launch, and how many were made and not refused."""
    made = 0
    with recording(capability) as recorder:
        for call in calls:
            with contextlib.suppress(ValueError):  # of the library: this strategy cannot serve that
                call.make()
                made += 1
    return [*recorder.variants], made


def asked_by_conformance_tests(capability: Capability) -> list[Variant]:
    """What the calls of ``test_conformance.py`` launch, which know nothing of the combinations above."""
    implementations = (*KERNELS, TRITON_ESTIMATED, TRITON_LOSS_ONLY)
    with recording(capability) as recorder:
        for case, implementation in itertools.product(loss_cases(), implementations):
            with contextlib.suppress(pytest.skip.Exception), implementation.grad_mode():
                loss_and_gradients(implementation.linear_cross_entropy, case.problem())
        for case, implementation in itertools.product(statistics_cases(), (*KERNELS, TRITON_LOSS_ONLY)):
            with contextlib.suppress(pytest.skip.Exception), implementation.grad_mode():
                case.head_problem().call(implementation.token_statistics, outputs=TOKEN_OUTPUTS)
    return [*recorder.variants]
