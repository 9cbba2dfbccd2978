"""Logits of a forward pass without gradients: a tensor of PyTorch whose values are computed when something reads them.

``EvaluatedLogits`` is a wrapper subclass of ``torch.Tensor`` without memory. What a model does between head and loss is
followed by ``DeferredLogits``, and makes another such tensor. The first function of PyTorch that reads one computes
the values and puts them in its place: the same object is an ordinary ``torch.Tensor`` from then on, for its holders in
Python as for code in C++. Constructors such as ``torch.tensor`` go past Python's overrides to the operators, which are
given the values too. What asks for an address before either, as ``torch.utils.dlpack.to_dlpack`` does, gets an
exception from PyTorch.

Views stay views: they are taken of the tensor that they were views of, so that all see what is written into one.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # as torch.compiler.disable, which imports the compiler at once
from torch.utils._pytree import tree_leaves, tree_map_only

from logitless.integrations.deferred import DeferredLogits, cross_entropy

# Among the attributes of a tensor.
STATE = "_logitless"
# What reads no value.
METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "itemsize", "nbytes")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_nested")),
    *(getattr(Tensor, name).__get__ for name in ("is_quantized", "is_mkldnn", "requires_grad", "grad", "is_leaf")),
    *(getattr(Tensor, name).__get__ for name in ("grad_fn", "output_nr")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.stride, Tensor.storage_offset),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.is_signed, Tensor.is_inference),
    *(Tensor.__len__, Tensor.__hash__, Tensor.element_size, Tensor.get_device),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed, torch.is_inference),
}
# Methods of ``DeferredLogits`` by the functions of PyTorch that they follow, in three kinds: those that return other
# values or the tensor itself, those that return a view where they can, and those that write into their tensor.
VALUES = {
    **{Tensor.float: "float", Tensor.to: "to", Tensor.contiguous: "contiguous", Tensor.mul: "__mul__"},
    **{Tensor.div: "__truediv__", Tensor.add: "__add__", Tensor.tanh: "tanh", torch.tanh: "tanh"},
}
VIEWS = {
    **{Tensor.view: "view", Tensor.reshape: "reshape", Tensor.flatten: "flatten", Tensor.__getitem__: "__getitem__"},
    **{torch.reshape: "reshape", torch.flatten: "flatten"},
}
WRITES = {Tensor.mul_: "__imul__", Tensor.div_: "__itruediv__", Tensor.add_: "__iadd__"}
# What PyTorch does of its own tensors alone.
OF_PLAIN = {
    *(Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.apply_, Tensor.map_, Tensor.__repr__, Tensor.__format__),
    *(Tensor.__reduce_ex__, Tensor.__deepcopy__, Tensor.__dlpack__),
}


class _NotFollowedError(Exception):
    """The real logits are needed, for the reason in its text."""


class _Followed(DeferredLogits):
    """Deferred logits that raise ``_NotFollowedError`` where the real ones are needed."""

    def tensor(self, reason: str = "tensor") -> Tensor:
        raise _NotFollowedError(reason)


@dataclass
class _State:
    """Of a tensor that is not computed.

    Attributes:
        deferred: what it would be.
        parent: the tensor that it is a view of, or None.
        view: makes it of the parent's values.
        tensor: its values, once they are computed.
        placed: whether it has their memory.
        lock: held by the thread that computes them.
    """

    deferred: _Followed
    parent: Tensor | None = None
    view: Callable[[Tensor], Tensor] | None = None
    tensor: Tensor | None = None
    placed: bool = False
    lock: Any = field(default_factory=threading.RLock)

    def computed(self) -> bool:
        """Whether they are, or those that it is a view of: somebody may have written there since."""
        return self.tensor is not None or (self.parent is not None and _is_computed(self.parent))


@_disable_dynamo
def _function(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Functions of PyTorch: what reads nothing, what models do before the loss, the loss; else of the values."""
    kwargs = kwargs or {}
    if func in METADATA:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    reason = getattr(func, "__name__", str(func))
    try:
        return _follow(func, args, kwargs)
    except _NotFollowedError as needed:
        reason = str(needed) or reason
    held = [each for each in _all_in((args, kwargs)) if not _put_in_place(each, reason)]
    if held and func in OF_PLAIN:
        args, kwargs = tree_map_only(EvaluatedLogits, partial(_values, reason=reason), (args, kwargs))
    with torch._C.DisableTorchFunctionSubclass() if held else nullcontext():
        return func(*args, **kwargs)


class _Functions:
    """What PyTorch finds as ``__torch_function__``: the function above.

    None while ``torch.jit.trace`` records, which notes lines of Python and must see the same ones with other tensors.
    """

    def __get__(self, logits: Any, kind: Any) -> Any:
        if logits is not None and torch._C._get_tracing_state() is not None and _put_in_place(logits, "trace") is False:
            return torch._C._disabled_torch_function_impl
        return _function


