"""What a patched model and its head run instead of their own ``forward``.

The model's notes which of its calls with labels is at work in this thread; the head's hands out ``DeferredLogits`` to
such a call. Both live in the instances alone, and ``unpatch`` takes them out.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
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
from logitless.integrations.evaluated import EvaluatedLogits
from logitless.integrations.moment import Backward, Moment, Parameters, Since, parameters_of
from logitless.integrations.trl import PATCHED as MARK
from logitless.integrations.trl import STATE as TRL

STATE = "_logitless"
# What `torch.nn.DataParallel` calls to copy a module.
REPLICATE = "_replicate_for_data_parallel"


@dataclass
class State:
    """Of one patched model; shared by it and its heads.

    Attributes:
        options: of ``linear_cross_entropy``.
        forward: the model's own.
        heads: the linear layers, by name.
        number: of the patch, which tells it from others of the same model.
        warned: whether it was said that logits are formed after all, or that the patch is not used.
        called: whether the model was called with labels.
        backward: passes through the heads.
        trial: while the patch is tried, else None.
    """

    options: dict[str, Any]
    forward: Any
    heads: dict[str, nn.Linear]
    number: int = field(default_factory=itertools.count().__next__)
    warned: bool = False
    called: bool = False
    backward: Backward = field(default_factory=Backward)
    trial: Trial | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> State:
        """Of a copied model."""
        copied = memo[id(self)] = State(self.options, None, {}, self.number)  # modules on the way have it too
        copied.forward, copied.heads = copy.deepcopy(self.forward, memo), copy.deepcopy(self.heads, memo)
        return copied

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
        if kwargs.get("fused_lm_head"):  # TRL's, beneath this
            _warn_of_body(here)
            return here.forward(*args, **kwargs)
        if not _has_labels(here.forward, args, kwargs):
            _warn_of_missing_labels(here, self)
            return here.forward(*args, **kwargs)
        if here.trial is None and not torch.compiler.is_compiling():
            here.called = True
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
        return output

    # Not as `__wrapped__`, which accelerate follows when it takes off what it put around.
    functools.update_wrapper(forward, own)
    signature = inspect.signature(own)
    vars(forward).pop("__wrapped__")
    forward.__signature__ = signature if bound else _with_self(signature)
    setattr(forward, MARK, own)
    for module, replaced in ((model, forward), *((head, _head_forward) for head in state.heads.values())):
        module.__dict__[STATE] = state
        module.__dict__["forward"] = MethodType(replaced, module)
    model.__dict__[REPLICATE] = _refuse_replicas
    body = _body(model)
    if body is not None:
        body.__dict__[STATE] = state
        body.register_forward_pre_hook(_before_body)


def uninstall(model: nn.Module, state: State) -> None:
    """Undo ``install``, but for what somebody else has put around it since."""
    del model.__dict__[REPLICATE]
    body = _body(model)
    if body is not None and body.__dict__.pop(STATE, None) is not None:
        for number, hook in list(body._forward_pre_hooks.items()):
            if hook is _before_body:
                del body._forward_pre_hooks[number]
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


def _warn_of_missing_labels(state: State, model: nn.Module) -> None:
    """Say once that a model is trained from its logits."""
    if _is_unused_in_training(state, model):
        state.warned = True
        warnings.warn(
            "a patched model was called in training without labels: it forms its logits, and the patch is not used. "
            "transformers.Trainer takes the labels away for label_smoothing_factor: set that to 0 and call "
            "logitless.patch(model, label_smoothing=...) instead. For compute_loss_func, and any other loss that is "
            "made of logits, there is no use in the patch",
            stacklevel=5,
        )


def _before_body(body: nn.Module, inputs: Any) -> None:
    state: State | None = body.__dict__.get(STATE)
    if state is not None and _is_unused_in_training(state, body):
        _warn_of_body(state)


def _warn_of_body(state: State) -> None:
    """Say once that a model is trained past its ``forward``, unless TRL's head is ours."""
    model = getattr(state.forward, "__self__", None)
    if not state.warned and TRL not in getattr(model, "__dict__", {}):
        state.warned = True
        warnings.warn(
            "a patched model was called in training past its forward, for its hidden states alone, as trainers of TRL "
            "do that take log-probabilities from the head's weight themselves: the patch is not used. Call "
            "logitless.integrations.trl.adapt(trainer) before trainer.train(); it serves those of SFT, DPO, GRPO, KTO "
            "and RLOO, and the model need not be patched for it",
            stacklevel=4,
        )


def _is_unused_in_training(state: State, module: nn.Module) -> bool:
    """Whether this pass trains, and none with labels came before it."""
    if torch.compiler.is_compiling() or state.trial is not None or state.called or state.warned:
        return False
    return module.training and torch.is_grad_enabled()


def _body(model: nn.Module) -> nn.Module | None:
    """What gives a model of `transformers` its hidden states, where it is a module of its own."""
    body = getattr(model, "base_model", None)
    return body if isinstance(body, nn.Module) and body is not model else None


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
    evaluating = trial is None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    moment = Moment.now(call.before + parameters_of([self]), call.since)
    logits = DeferredLogits((Term(input, self, weight_size(self)[0]),), dtype, call.state.options, call.record, moment)
    return EvaluatedLogits.of(logits) if evaluating else logits


setattr(_head_forward, MARK, True)
