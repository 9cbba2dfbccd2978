"""What a patched model and its head run instead of their own ``forward``.

The model's notes which of its calls with labels is at work in this thread; the head's hands out ``DeferredLogits`` to
such a call. Both live in the instances alone, and ``unpatch`` takes them out.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import ismethod
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitless.integrations.deferred import DeferredLogits, Record, Term, real, weight_size
from logitless.integrations.lazy import handed_out
from logitless.integrations.moment import Backward, Moment, Parameters, Since, parameters_of
from logitless.integrations.trl import STATE as ADAPTED

STATE = "_logitless"
# What `torch.nn.DataParallel` calls to copy a module.
REPLICATE = "_replicate_for_data_parallel"
# Of the functions that are put in the place of a module's own `forward`.
MARK = "_of_logitless"


@dataclass
class State:
    """Of one patched model; shared by it and its heads.

    Attributes:
        options: of ``linear_cross_entropy``.
        forward: the model's own.
        heads: the linear layers, by name.
        number: of the patch, which tells it from others of the same model.
        warned: whether it was said that logits are formed after all.
        backward: passes through the heads.
        trial: while the patch is tried, else None.
    """

    options: dict[str, Any]
    forward: Any
    heads: dict[str, nn.Linear]
    number: int = field(default_factory=itertools.count().__next__)
    warned: bool = False
    backward: Backward = field(default_factory=Backward)
    trial: Trial | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """Of a copied model."""
        return State(self.options, copy.deepcopy(self.forward, memo), copy.deepcopy(self.heads, memo), self.number)

    def __reduce__(self) -> Any:
        """Refuses.

        Raises:
            TypeError: always; a file could not name the functions that were put into the model.
        """
        raise TypeError(
            "a patched model cannot be pickled; save its state_dict(), use save_pretrained(), or call "
            "logitless.unpatch(model) first"
        )


@dataclass
class _Call:
    """A forward pass with labels.

    Attributes:
        state: of the model.
        before: the heads' parameters when it began; FSDP puts others in their place within a head.
        record: what became of deferred logits.
        since: backward passes after it.
        reached: whether a patched head was called.
    """

    state: State
    before: Parameters
    record: Record
    since: Since
    reached: bool = False


class _Thread(threading.local):
    """What this thread is at: the innermost forward pass with labels, if any."""

    def __init__(self) -> None:
        self.call: _Call | None = None


_thread = _Thread()


@dataclass
class Trial:
    """One forward pass while a patch is tried, with logits in fp32 at least.

    Attributes:
        deferred: whether heads return deferred logits.
        leaves: what heads were given, as leaves, so that no gradient goes further.
        largest: the largest logit.
        record: what became of deferred ones.
    """

    deferred: bool
    leaves: list[Tensor] = field(default_factory=list)
    largest: float = 0.0
    record: Record = field(default_factory=Record)


def install(model: nn.Module, state: State) -> None:
    """Replace the ``forward`` of the model and its heads, on these instances alone."""
    own, bound, number = getattr(state.forward, "__func__", state.forward), ismethod(state.forward), state.number

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        here: State | None = self.__dict__.get(STATE)
        if here is None or here.number != number:  # no longer patched, or anew around what was put around this
            return own(self, *args, **kwargs) if bound else own(*args, **kwargs)
        if not _has_labels(here.forward, args, kwargs):
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                _warn_of_trainer(here)
            return here.forward(*args, **kwargs)
        outer, record = _thread.call, Record() if here.trial is None else here.trial.record
        _thread.call = call = _Call(here, parameters_of(here.heads.values()), record, Since(here.backward))
        try:
            output = here.forward(*args, **kwargs)
        finally:
            _thread.call = outer
        if outer is not None and outer.state is here:  # a model that calls itself
            outer.reached |= call.reached
        if here.trial is None and not torch.compiler.is_compiling():
            call.since.close()
            _warn_of_logits(call)
            if outer is None and not torch.is_grad_enabled():
                return handed_out(output)
        return output

    # Not as `__wrapped__`, which accelerate follows when it takes off what it put around.
    functools.update_wrapper(forward, own)
    signature = inspect.signature(own)
    vars(forward).pop("__wrapped__")
    forward.__signature__ = signature if bound else _with_self(signature)
    setattr(forward, MARK, True)
    for module, replaced in ((model, forward), *((head, _head_forward) for head in state.heads.values())):
        module.__dict__[STATE] = state
        module.__dict__["forward"] = MethodType(replaced, module)
    model.__dict__[REPLICATE] = _refuse_replicas
    if "get_output_embeddings" not in model.__dict__:
        model.__dict__["get_output_embeddings"] = MethodType(_output_embeddings, model)


def uninstall(model: nn.Module, state: State) -> None:
    """Undo ``install``, but for what somebody else has put around it since."""
    del model.__dict__[REPLICATE]
    if getattr(model.get_output_embeddings, "__func__", None) is _output_embeddings:
        del model.__dict__["get_output_embeddings"]
    for module in (model, *state.heads.values()):
        del module.__dict__[STATE]
        if hasattr(getattr(module.forward, "__func__", None), MARK):
            del module.__dict__["forward"]
    if "forward" not in model.__dict__ and state.forward != model.forward:  # it had one of its own
        model.forward = state.forward


def _warn_of_logits(call: _Call) -> None:
    """Say once that logits are formed after all."""
    state, reasons = call.state, call.record.computed
    if state.warned or (call.reached and not reasons):
        return
    state.warned = True
    heads = ", ".join(state.heads)
    if reasons:
        why = f"the model needed them for {reasons[0]}, which cannot be followed"
    else:
        why = f"it did not call {heads}; if its head is another since, call logitless.unpatch(model) and patch it anew"
    warnings.warn(
        f"a patched model formed its logits in a call with labels: {why}. The loss is right, memory is not saved",
        stacklevel=5,  # above our forward and the two of torch.nn.Module
    )


def _warn_of_trainer(state: State) -> None:
    """Say once that a trainer of `transformers` makes the loss of logits, from labels that it keeps from the model."""
    if state.warned:
        return
    frame = sys._getframe(2)
    while frame is not None:
        trainer = frame.f_locals.get("self")
        if not isinstance(trainer, nn.Module) and hasattr(trainer, "compute_loss"):
            break
        frame = frame.f_back
    else:
        return
    given = remedy = ""
    if getattr(trainer, "label_smoother", None) is not None:
        given, remedy = "label_smoothing_factor", "set it to 0 and call logitless.patch(model, label_smoothing=...)"
    elif getattr(trainer, "compute_loss_func", None) is not None:
        given, remedy = "compute_loss_func", "leave it out, or make the loss with logitless.linear_cross_entropy"
    if given:
        state.warned = True
        warnings.warn(
            f"a patched model is trained by a {type(trainer).__name__} with {given}, which takes the labels from the "
            f"model and makes its loss of logits: the patch does nothing there; {remedy}",
            stacklevel=6,  # above our forward, the one that calls it and the two of torch.nn.Module
        )


def _output_embeddings(self: nn.Module) -> Any:
    """The model's own ``get_output_embeddings``; a forward of TRL's that asks for it reads the head past the patch."""
    state: State | None = self.__dict__.get(STATE)
    if state is not None and not state.warned and not torch.compiler.is_compiling() and ADAPTED not in self.__dict__:
        caller = sys._getframe(1)
        if caller.f_locals.get("fused_lm_head"):
            state.warned = True
            warnings.warn(
                "a patched model is trained by one of TRL's trainers, which computes with a head of its own: the patch "
                "does nothing there; call logitless.integrations.trl.adapt(trainer) before trainer.train()",
                stacklevel=3,
            )
    return type(self).get_output_embeddings(self)  # type: ignore[attr-defined]


def _refuse_replicas() -> None:
    raise TypeError(
        "a patched model must not be in torch.nn.DataParallel, whose copies would run the parameters of the first "
        "device; start one process for each device (torchrun, accelerate launch), or make one device visible"
    )


def _with_self(signature: inspect.Signature) -> inspect.Signature:
    """That of a method, of one that takes no ``self``."""
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    return signature.replace(parameters=[own, *signature.parameters.values()])


def _has_labels(forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if "labels" in kwargs:
        return kwargs["labels"] is not None
    names = list(inspect.signature(forward).parameters)
    place = names.index("labels")
    return len(args) > place and args[place] is not None


def _head_forward(self: nn.Linear, input: Any, work: Callable[[], Tensor] | None = None) -> Any:
    """What a patched head returns: logits, or with labels deferred ones; or what work done within it returns."""
    if work is not None:
        return work()
    call, state = _thread.call, self.__dict__.get(STATE)
    if call is None or call.state is not state:
        logits = nn.Linear.forward(self, real(input))
        if state is not None:
            state.backward.watch(logits, [self])
        return logits
    call.reached = True
    trial = call.state.trial
    if trial is not None:
        input = input.detach().to(torch.promote_types(input.dtype, torch.float32)).requires_grad_()
        trial.leaves.append(input)
        if not trial.deferred:
            bias = None if self.bias is None else self.bias.to(input.dtype)
            logits = F.linear(input, self.weight.to(input.dtype), bias)
            trial.largest = max(trial.largest, logits.detach().abs().max().item())
            return logits
    kind = input.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
    moment = Moment.now(call.before + parameters_of([self]), call.since)
    return DeferredLogits((Term(input, self, weight_size(self)[0]),), dtype, call.state.options, call.record, moment)


setattr(_head_forward, MARK, True)
