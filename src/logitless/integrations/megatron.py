"""Megatron-core: the loss of its ``GPTModel``, without the logits.

``patch(model)`` puts it in place; ``language_model_loss`` is the loss alone, for code with a forward pass of its own.
Megatron-core is not imported here: what comes in is one of its objects, or is refused.

S sequence, B batch, D hidden, V vocabulary with Megatron's padding, which has mass in the softmax as it has there; T
ranks that are tensor parallel.
"""

from __future__ import annotations

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch

from logitless import sharding, validation
from logitless.functional import linear_cross_entropy

LAYER = "megatron.core.tensor_parallel.layers.ColumnParallelLinear"
MODEL = "megatron.core.models.gpt.gpt_model.GPTModel"
LOSS = "megatron.core.models.common.language_module.language_module.LanguageModule.compute_language_model_loss"

# Options of the loss that layer and model decide, or that a loss per token leaves to the caller.
DECIDED = {
    "input",
    "linear_weight",
    "target",
    "linear_bias",
    "weight",
    "reduction",
    "token_weight",
    "normalizer",
    "group",
    "sequence_parallel",
    "main_grad",
    "adapter",
}
OPTIONS = tuple(name for name in inspect.signature(linear_cross_entropy).parameters if name not in DECIDED)


def language_model_loss(
    output_layer: Any,
    hidden: torch.Tensor,  # [S, B, D], or [S / T, B, D] where sequence parallel
    labels: torch.Tensor,  # [B, S]
    *,
    weight: torch.Tensor | None = None,  # [V / T, D]
    **options: Any,
) -> torch.Tensor:
    """Each token's loss, as ``compute_language_model_loss(labels, output_layer(hidden, weight)[0])`` has it.

    Gradients are those of that call too: of ``hidden`` summed over the tensor-parallel ranks, or scattered to them
    along the sequence, and of this rank's rows of the weight. With ``gradient_accumulation_fusion`` the weight's is
    added to its fp32 ``main_grad``, and ``grad_added_to_main_grad`` says so to the hooks of data parallelism.

    Labels have to be in [0, V), or ``ignore_index``, which costs 0. A label elsewhere costs Megatron some finite number
    that a loss mask takes out; here it is an error on a CPU and NaN on a GPU, masked or not.

    Args:
        output_layer: Megatron-core's ``ColumnParallelLinear``, of 0.13 or later.
        hidden: [S, B, D], what the layer takes.
        labels: [B, S] vocabulary indices of the whole sequence.
        weight: [V / T, D] the tied weight, of ``shared_embedding_or_output_weight()``; the layer's own if None.
        **options: keyword options of ``linear_cross_entropy``, but for those that the layer decides and those that a
            loss per token leaves to the caller (``reduction``, ``normalizer``, ``token_weight``, class weights).

    Returns:
        [B, S] fp32 losses, or fp64 of an fp64 model.

    Raises:
        TypeError: another kind of layer or weight, or an unknown option.
        ValueError: a layer whose settings are not known here, shapes that do not fit, or as ``linear_cross_entropy``.
    """
    _check_layer(output_layer)
    group = _group(output_layer)
    sequence_parallel = group is not None and output_layer.sequence_parallel
    with sharding.rank_agreement(group):
        _check_options("language_model_loss", options)
        weight = _checked_weight(output_layer, weight)
        _check_tokens(hidden, labels, group.size() if group is not None and sequence_parallel else 1)
        main_grad = _main_grad(output_layer, weight)
    losses = linear_cross_entropy(
        hidden,
        weight if main_grad is None else _Accounted.apply(weight),
        labels.transpose(0, 1),
        linear_bias=output_layer.bias,
        reduction="none",
        group=group,
        sequence_parallel=sequence_parallel,
        main_grad=main_grad,
        **options,
    )
    return losses.transpose(0, 1).contiguous()


