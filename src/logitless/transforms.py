"""What of PyTorch's ways to transform a program is not supported, each with what to do instead.

These run a program on tensors that stand for others: batches of them, tangents, recordings. The operator reads memory,
and has a backward pass of its own, so that it must not be given any. ``torch.compile`` and ``torch.export`` are
supported, by an operator that their graphs can hold, and make no use of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch.autograd import forward_ad

FUNCTION_TRANSFORMS = (
    "logitless: torch.func transforms (grad, vjp, vmap, jvp, jacrev, hessian) are not supported; use "
    "torch.autograd.grad or backward() for gradients, reduction='none' for the losses of single tokens, and "
    "torch.nn.functional.cross_entropy on logits where a transform is needed"
)
FORWARD_MODE = (
    "logitless: forward-mode differentiation is not supported, and {name} {has} a tangent; use torch.autograd.grad or "
    "backward(), or compute this loss with torch.nn.functional.cross_entropy on logits"
)
TORCH_SCRIPT = (
    "logitless: TorchScript (torch.jit.script, torch.jit.trace) is not supported; use torch.compile or torch.export"
)
BATCHED_GRADIENTS = (
    "logitless: batched upstream gradients (is_grads_batched=True, vectorize=True) are not supported; call "
    "torch.autograd.grad once for each of them"
)

AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


def check_transforms() -> None:
    """Refuse to run within a transform of ``torch.func`` or under TorchScript's tracer.

    Raises:
        NotImplementedError: within one.
    """
    if torch.compiler.is_compiling():
        return
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        raise NotImplementedError(TORCH_SCRIPT)
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(FUNCTION_TRANSFORMS)


def check_differentiation(name: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor with a tangent, which a result would silently lack.

    A compiler shows tensors without their tangents: there, a level of forward-mode differentiation is refused at all.

    Raises:
        NotImplementedError: it has one.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise NotImplementedError(FORWARD_MODE.format(name=name, has="may have"))
    elif forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(FORWARD_MODE.format(name=name, has="has"))


def check_upstream(*upstream: torch.Tensor | None) -> None:
    """Refuse gradients that stand for a batch of them.

    Raises:
        NotImplementedError: one does.
    """
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    for grad in upstream:
        if grad is not None and (functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)):
            raise NotImplementedError(BATCHED_GRADIENTS)


def refuse_script() -> NoReturn:
    """What ``torch.jit.script`` calls in the place of the compiler, as ``__prepare_scriptable__``."""
    raise NotImplementedError(TORCH_SCRIPT)


def not_scriptable(function: AnyFunction) -> AnyFunction:
    """The function itself, which ``torch.jit.script`` then refuses in our words."""
    function.__prepare_scriptable__ = refuse_script  # type: ignore[attr-defined]
    return function