class EvaluatedLogits(Tensor):
    """[..., V] logits, not computed; see the module."""

    _logitless: _State

    @staticmethod
    def of(deferred: DeferredLogits) -> EvaluatedLogits:
        """What ``deferred`` would be, in memory of its own."""
        return _new(_State(_as_followed(deferred)), torch.Size(deferred.shape))

    __torch_function__: Any = _Functions()  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    @classmethod
    @_disable_dynamo
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Operators that no function of PyTorch in Python has led to, of the values."""
        given: dict[int, Tensor] = {}

        def values(logits: EvaluatedLogits) -> Tensor:
            tensor = _values(logits, str(func))
            given[id(tensor)] = logits
            return tensor

        args, kwargs = tree_map_only(EvaluatedLogits, values, (args, kwargs or {}))
        return tree_map_only(Tensor, lambda result: given.get(id(result), result), func(*args, **kwargs))


def _new(state: _State, shape: torch.Size, **layout: Any) -> EvaluatedLogits:
    dtype, device = state.deferred.dtype, state.deferred.device
    with torch.inference_mode(state.deferred.moment.inference):
        logits = Tensor._make_wrapper_subclass(EvaluatedLogits, shape, dtype=dtype, device=device, **layout)
    torch._C._set_throw_on_mutable_data_ptr(logits)
    setattr(logits, STATE, state)
    return logits


def _all_in(values: Any) -> list[EvaluatedLogits]:
    return [each for each in tree_leaves(values) if isinstance(each, EvaluatedLogits)]


def _as_followed(deferred: DeferredLogits) -> _Followed:
    followed = _Followed.__new__(_Followed)
    followed.__dict__.update(deferred.__dict__)
    return followed


def _is_computed(logits: Tensor) -> bool:
    return not isinstance(logits, EvaluatedLogits) or logits._logitless.computed()


# --- what is followed -------------------------------------------------------------------------------------------------


def _follow(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result without values.

    Raises:
        _NotFollowedError: there is none; or modes are others than when the logits were deferred.
    """
    inference = torch.is_inference_mode_enabled()
    others = (each._logitless.deferred.moment.inference != inference for each in _all_in((args, kwargs)))
    if any(others):
        raise _NotFollowedError
    logits = args[0] if args else None
    if func is F.cross_entropy:
        args, kwargs = tree_map_only(EvaluatedLogits, _deferred, (args, kwargs))
        return cross_entropy(*args, **kwargs)
    if not isinstance(logits, EvaluatedLogits) or _is_computed(logits):
        raise _NotFollowedError
    state = logits._logitless
    if func in WRITES and not state.deferred.shared:
        state.deferred = _result(state.deferred, WRITES[func], args, kwargs)
        return logits
    if func in VALUES and "copy" not in kwargs:
        result = _result(state.deferred, VALUES[func], args, kwargs)
        copied = func is Tensor.contiguous and not logits.is_contiguous()
        return logits if result is state.deferred and not copied else EvaluatedLogits.of(result)
    if func in VIEWS:
        return _viewed(logits, _result(state.deferred, VIEWS[func], args, kwargs), func, args[1:], kwargs)
    if func is Tensor.detach:
        state.deferred.check()
        return _viewed(logits, _result(state.deferred, "view", (logits, logits.shape), {}), func, (), {})
    raise _NotFollowedError


def _deferred(logits: EvaluatedLogits) -> Any:
    return logits if _is_computed(logits) else logits._logitless.deferred


def _result(deferred: _Followed, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Followed:
    others = tree_map_only(EvaluatedLogits, _deferred, args[1:])
    result = getattr(deferred, method)(*others, **kwargs)
    if not isinstance(result, _Followed):
        raise _NotFollowedError(method)
    return result


def _viewed(
    logits: EvaluatedLogits, result: _Followed, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> EvaluatedLogits:
    """The result, in the memory of the logits where the function gives a view of it."""
    if any(isinstance(part, Tensor) for part in (args[0] if args and isinstance(args[0], tuple) else args)):
        return EvaluatedLogits.of(result)  # rows by tensors are copies
    with torch._C._DisableTorchDispatch():
        like = torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device="meta")
        made = func(like, *args, **kwargs)
        if made.untyped_storage()._cdata != like.untyped_storage()._cdata:
            return EvaluatedLogits.of(result)
        offset = logits.storage_offset() + made.storage_offset()
    state = _State(result, logits, lambda values: func(values, *args, **kwargs))
    return _new(state, made.shape, strides=made.stride(), storage_offset=offset)


# --- what is computed -------------------------------------------------------------------------------------------------


def _values(logits: Tensor, reason: str) -> Tensor:
    """A tensor of PyTorch's own with the values, the same each time; of the parent's memory where it is a view."""
    if not isinstance(logits, EvaluatedLogits):
        return logits
    state = logits._logitless
    with state.lock:
        if state.tensor is None and state.parent is not None and state.view is not None:
            parent = _values(state.parent, reason)
            with torch.inference_mode(parent.is_inference()), torch.no_grad(), _without_modes():
                state.tensor = state.view(parent)
        elif state.tensor is None:
            with _without_modes():
                state.tensor = DeferredLogits.tensor(state.deferred, reason)
        return state.tensor


def _put_in_place(logits: EvaluatedLogits, reason: str) -> bool:
    """Give the tensor its values, and say whether it is an ordinary one now.

    Where C++ holds it, as a graph or a trace does, or a weak reference, it stays a wrapper, of the values' memory.
    """
    state: _State | None = vars(logits).get(STATE)
    if state is None:
        return True
    if isinstance(state.parent, EvaluatedLogits):
        _put_in_place(state.parent, reason)
    with state.lock, torch._C.DisableTorchFunctionSubclass(), _without_modes():
        if not isinstance(logits, EvaluatedLogits):
            return True
        values = _values(logits, reason)
        if cast(Any, logits)._use_count() == 1 and not weakref.getweakrefs(logits):
            attributes = {name: value for name, value in vars(logits).items() if name != STATE}
            with torch.inference_mode(values.is_inference()):
                torch.utils.swap_tensors(logits, values.detach())
            vars(logits).update(attributes)
            return True
        if not state.placed:
            logits.data, state.placed = values, True
        return False


@contextmanager
def _without_modes() -> Iterator[None]:
    """Values are real, and nobody's operators, also where these are traced."""
    tracing = torch._C._get_tracing_state()
    if tracing is not None:
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
            yield
    finally:
        if tracing is not None:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
