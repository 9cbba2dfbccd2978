"""``patch``: a loaded language model of `transformers` whose loss is computed without logits.

The model's own ``forward`` runs, whatever the architecture. Where it is given ``labels``, the linear layer of its head
returns ``DeferredLogits`` instead of a tensor; the model's own code scales, caps, shifts and flattens these, and its
own loss function calls ``cross_entropy`` of them, which is ``linear_cross_entropy``. Without labels nothing changes.

Nothing here imports `transformers`: a model is what has ``get_output_embeddings()`` and a ``forward`` with ``labels``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from inspect import ismethod
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitless import validation
from logitless.integrations.deferred import (
    DeferredLogits,
    EvaluatedLogits,
    Moment,
    Parameters,
    Record,
    Term,
    parameters_of,
    real,
)
from logitless.options import Backend, Sampled

STATE = "_logitless"
# What `torch.nn.DataParallel` calls to copy a module.
REPLICATE = "_replicate_for_data_parallel"
# Of the functions that are put in the place of a module's own `forward`.
MARK = "_of_logitless"
# Shape of the batch that a patch is tried on, and how many of each sequence's labels are ignored.
TRIED, IGNORED = (2, 8), 3


@dataclass(frozen=True)
class Patched:
    """What ``patch`` found and tried.

    Attributes:
        model: name of the class.
        heads: names of the linear layers whose logits are deferred, and their shapes [V, D].
        tied: whether a head's weight is that of the input embedding.
        bias: whether a head has one.
        softcap: that of the logits, or None.
        logit_scale: of the products.
        loss_error: relative difference of the losses with and without logits, None if not tried.
        gradient_error: the largest relative difference of gradients, None if not tried.
    """

    model: str
    heads: tuple[tuple[str, tuple[int, int]], ...]
    tied: bool
    bias: bool
    softcap: float | None = None
    logit_scale: float = 1.0
    loss_error: float | None = None
    gradient_error: float | None = None

    def __str__(self) -> str:
        """One line."""
        heads = " + ".join(f"{name} {list(shape)}" for name, shape in self.heads)
        facts = ["tied" if self.tied else "untied", *(["bias"] if self.bias else [])]
        if self.softcap is not None:
            facts.append(f"softcap {self.softcap:g}")
        if self.logit_scale != 1:
            facts.append(f"logit scale {self.logit_scale:g}")
        tried = "not tried"
        if self.loss_error is not None and self.gradient_error is not None:
            tried = f"agrees with its logits: loss {self.loss_error:.1e}, gradients {self.gradient_error:.1e}"
        return f"{self.model}: {heads}, {', '.join(facts)}; {tried}"


@dataclass
class _State:
    """Of one patched model; shared by it and its heads.

    Attributes:
        options: of ``linear_cross_entropy``.
        forward: the model's own.
        heads: the linear layers, by name.
        number: of the patch, which tells it from others of the same model.
        warned: whether it was said that logits are formed after all.
        trial: while the patch is tried, else None.
    """

    options: dict[str, Any]
    forward: Any
    heads: dict[str, nn.Linear]
    number: int = field(default_factory=itertools.count().__next__)
    warned: bool = False
    trial: _Trial | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _State:
        """Of a copied model."""
        return _State(self.options, copy.deepcopy(self.forward, memo), copy.deepcopy(self.heads, memo), self.number)

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
        reached: whether a patched head was called.
    """

    state: _State
    before: Parameters
    record: Record
    reached: bool = False


class _Thread(threading.local):
    """What this thread is at: the innermost forward pass with labels, if any."""

    def __init__(self) -> None:
        self.call: _Call | None = None


_thread = _Thread()


@dataclass
class _Trial:
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