def patch(model: Any, **options: Any) -> Any:
    """Make ``model(..., labels=labels)`` return losses that are computed without logits.

    What the model returns without labels stays what it is: Megatron's own logits, to which ``softcap`` and
    ``logit_scale`` are not applied. With labels its own forward pass runs, in which the output layer, called as a
    module with its hooks, hands on hidden states and weight, and ``compute_language_model_loss`` takes these. Losses of
    multi-token prediction are computed likewise, with the same options. Whatever else wants the logits gets an error.

    Patch a model before it is wrapped (by ``Float16Module``, ``DistributedDataParallel``). To patch it again replaces
    the options.

    Args:
        model: Megatron-core's ``GPTModel``; of pipeline stages any, those without an output layer are left alone.
        **options: as in ``language_model_loss``.

    Returns:
        The model itself.

    Raises:
        TypeError: another kind of model, or an unknown option.
        ValueError: a model whose settings are not known here.
    """
    _check_options("patch", options)
    if MODEL not in map(_path, type(model).__mro__):
        remedy = "; pass the model that it wraps, its .module" if hasattr(model, "module") else ""
        raise TypeError(f"model must be Megatron-core's GPTModel, got {_path(type(model))}{remedy}")
    if not model.post_process:
        return model
    _check_layer(model.output_layer)
    _check_model(model)
    model.logitless_options = options
    model.forward = types.MethodType(_forward, model)
    model.compute_language_model_loss = types.MethodType(_loss_of_head, model)
    return model


# --- what a patched model does ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _LogitsNotComputed:
    """What takes the place of the logits between output layer and loss.

    Attributes:
        hidden: [S, B, D], or [S / T, B, D].
        weight: [V / T, D], or None for the layer's own.
    """

    hidden: torch.Tensor
    weight: torch.Tensor | None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise TypeError(
            f"logits have no {name!r} in a model patched by logitless: with labels they are not computed, and only "
            "compute_language_model_loss can take what stands for them"
        )


def _forward(model: Any, *args: Any, **kwargs: Any) -> Any:
    """A model's ``forward``, in which, with labels, the output layer multiplies nothing."""
    original = type(model).forward
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    if given.get("labels") is None:
        return original(model, *args, **kwargs)
    for name in ("inference_context", "inference_params"):
        if given.get(name) is not None:
            raise ValueError(f"{name} must be None with labels in a model patched by logitless, got one")
    layer = model.output_layer
    layer.forward = types.MethodType(_hand_on, layer)
    try:
        return original(model, *args, **kwargs)
    finally:
        del layer.forward


