"""Every way the library can compute the same thing: backends, and their strategies.

Without a GPU the kernels run in Triton's interpreter, on the CPU. With ``LOGITLESS_TEST_DEVICE=cuda`` every call moves
its tensors to the GPU and its results back, so that the tests and what they compare with stay as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import logitless
import logitless.schedules

# A block is kept with probability min(1, mass / threshold): with this threshold everything is kept whose mass could
# show in fp64, so the sampled gradient must equal the exact one.
KEEP_ALL = 1e-30

DEVICE = os.environ.get("LOGITLESS_TEST_DEVICE", "cpu")


def moved(value: object, device: str) -> object:
    """A tensor on the device, connected to the one given; anything else as it is."""
    return value.to(device) if isinstance(value, Tensor) else value


def on_device(function: Callable, *args, **options) -> object:
    """Call with tensors on the device of the tests. A backend that refuses skips the test with its reason."""
    options = {name: moved(value, DEVICE) for name, value in options.items()}
    try:
        return function(*(moved(value, DEVICE) for value in args), **options)
    except ValueError as error:
        if "cannot serve this call" not in str(error):
            raise
        pytest.skip(str(error))


@dataclass(frozen=True)
class Implementation:
    """A backend with, but for the reference, one strategy and ragged tile sizes forced on it."""

    name: str
    backend: str
    strategy: str | None = None
    rows: int | None = None  # tokens a chunk
    window: int | None = None  # vocabulary columns a window
    kept: int | None = None  # windows kept besides those aliased with the weight's gradient
    prepared: bool = False  # whether the gradient of the logits is formed in the forward pass
    sampled: bool = False
    scan: logitless.options.Scan = "input"

    def __str__(self) -> str:
        return self.name

    @property
    def gradient(self) -> str | logitless.Sampled:
        return logitless.Sampled(threshold=KEEP_ALL, scan=self.scan) if self.sampled else "exact"

    @property
    def any_upstream(self) -> bool:
        """Whether the gradient waits for the upstream one, as ``reduction="none"`` and token statistics need."""
        return self.strategy != "chunked" and not self.prepared

    def forced(self) -> contextlib.AbstractContextManager:
        if self.strategy is None:
            return contextlib.nullcontext()
        sizes = {"rows": self.rows, "window": self.window, "kept": self.kept, "prepared": self.prepared}
        return logitless.schedules.force_strategy(
            self.strategy, **{name: size for name, size in sizes.items() if size is not None}
        )

    def grad_mode(self) -> contextlib.AbstractContextManager:
        """``no_grad`` for the strategy that only serves there."""
        return torch.set_grad_enabled(self.strategy != "loss_only")

    def linear_cross_entropy(self, *args, **options) -> Tensor:
        options = {"backend": self.backend, "gradient": self.gradient, **options}
        with self.forced():
            return moved(on_device(logitless.linear_cross_entropy, *args, **options), "cpu")

    def token_statistics(self, *args, **options) -> logitless.TokenStatistics:
        options = {"backend": self.backend, "gradient": self.gradient, **options}
        with self.forced():
            statistics = on_device(logitless.token_statistics, *args, **options)
        names = logitless.options.TOKEN_OUTPUTS
        return logitless.TokenStatistics(**{name: moved(getattr(statistics, name), "cpu") for name in names})

    def float_statistics(self, *args, **options) -> dict[str, Tensor]:
        """The differentiable token statistics by name."""
        names = ("nll", "logsumexp", "entropy")
        statistics = self.token_statistics(*args, outputs=names, **options)
        return {name: getattr(statistics, name) for name in names}


REFERENCE = Implementation("reference", "reference")
REFERENCE_SAMPLED = Implementation("reference-sampled", "reference", sampled=True)
STORED = Implementation("torch-stored", "torch", "stored")
CHUNKED = Implementation("torch-chunked", "torch", "chunked", rows=5)
WINDOWED = Implementation("torch-windowed", "torch", "windowed", rows=5, window=7)
SAMPLED = Implementation("torch-sampled", "torch", "sampled", rows=5, sampled=True)
REFERENCE_ESTIMATED = Implementation("reference-estimated", "reference", sampled=True, scan="fp8")
ESTIMATED = Implementation("torch-estimated", "torch", "sampled", rows=5, sampled=True, scan="fp8")
LOSS_ONLY = Implementation("torch-loss_only", "torch", "loss_only", rows=5)

TRITON_STORED = Implementation("triton-stored", "triton", "stored")
TRITON_PREPARED = Implementation("triton-prepared", "triton", "stored", prepared=True)
TRITON_CHUNKED = Implementation("triton-chunked", "triton", "chunked", rows=5)
TRITON_WINDOWED = Implementation("triton-windowed", "triton", "windowed", window=1)
TRITON_KEPT = Implementation("triton-kept", "triton", "windowed", window=1, kept=1)
TRITON_SAMPLED = Implementation("triton-sampled", "triton", "sampled", rows=32, sampled=True)
TRITON_LOSS_ONLY = Implementation("triton-loss_only", "triton", "loss_only", rows=5)

TRITON_ESTIMATED = Implementation("triton-estimated", "triton", "sampled", rows=32, sampled=True, scan="fp8")

WITH_TRITON = importlib.util.find_spec("triton") is not None

# All that give gradients.
TORCH = (REFERENCE, REFERENCE_SAMPLED, STORED, CHUNKED, WINDOWED, SAMPLED)
KERNELS = (TRITON_STORED, TRITON_PREPARED, TRITON_CHUNKED, TRITON_WINDOWED, TRITON_KEPT, TRITON_SAMPLED)
TRITON = KERNELS if WITH_TRITON else ()
IMPLEMENTATIONS = TORCH + TRITON
ANY_UPSTREAM = tuple(implementation for implementation in IMPLEMENTATIONS if implementation.any_upstream)
# All whose loss is an estimate, which do not know every per-token output.
ESTIMATES = (REFERENCE_ESTIMATED, ESTIMATED, *((TRITON_ESTIMATED,) if WITH_TRITON else ()))
# All that serve where no gradient is wanted.
FORWARD_ONLY = (LOSS_ONLY, TRITON_LOSS_ONLY) if WITH_TRITON else (LOSS_ONLY,)