def patch(
    model: nn.Module,
    *,
    gradient: str | Sampled = "exact",
    workspace: int | str | None = None,
    backend: Backend = "auto",
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    example: Mapping[str, Any] | None = None,
    verify: bool = True,
) -> Patched:
    """Make a causal language model of `transformers` compute its loss without logits, in place.

    Afterwards ``model(input_ids, labels=labels).loss`` is ``linear_cross_entropy`` of the model's own hidden states and
    head, with its own shift, ``num_items_in_batch``, ``ignore_index``, softcap and scale; ``.logits`` of such a call
    are ``DeferredLogits``, computed if they are asked for. Calls without ``labels`` are as before: generation does not
    change. Also for PEFT models (LoRA on the head too), encoder-decoder models, and multimodal ones with a text head.
    Patch before the model is compiled, or wrapped for parallel training. Where a later call with labels forms logits
    after all, a warning says why, once.

    Unless ``verify`` is off, the patch is tried: the model's loss on 2 x 8 random tokens and its gradients with respect
    to the last hidden states and the head are formed with logits and without, and must agree. Takes two forward passes;
    parameters, their ``.grad`` and random states stay as they are.

    Args:
        model: as loaded; its ``forward`` takes ``labels``, its ``get_output_embeddings()`` is a linear layer.
        gradient: as in ``linear_cross_entropy``.
        workspace: as in ``linear_cross_entropy``.
        backend: as in ``linear_cross_entropy``.
        z_loss: as in ``linear_cross_entropy``.
        label_smoothing: as in ``linear_cross_entropy``; where the model's own loss smooths, that holds.
        example: keyword arguments for the model's ``forward``, ``labels`` among them, to try the patch on instead, for
            models that need more than ``input_ids``.
        verify: whether to try it. Off, a model that does something unknown with its logits still computes the right
            loss, from real logits, or raises in its first step.

    Returns:
        What was found.

    Raises:
        TypeError: no such model, or one that is wrapped already.
        ValueError: a model that is patched already, whose head is unknown, or that does with its logits what cannot be
            followed; or options that ``linear_cross_entropy`` refuses. The model is then as it was.
    """
    options = _checked(gradient, workspace, backend, z_loss, label_smoothing)
    inner = _unwrapped(model)
    if STATE in inner.__dict__:
        raise ValueError(f"model is patched already, got a {type(inner).__name__}; call logitless.unpatch(model) first")
    if "labels" not in inspect.signature(inner.forward).parameters:
        raise TypeError(f"model must take labels in its forward, got a {type(inner).__name__}, which has no loss")
    heads = _heads(inner)
    state = _State(options, inner.forward, heads)
    _install(inner, state)
    try:
        return _found(inner, state, example if verify else None, verify)
    except BaseException:
        unpatch(inner)
        raise


def unpatch(model: nn.Module) -> None:
    """Undo ``patch``: the model is as it was before.

    A ``forward`` that somebody else has put around ours since, a trainer or an accelerator, stays; ours does nothing
    within it any more.

    Raises:
        ValueError: it is not patched.
    """
    inner = _unwrapped(model)
    state = inner.__dict__.get(STATE)
    if state is None:
        raise ValueError(f"model must be one that logitless.patch was called on, got a {type(inner).__name__}")
    del inner.__dict__[REPLICATE]
    for module in (inner, *state.heads.values()):
        del module.__dict__[STATE]
        if hasattr(getattr(module.forward, "__func__", None), MARK):
            del module.__dict__["forward"]
    if "forward" not in inner.__dict__ and state.forward != inner.forward:  # it had one of its own
        inner.forward = state.forward


def _checked(gradient: Any, workspace: Any, backend: Any, z_loss: Any, label_smoothing: Any) -> dict[str, Any]:
    validation.check_gradient(gradient)
    validation.check_workspace(workspace)
    validation.check_backend(backend)
    validation.check_number("z_loss", z_loss, least=0)
    validation.check_number("label_smoothing", label_smoothing, least=0, most=1)
    given = {"gradient": gradient, "workspace": workspace, "backend": backend, "z_loss": z_loss}
    return {**given, "label_smoothing": label_smoothing}