def _hand_on(
    layer: Any,
    input_: torch.Tensor,
    weight: torch.Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[_LogitsNotComputed, None]:
    """An output layer's ``forward``. Logits that are not there need no gathering."""
    del layer, runtime_gather_output
    return _LogitsNotComputed(input_, weight), None


def _loss_of_head(model: Any, labels: torch.Tensor, logits: Any) -> torch.Tensor:
    """A model's ``compute_language_model_loss``."""
    if not isinstance(logits, _LogitsNotComputed):
        raise TypeError(
            "compute_language_model_loss of a model patched by logitless takes what its output layer hands on in "
            f"model(..., labels=labels), got {type(logits).__name__}; of logits use "
            "megatron.core.tensor_parallel.vocab_parallel_cross_entropy"
        )
    return language_model_loss(
        model.output_layer, logits.hidden, labels, weight=logits.weight, **model.logitless_options
    )


# --- the weight's gradient --------------------------------------------------------------------------------------------


class _Accounted(torch.autograd.Function):
    """The identity on a weight whose gradient is added to ``main_grad``; says so where hooks look for it.

    The hook of data parallelism wants a gradient to be there, and adds it if it was not accounted for, or if the weight
    has another use whose gradient comes by autograd (``zero_out_wgrad``, a tied embedding's). Zeros are right for both.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        ctx.set_materialize_grads(False)
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> torch.Tensor | None:
        assert upstream == (None,)
        if not hasattr(ctx.weight, "grad_added_to_main_grad"):
            return None
        ctx.weight.grad_added_to_main_grad = True
        return torch.zeros_like(ctx.weight)


def _main_grad(layer: Any, weight: torch.Tensor) -> torch.Tensor | None:
    """Where the gradient is added, or None where it comes by autograd."""
    if not (layer.gradient_accumulation_fusion and weight.requires_grad and torch.is_grad_enabled()):
        return None
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise ValueError(
            "weight must have a main_grad with gradient_accumulation_fusion, got none; wrap the model in Megatron's "
            "DistributedDataParallel, or set gradient_accumulation_fusion=False"
        )
    if main_grad.dtype != torch.float32:
        raise ValueError(
            f"weight.main_grad must be torch.float32 with gradient_accumulation_fusion, got {main_grad.dtype}; set "
            "grad_reduce_in_fp32=True, or gradient_accumulation_fusion=False"
        )
    return main_grad


# --- checks -----------------------------------------------------------------------------------------------------------


def _path(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _check_options(function: str, options: dict[str, Any]) -> None:
    """Only those that pass through, with values that can be used."""
    unknown = sorted(options.keys() - set(OPTIONS))
    if unknown:
        raise TypeError(f"{function} has no option {unknown[0]!r}; it takes {', '.join(OPTIONS)}")
    validation.check_options(options)


def _check_layer(layer: Any) -> None:
    """A layer that does ``hidden @ weight.T + bias`` and nothing else, with its gradients at once."""
    if _path(type(layer)) != LAYER:
        raise TypeError(f"output_layer must be Megatron-core's ColumnParallelLinear, got {_path(type(layer))}")
    if not hasattr(layer, "tp_group"):
        raise TypeError("output_layer must have a tp_group, as in Megatron-core 0.13 and later, got none")
    refused = {
        "is_expert=True": layer.is_expert,
        "disable_grad_reduce=True": layer.disable_grad_reduce,
        "skip_bias_add=True and a bias": layer.skip_bias_add and layer.bias is not None,
        "defer_embedding_wgrad_compute=True": layer.config.defer_embedding_wgrad_compute,
    }
    _refuse("output_layer", refused)


def _check_model(model: Any) -> None:
    """A model that does with logits what Megatron's own does, and nothing that is done elsewhere."""
    config = model.config
    replaced = [
        f"a {name} of its own"
        for owner, name in ((model, "forward"), (model, "compute_language_model_loss"), (model.output_layer, "forward"))
        if name in vars(owner) and getattr(vars(owner)[name], "__module__", None) != __name__
    ]
    refused = {
        "a compute_language_model_loss of its own": _path(type(model).compute_language_model_loss) != LOSS,
        "use_mup=True (it scales logits)": getattr(config, "use_mup", False),
        "overlap_moe_expert_parallel_comm=True": getattr(config, "overlap_moe_expert_parallel_comm", False),
        "config_logger_dir (it stores logits)": getattr(config, "config_logger_dir", ""),
        "cuda_graph_scope=full_iteration": "full_iteration" in str(getattr(config, "cuda_graph_scope", "")),
        **dict.fromkeys(replaced, True),
    }
    _refuse("model", refused)


def _refuse(argument: str, refused: dict[str, Any]) -> None:
    for setting, found in refused.items():
        if found:
            raise ValueError(f"{argument} with {setting} is not supported; use Megatron's own loss, or turn that off")


def _group(layer: Any) -> torch.distributed.ProcessGroup | None:
    """The ranks that have a part of the vocabulary each, None for one alone."""
    group = layer.tp_group
    return None if group is None or group.size() == 1 else group


def _checked_weight(layer: Any, weight: torch.Tensor | None) -> torch.Tensor:
    """The weight that the layer would multiply by."""
    found = layer.weight if weight is None else weight
    if found is None:
        raise ValueError(
            "weight must be given for an output_layer that has none, got None; pass shared_embedding_or_output_weight()"
        )
    if type(found) not in (torch.Tensor, torch.nn.Parameter) or hasattr(found, "__fsdp_param__"):
        kind = "a parameter of Megatron-FSDP" if hasattr(found, "__fsdp_param__") else type(found).__name__
        raise TypeError(f"weight must be a plain torch.Tensor or Parameter, got {kind}; use Megatron's own loss")
    expected = (layer.output_size_per_partition, layer.input_size)
    if tuple(found.shape) != expected:
        raise ValueError(f"weight must have shape {expected}, that of output_layer, got {tuple(found.shape)}")
    return found


def _check_tokens(hidden: torch.Tensor, labels: torch.Tensor, ranks: int) -> None:
    """[S / ranks, B, D] and [B, S]."""
    if hidden.ndim != 3:
        raise ValueError(f"hidden must have shape [S, B, D], got {tuple(hidden.shape)}")
    expected = (hidden.shape[1], hidden.shape[0] * ranks)
    if tuple(labels.shape) != expected:
        parts = f" over {ranks} ranks" if ranks > 1 else ""
        described = f"[B, S] of hidden {tuple(hidden.shape)}{parts}"
        raise ValueError(f"labels must have shape {expected}, {described}, got {tuple(labels.shape)}")
