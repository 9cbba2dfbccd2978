"""What is measured: this library's gradients, and the ways of others to compute the same loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

import logitless

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""hidden [N, D], weight [V, D], target [N] -> scalar mean loss."""

BASELINE = "two-stage"


def two_stage(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The pipeline everybody has: logits, then their cross-entropy."""
    return F.cross_entropy(F.linear(hidden, weight), target)


def exact(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """This library with its defaults."""
    return logitless.linear_cross_entropy(hidden, weight, target)


def sampled(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """This library's sampled gradient at its default threshold."""
    return logitless.linear_cross_entropy(hidden, weight, target, gradient=logitless.Sampled())


def available_peers() -> dict[str, Loss]:
    """Every way to compute the loss that this installation has, the baseline first."""
    peers: dict[str, Loss] = {BASELINE: two_stage, "logitless exact": exact, "logitless sampled": sampled}
    if hasattr(F, "linear_cross_entropy"):  # torch >= 2.13
        peers["torch chunked"] = torch_chunked
    return peers


def torch_chunked(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PyTorch's own operator with its default options; with ``options=None`` it is the two-stage pipeline itself."""
    options = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
    return F.linear_cross_entropy(hidden, weight, target, options=options)  # pyright: ignore[reportAttributeAccessIssue]
