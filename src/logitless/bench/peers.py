"""What is measured: this library's gradients, and the ways of others to compute the same loss.

A peer's package is imported when the peer is loaded, and only then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

import logitless

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""hidden [N, D], weight [V, D], target [N] -> scalar mean loss."""

BASELINE = "two-stage"

# Names on the package index of the modules that peers import.
DISTRIBUTIONS = {
    "cut_cross_entropy": "cut-cross-entropy",
    "cutlass": "nvidia-cutlass-dsl",
    "liger_kernel": "liger-kernel",
    "quack": "quack-kernels",
    "triton": "triton",
}

# Rows of a chunk, QuACK's default. It tells a vector of rows from one of columns by its length and refuses to guess, so
# that where D is the same a chunk has half as many.
QUACK_CHUNK = 4096


@dataclass(frozen=True)
class Peer:
    """A way to compute the loss.

    Attributes:
        name: how the command line and the reports call it.
        description: what it is.
        load: imports what it needs and returns the loss.
        lacks: what a device or this installation lacks for it, or None.
    """

    name: str
    description: str
    load: Callable[[], Loss]
    lacks: Callable[[torch.device], str | None]


def two_stage(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The pipeline everybody has: logits, then their cross-entropy."""
    return F.cross_entropy(F.linear(hidden, weight), target)


def exact(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """This library with its defaults."""
    return logitless.linear_cross_entropy(hidden, weight, target)


def exact_fastest(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """This library with a workspace that holds all logits once, and what goes with them."""
    logits = hidden.shape[0] * weight.shape[0] * hidden.element_size()
    return logitless.linear_cross_entropy(hidden, weight, target, workspace=logits * 11 // 10 + (256 << 20))


def with_workspace(workspace: str) -> Peer:
    """This library within the bytes that the caller allows, such as ``"512MiB"``."""
    return Peer(
        f"logitless {workspace}",
        f"this library with workspace={workspace!r}",
        lambda: functools.partial(logitless.linear_cross_entropy, workspace=workspace),
        _nothing,
    )


def sampled(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """This library's sampled gradient at its default threshold."""
    return logitless.linear_cross_entropy(hidden, weight, target, gradient=logitless.Sampled())


def sampled_fp8(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same after a scan in eight bits, which it rounds its operands to in every call."""
    return logitless.linear_cross_entropy(hidden, weight, target, gradient=logitless.Sampled(scan="fp8"))


def torch_chunked(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """PyTorch's own operator with its default options; with ``options=None`` it is the two-stage pipeline itself."""
    options = torch.nn.LinearCrossEntropyOptions()  # pyright: ignore[reportAttributeAccessIssue]
    return F.linear_cross_entropy(hidden, weight, target, options=options)  # pyright: ignore[reportAttributeAccessIssue]


def _compiled() -> Loss:
    # Without a reset, shapes of earlier cases count against the limit of recompilations, past which it stays eager.
    torch.compiler.reset()
    return torch.compile(two_stage, dynamic=False)


def _liger() -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
        LigerFusedLinearCrossEntropyFunction,
    )

    return lambda hidden, weight, target: LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target)[0]


def _liger_cute() -> Loss:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy_sm90,
    )

    return liger_fused_linear_cross_entropy_sm90


def _cut_cross_entropy(**options: Any) -> Loss:
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    return functools.partial(linear_cross_entropy, **options)


def _quack() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # pyright: ignore[reportMissingImports]

    def loss(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        chunk = QUACK_CHUNK if hidden.shape[1] != QUACK_CHUNK else QUACK_CHUNK // 2
        return chunked_linear_cross_entropy(hidden, weight, target, chunk_size=chunk)

    return loss


def _nothing(device: torch.device) -> None:
    """Runs anywhere."""


def _torch_operator(device: torch.device) -> str | None:
    if hasattr(F, "linear_cross_entropy"):
        return None
    return f"needs torch 2.13 or later, this is {torch.__version__}"


def _kernels(*modules: str, capability: tuple[int, int] | None = None) -> Callable[[torch.device], str | None]:
    """For kernels: the modules they import, and the compute capability they are for, if only one."""

    def lacks(device: torch.device) -> str | None:
        needs = [DISTRIBUTIONS[module] for module in modules if find_spec(module) is None]
        if device.type != "cuda":
            needs.append("a CUDA device")
        elif capability is not None and torch.cuda.get_device_capability(device) != capability:
            needs.append(f"compute capability {capability[0]}.{capability[1]}")
        return f"needs {', '.join(needs)}" if needs else None

    return lacks


PEERS = {
    peer.name: peer
    for peer in (
        Peer(BASELINE, "F.cross_entropy(F.linear(...)), eager; the baseline", lambda: two_stage, _nothing),
        Peer("torch.compile", "the same, compiled", _compiled, _nothing),
        Peer("torch chunked", "F.linear_cross_entropy, default options", lambda: torch_chunked, _torch_operator),
        Peer("liger", "Liger-Kernel's Triton kernel", _liger, _kernels("liger_kernel", "triton")),
        Peer(
            "liger cute",
            "Liger-Kernel's CuTe path for Hopper: bf16, keeps all logits",
            _liger_cute,
            _kernels("liger_kernel", "cutlass", capability=(9, 0)),
        ),
        Peer(
            "cce",
            "Cut Cross-Entropy's defaults: small gradients left out; bf16, fp16",
            _cut_cross_entropy,
            _kernels("cut_cross_entropy", "triton"),
        ),
        Peer(
            "cce unfiltered",
            "Cut Cross-Entropy with all gradients",
            lambda: _cut_cross_entropy(filter_eps=None),
            _kernels("cut_cross_entropy", "triton"),
        ),
        Peer("quack", "QuACK's chunked loss, default options", _quack, _kernels("quack", "cutlass", "triton")),
        Peer("logitless exact", "this library's defaults", lambda: exact, _nothing),
        Peer("logitless exact fastest", "with a workspace for all logits", lambda: exact_fastest, _nothing),
        Peer("logitless sampled", "exact loss, sampled gradient", lambda: sampled, _nothing),
        Peer("logitless fp8", "estimated loss, sampled gradient, scan in eight bits", lambda: sampled_fp8, _nothing),
    )
}
