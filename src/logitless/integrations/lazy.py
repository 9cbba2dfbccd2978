"""Logits of an evaluated call, as a tensor that is computed when it is first read.

Code that gathers predictions over batches and processes asks whether they are tensors, and hands them to functions of
PyTorch and NumPy that read memory. So they are a tensor: a wrapper subclass, whose operations PyTorch sends here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from logitless.integrations.deferred import DeferredLogits

# What is the same tensor again, and reads nothing.
ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class LazyLogits(Tensor):
    """[..., V] logits, computed by the first operation that reads them; the memory of deferred ones until then."""

    _deferred: DeferredLogits

    @staticmethod
    def __new__(cls, deferred: DeferredLogits) -> LazyLogits:
        """Of that shape, dtype and device."""
        return Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, deferred.shape, dtype=deferred.dtype, device=deferred.device, requires_grad=False
        )

    def __init__(self, deferred: DeferredLogits) -> None:
        """Of deferred logits, which no operation of the model's will change any more."""
        self._deferred = deferred

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any operation is one on the computed logits."""
        if func in ALIASES and isinstance(args[0], LazyLogits):
            return cls(args[0]._deferred)

        def computed(value: LazyLogits) -> Tensor:
            return value._computed(func.__name__)

        return func(*tree_map_only(cls, computed, args), **tree_map_only(cls, computed, kwargs or {}))

    def _computed(self, reason: str) -> Tensor:
        return self._deferred.tensor(reason)

    def __repr__(self, *, tensor_contents: str | None = None) -> str:  # pyright: ignore
        """That of the computed logits."""
        return self._computed("repr").__repr__(tensor_contents=tensor_contents)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy of the computed logits."""
        return copy.deepcopy(self._computed("deepcopy"), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files and other processes get the computed logits."""
        return self._computed("pickle").__reduce_ex__(protocol)


def _reads_memory(name: str) -> Any:
    """A method of ``Tensor`` that reads memory rather than to call an operation."""

    def method(self: LazyLogits, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._computed(name), name)(*args, **kwargs)

    method.__doc__ = "Of the computed logits."
    return method


for _name in (
    *("numpy", "tolist", "data_ptr", "storage", "untyped_storage", "share_memory_", "is_shared"),
    *("__array__", "__dlpack__", "__dlpack_device__", "stride", "storage_offset", "is_contiguous"),
):
    setattr(LazyLogits, _name, _reads_memory(_name))


def handed_out(output: Any) -> Any:
    """What an evaluated model returns, with tensors in the place of deferred logits."""
    if isinstance(output, DeferredLogits):
        return LazyLogits(output)
    if isinstance(output, tuple) and any(isinstance(value, DeferredLogits) for value in output):
        values = map(handed_out, output)
        return type(output)(*values) if hasattr(output, "_fields") else tuple(values)
    if isinstance(output, dict):
        for name, value in output.items():
            if isinstance(value, DeferredLogits):
                output[name] = LazyLogits(value)
    return output
