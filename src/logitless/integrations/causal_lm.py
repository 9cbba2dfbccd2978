"""``patch``: a loaded language model of `transformers` whose loss is computed without logits.

The model's own ``forward`` runs, whatever the architecture. Where it is given ``labels``, the linear layer of its head
returns ``DeferredLogits`` instead of a tensor; the model's own code scales, caps, shifts and flattens these, and its
own loss function calls ``cross_entropy`` of them, which is ``linear_cross_entropy``. Without labels nothing changes.

Nothing here imports `transformers`: a model is what has ``get_output_embeddings()`` and a ``forward`` with ``labels``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from logitless import validation
from logitless.arguments import check_flag
from logitless.integrations.deferred import weight_size
from logitless.integrations.forwards import STATE, State, install, uninstall
from logitless.integrations.trial import agreement
from logitless.options import Backend, Sampled

# What a head's weight may be in.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    are ``DeferredLogits``, computed if they are asked for, before a backward pass through the head. Calls without
    ``labels`` are as before: generation does not change. Also for PEFT models (LoRA on the head too), encoder-decoder
    models, and multimodal ones with a text head. Patch before the model is compiled, or wrapped for parallel training.
    Where a later call with labels forms logits after all, a warning says why, once.

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
    check_flag("verify", verify)
    inner = _unwrapped(model)
    if STATE in inner.__dict__:
        raise ValueError(f"model is patched already, got a {type(inner).__name__}; call logitless.unpatch(model) first")
    if "labels" not in inspect.signature(inner.forward).parameters:
        raise TypeError(f"model must take labels in its forward, got a {type(inner).__name__}, which has no loss")
    heads = _heads(inner)
    facts, state = _facts(inner, heads), State(options, inner.forward, heads)
    install(inner, state)
    try:
        tried = asdict(agreement(inner, state, example)) if verify else {}
    except BaseException:
        unpatch(inner)
        raise
    return Patched(**facts, **tried)


def unpatch(model: nn.Module) -> None:
    """Undo ``patch``: the model is as it was before.

    A ``forward`` that somebody else has put around ours since, a trainer or an accelerator, stays; ours does nothing
    within it any more.

    Args:
        model: what `patch` was given, or the model within it.

    Raises:
        ValueError: it is not patched.
    """
    inner = _unwrapped(model)
    state = inner.__dict__.get(STATE)
    if state is None:
        raise ValueError(f"model must be one that logitless.patch was called on, got a {type(inner).__name__}")
    uninstall(inner, state)


def _checked(gradient: Any, workspace: Any, backend: Any, z_loss: Any, label_smoothing: Any) -> dict[str, Any]:
    validation.check_gradient(gradient)
    validation.check_workspace(workspace)
    validation.check_backend(backend)
    validation.check_z_loss(z_loss)
    validation.check_label_smoothing(label_smoothing)
    given = {"gradient": gradient, "workspace": workspace, "backend": backend, "z_loss": z_loss}
    return {**given, "label_smoothing": label_smoothing}


def _unwrapped(model: object) -> nn.Module:
    """The model of `transformers` within one of PEFT, or the model given."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module of transformers, got {type(model).__name__}")
    if hasattr(model, "_orig_mod"):
        raise TypeError(
            "model is compiled, got what torch.compile returned; patch the model before it is compiled, and unpatch "
            "its _orig_mod"
        )
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
    if not _is_known(weight):
        raise ValueError(
            f"{name}: its head must be a linear layer with a weight [V, D], got a {type(base).__name__}"
            f"{_instead_of_known(weight)}"
        )
    rows = _whole_shape(weight)[0]
    leaves = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and weight_size(layer)[0] == rows and _belongs(layer, output)
    }
    for path, layer in leaves.items():
        if "weight" not in layer._parameters:
            raise ValueError(
                f"{name}: the weight of {path} must be a parameter, got one that is computed anew at each use (by "
                "torch.nn.utils.parametrize, weight_norm or spectral_norm), whose gradients would be lost: remove the "
                "parametrization first"
            )
        if type(layer).forward is not nn.Linear.forward:
            raise ValueError(f"{name}: {path} must be a torch.nn.Linear, got a {type(layer).__name__}: head unknown")
        if "forward" in layer.__dict__:
            raise ValueError(f"{name}: forward of {path} is replaced already (by hooks of accelerate?): head unknown")
    if not leaves:
        raise ValueError(f"{name}: its head must be a torch.nn.Linear, got a {type(output).__name__}: head unknown")
    return leaves


def _is_known(weight: Any) -> bool:
    """Whether it is a weight [V, D] whose products are known."""
    if not isinstance(weight, Tensor) or weight.dtype not in DTYPES or len(_whole_shape(weight)) != 2:
        return False
    return not _has_own_products(weight)


def _has_own_products(weight: Tensor) -> bool:
    kind, plain = cast(Any, type(weight)), cast(Any, Tensor)
    return kind.__torch_dispatch__ is not plain.__torch_dispatch__ and not isinstance(weight, DTensor)


def _instead_of_known(weight: Any) -> str:
    """What there is instead."""
    if not isinstance(weight, Tensor):
        return ""
    if _has_own_products(weight):
        return (
            f" whose weight is a {type(weight).__name__}, a subclass of torch.Tensor with products of its own, as "
            "quantized weights of torchao are: leave the head out of the quantization"
        )
    if weight.dtype not in DTYPES:
        return f" whose weight is quantized, of {weight.dtype}: leave the head out of the quantization"
    return f" whose weight has shape {_whole_shape(weight)}"


def _whole_shape(weight: Any) -> tuple[int, ...]:
    """Also where DeepSpeed has emptied what it shards."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def _belongs(layer: nn.Module, output: nn.Module) -> bool:
    return any(module is layer for module in output.modules())


def _facts(model: nn.Module, heads: dict[str, nn.Linear]) -> dict[str, Any]:
    """What ``Patched`` says of a model that was not tried."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    return {
        "model": type(model).__name__,
        "heads": tuple((path, weight_size(head)) for path, head in heads.items()),
        "tied": any(head.weight is getattr(embedding, "weight", None) for head in heads.values()),
        "bias": any(head.bias is not None for head in heads.values()),
    }