def _unwrapped(model: object) -> nn.Module:
    """The model of `transformers` within one of PEFT, or the model given."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module of transformers, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError("model is compiled, got what torch.compile returned; patch the model before it is compiled")
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if not hasattr(inner, "get_output_embeddings"):
        wrapped = "; patch the model before it is wrapped" if hasattr(inner, "module") else ""
        raise TypeError(f"model must have get_output_embeddings(), got a {type(inner).__name__}{wrapped}")
    return inner


def _heads(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers whose outputs are logits, or are added to them, by name."""
    name = type(model).__name__
    output = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(output, nn.Module):
        kind = "nothing" if output is None else f"a {type(output).__name__}"
        raise ValueError(f"{name}: its get_output_embeddings() must be a linear layer, got {kind}: head unknown")
    if isinstance(output, nn.ModuleList):
        raise ValueError(f"{name}: it has {len(output)} heads, got a ModuleList from get_output_embeddings(): unknown")
    base = output.get_base_layer() if hasattr(output, "get_base_layer") else output  # type: ignore[operator]
    weight = getattr(base, "weight", None)
    shape = getattr(weight, "ds_shape", getattr(weight, "shape", ()))  # DeepSpeed empties weights that it shards
    if not isinstance(weight, Tensor) or len(shape) != 2 or not weight.is_floating_point():
        raise ValueError(f"{name}: its head must be a linear layer with a weight [V, D], got a {type(base).__name__}")
    leaves = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == shape[0] and _belongs(layer, output)
    }
    for path, layer in leaves.items():
        if type(layer).forward is not nn.Linear.forward:
            raise ValueError(f"{name}: {path} must be a torch.nn.Linear, got a {type(layer).__name__}: head unknown")
        if "forward" in layer.__dict__:
            raise ValueError(f"{name}: forward of {path} is replaced already (by hooks of accelerate?): head unknown")
    if not leaves:
        raise ValueError(f"{name}: its head must be a torch.nn.Linear, got a {type(output).__name__}: head unknown")
    return leaves


def _belongs(layer: nn.Module, output: nn.Module) -> bool:
    return any(module is layer for module in output.modules())


def _install(model: nn.Module, state: _State) -> None:
    """Replace the ``forward`` of the model and its heads, on these instances alone."""
    own, bound, number = getattr(state.forward, "__func__", state.forward), ismethod(state.forward), state.number

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        here: _State | None = self.__dict__.get(STATE)
        if here is None or here.number != number:  # no longer patched, or anew around what was put around this
            return own(self, *args, **kwargs) if bound else own(*args, **kwargs)
        if not _has_labels(here.forward, args, kwargs):
            return here.forward(*args, **kwargs)
        outer, record = _thread.call, Record() if here.trial is None else here.trial.record
        _thread.call = call = _Call(here, parameters_of(here.heads.values()), record)
        try:
            output = here.forward(*args, **kwargs)
        finally:
            _thread.call = outer
        if outer is not None and outer.state is here:  # a model that calls itself
            outer.reached |= call.reached
        if here.trial is None and not torch.compiler.is_compiling():
            _warn_of_logits(call)
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
        stacklevel=4,
    )


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
        return nn.Linear.forward(self, real(input))
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
    logits = EvaluatedLogits if evaluating else DeferredLogits
    moment = Moment.now(call.before + parameters_of([self]))
    return logits((Term(input, self),), dtype, call.state.options, call.record, moment=moment)


setattr(_head_forward, MARK, True)


# --- trying a patch ---------------------------------------------------------------------------------------------------


def _found(model: nn.Module, state: _State, example: Mapping[str, Any] | None, verify: bool) -> Patched:
    name = type(model).__name__
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    heads = state.heads.values()
    facts = {
        "model": name,
        "heads": tuple((path, (head.out_features, head.in_features)) for path, head in state.heads.items()),
        "tied": any(head.weight is getattr(embedding, "weight", None) for head in heads),
        "bias": any(head.bias is not None for head in heads),
    }
    if not verify:
        return Patched(**facts)
    with _quietly(model, state):
        given = _example(model, state) if example is None else dict(example)
        given.setdefault("use_cache", False)
        exact = {"gradient": "exact", "z_loss": 0.0, "label_smoothing": 0.0}
        plain = _tried(model, state, given, _Trial(deferred=False))
        kept, state.options = state.options, {**state.options, **exact}
        trial = _Trial(deferred=True)
        try:
            ours = _tried(model, state, given, trial)
        finally:
            state.options = kept
    record = trial.record
    if record.computed:
        raise ValueError(f"{name}: it needs its logits for {record.computed[0]}, which cannot be followed")
    if not record.losses:
        raise ValueError(f"{name}: its loss is not a cross-entropy of the logits of {', '.join(state.heads)}")
    loss_error, gradient_error = _differences(plain, ours)
    allowed = _allowed(state, plain)
    if not max(loss_error, gradient_error) <= allowed:
        raise ValueError(
            f"{name}: loss and gradients without logits must agree with the model's own to {allowed:.1e}, got relative "
            f"differences of {loss_error:.1e} and {gradient_error:.1e}: it does something unknown"
        )
    scale, bound = record.losses[-1]
    return Patched(**facts, softcap=bound, logit_scale=scale, loss_error=loss_error, gradient_error=gradient_error)


