"""Every way the library can compute the same thing: backends, and the strategies of the torch backend."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor

import logitless
import logitless.planning

# A block is kept with probability min(1, mass / threshold): with this threshold everything is kept whose mass could
# show in fp64, so the sampled gradient must equal the exact one.
KEEP_ALL = 1e-30


@dataclass(frozen=True)
class Implementation:
    """A backend with, for the torch backend, one strategy and ragged tile sizes forced on it."""

    name: str
    backend: str
    strategy: str | None = None
    rows: int | None = None  # tokens a chunk
    window: int | None = None  # vocabulary columns a window
    sampled: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def gradient(self) -> str | logitless.Sampled:
        return logitless.Sampled(threshold=KEEP_ALL) if self.sampled else "exact"

    @property
    def any_upstream(self) -> bool:
        """Whether the gradient waits for the upstream one, as ``reduction="none"`` and token statistics need."""
        return self.strategy != "chunked"

    def forced(self) -> contextlib.AbstractContextManager:
        if self.strategy is None:
            return contextlib.nullcontext()
        sizes = {"rows": self.rows, "window": self.window}
        return logitless.planning.force_strategy(
            self.strategy, **{name: size for name, size in sizes.items() if size is not None}
        )

    def grad_mode(self) -> contextlib.AbstractContextManager:
        """``no_grad`` for the strategy that only serves there."""
        return torch.set_grad_enabled(self.strategy != "loss_only")

    def linear_cross_entropy(self, *args, **options) -> Tensor:
        options = {"backend": self.backend, "gradient": self.gradient, **options}
        with self.forced():
            return logitless.linear_cross_entropy(*args, **options)

    def token_statistics(self, *args, **options) -> logitless.TokenStatistics:
        options = {"backend": self.backend, "gradient": self.gradient, **options}
        with self.forced():
            return logitless.token_statistics(*args, **options)

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
LOSS_ONLY = Implementation("torch-loss_only", "torch", "loss_only", rows=5)

# All that give gradients.
IMPLEMENTATIONS = (REFERENCE, REFERENCE_SAMPLED, STORED, CHUNKED, WINDOWED, SAMPLED)
ANY_UPSTREAM = tuple(implementation for implementation in IMPLEMENTATIONS if implementation.any_upstream)