@dataclass(frozen=True)
class _Outcome:
    """Of one forward pass: its loss, gradients by place, and the largest logit."""

    loss: Tensor
    gradients: list[Tensor | None]
    largest: float


def _tried(model: nn.Module, state: _State, given: dict[str, Any], trial: _Trial) -> _Outcome:
    """Loss, and its gradients with respect to the heads' inputs and parameters."""
    state.trial = trial
    try:
        loss = model(**given).loss
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__}: a batch of {', '.join(given)} must give a loss, got {type(error).__name__}: "
            f"{error}; pass example= with what its forward needs, or verify=False"
        ) from error
    finally:
        state.trial = None
    if not isinstance(loss, Tensor) or not trial.leaves:
        missing = "no loss" if trial.leaves else f"no call of {', '.join(state.heads)}: another layer forms its logits"
        raise ValueError(f"{type(model).__name__}: a batch with labels must give a loss from its head, got {missing}")
    parameters = [p for head in state.heads.values() for p in (head.weight, head.bias) if p is not None]
    wanted = [*trial.leaves, *(p for p in parameters if p.requires_grad)]
    if not loss.requires_grad:
        raise ValueError(f"{type(model).__name__}: its loss does not depend on its head")
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return _Outcome(loss.detach(), list(found), trial.largest)


def _differences(plain: _Outcome, ours: _Outcome) -> tuple[float, float]:
    """Relative differences of the losses, and the largest of a gradient's."""
    if len(plain.gradients) != len(ours.gradients):
        return torch.inf, torch.inf
    scale = plain.loss.abs().clamp_min(1.0)
    loss = ((ours.loss - plain.loss).abs() / scale).item()
    worst = 0.0
    for theirs, mine in zip(plain.gradients, ours.gradients, strict=True):
        if theirs is None or mine is None:
            worst = max(worst, 0.0 if theirs is mine else torch.inf)
            continue
        size = theirs.float().norm()
        difference = (mine.float() - theirs.float()).norm()
        worst = max(worst, (difference / size).item() if size > 0 else difference.item())
    return loss, worst


def _allowed(state: _State, plain: _Outcome) -> float:
    """What rounding may do to a gradient.

    It is rounded to the dtype of its tensor. Logits are in fp32; a few roundings of the size of the largest move its
    share of the softmax as much.
    """
    eps = max(torch.finfo(head.weight.dtype).eps for head in state.heads.values())
    return eps + 16 * torch.finfo(torch.float32).eps * (1 + plain.largest)


def _example(model: nn.Module, state: _State) -> dict[str, Any]:
    """Random tokens, none of them special, and labels of which some are ignored."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = min([text.vocab_size, *(head.out_features for head in state.heads.values())])
    special = {
        v for c in (config, text) for k, v in vars(c).items() if k.endswith(("_id", "_index")) and isinstance(v, int)
    }
    usual = [token for token in range(vocabulary) if token not in special] or [0]
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    drawn = torch.randint(len(usual), TRIED, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor(usual)[drawn].to(device)
    labels = tokens.clone()
    labels[:, :IGNORED] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@contextmanager
def _quietly(model: nn.Module, state: _State) -> Iterator[None]:
    """In evaluation mode, not compiled, recording gradients; with random states as they were after."""
    modes = {module: module.training for module in model.modules()}
    device = next(iter(state.heads.values())).weight.device
    devices = [device] if device.type == "cuda" else []
    autocasts = torch.amp.is_autocast_available(device.type)
    exact = torch.autocast(device.type, enabled=False) if autocasts else nullcontext()
    try:
        eager = torch.compiler.set_stance("force_eager")
        with torch.random.fork_rng(devices), torch.inference_mode(False), torch.enable_grad(), exact, eager:
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
