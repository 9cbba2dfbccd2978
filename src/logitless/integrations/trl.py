"""TRL: per-token log-probabilities, entropies and metrics of its trainers from ``token_statistics``.

A trainer of TRL (SFT, DPO, GRPO, KTO, RLOO) asks its model for these, ``model(..., labels=labels,
fused_lm_head=True)``, instead of logits. The ``forward`` that it gives the model for that purpose hands hidden states,
the head's weight and labels to one function that reads the head a tile at a time. ``adapt`` puts ``_Head`` in the place
of that function, for the models of one trainer; shifts, masks, temperature, reference models, adapters, gathered shards
and all losses stay TRL's. Without ``fused_lm_head``, as in generation, a model is not touched.

Nothing here imports TRL: a trainer is what has models with such a ``forward``.

N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from logitless import validation
from logitless.functional import token_statistics
from logitless.options import Backend, Sampled

STATE = "_logitless_trl"
# TRL's function, by its name where the model's ``forward`` looks it up, what it takes and what it can give.
FUNCTION = "_ChunkedLogProbFunction"
TAKEN = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
GIVEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# What differs by more than this between TRL's function and ours, on the few fp32 numbers of ``_check_meaning``, whose
# size is around 1, is another quantity.
TOLERANCE = 1e-4

PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class _Head:
    """What TRL's function is replaced by.

    Attributes:
        own: TRL's function.
        options: of ``token_statistics``.
    """

    own: Any
    options: dict[str, Any]

    def apply(
        self,
        hidden: Tensor,  # [N, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = GIVEN,
    ) -> PerToken:
        """[N] each, in the order of ``GIVEN``, None where not among ``outputs``.

        Of the logits ``c * tanh(logit_scale * (<x, w_v> + bias_v) / c) / temperature`` with the cap c.
        """
        unknown = set(outputs) - set(GIVEN)
        if unknown:
            raise ValueError(f"outputs must be among {', '.join(GIVEN)}, got {', '.join(sorted(unknown))}: unknown")
        if hasattr(weight, "ds_id"):
            raise ValueError(
                "the head's weight must be whole in the backward pass too, got one that DeepSpeed ZeRO-3 shards: use "
                "ZeRO-2 or FSDP, or call logitless.integrations.trl.restore(trainer)"
            )
        scale, cap = logit_scale / temperature, final_logit_softcapping

        def statistics(factor: float, names: list[Any]) -> Any:
            """Of the logits times a factor."""
            return token_statistics(
                hidden,
                weight,
                targets,
                outputs=names,
                linear_bias=None if bias is None else bias * (scale * factor),
                logit_scale=scale * factor,
                softcap=None if cap is None else cap / temperature * factor,
                **self.options,
            )

        wanted = {
            "nll": True,
            "entropy": "entropy" in outputs,
            "prediction": "is_top1" in outputs,
            "logsumexp": "log_sum_sq_probs" in outputs,
        }
        found = statistics(1.0, [name for name, asked in wanted.items() if asked])
        squares = mean = None
        with torch.no_grad():
            if "log_sum_sq_probs" in outputs:  # the sum of squared exponentials is that of twice the logits
                squares = statistics(2.0, ["logsumexp"]).logsumexp - 2 * found.logsumexp
            if "mean_logits" in outputs and cap is None:
                mean = scale * _mean_product(hidden, weight, bias)
            elif "mean_logits" in outputs:
                given = (hidden, weight, bias, targets, temperature, chunk_size, cap, logit_scale, ("mean_logits",))
                mean = self.own.apply(*given)[GIVEN.index("mean_logits")]
        top = found.prediction == targets if "is_top1" in outputs else None
        return -found.nll, found.entropy, squares, mean, top


def _mean_product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[N] means over the vocabulary of ``hidden weight^T + bias``: the products with the mean row."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        mean = hidden.to(dtype) @ weight.mean(0, dtype=dtype)
    return mean if bias is None else mean + bias.mean(dtype=dtype)


def adapt(
    trainer: Any,
    *,
    gradient: str | Sampled = "exact",
    workspace: int | str | None = None,
    backend: Backend = "auto",
) -> None:
    """Make a trainer of TRL compute per-token log-probabilities with ``token_statistics``, in place.

    Call it between the trainer's construction and ``trainer.train()``. It holds for the trainer's model and reference
    model, with PEFT adapters on and off, in training and evaluation: the loss of an ``SFTTrainer``, whatever ``DPO``,
    ``GRPO``, ``KTO`` and ``RLOO`` make of log-probabilities, and their metrics, entropy and token accuracy among them.
    Losses are TRL's, to rounding; products accumulate in fp32, where TRL rounds each logit to the dtype of the hidden
    states. Generation, with vLLM or without, does not change.

    The model need not be one that ``logitless.patch`` was called on. Where TRL itself goes back to real logits, for
    ``compute_metrics``, it still does.

    Args:
        trainer: of TRL 1.16 or later, of a kind that has a fused head.
        gradient: as in ``token_statistics``. ``Sampled`` must have ``scan="input"``, since trainers ask for entropies
            too, and a ``generator`` of its own where a seed should generate the same completions as without it.
        workspace: as in ``token_statistics``.
        backend: as in ``token_statistics``.

    Raises:
        TypeError: not a trainer, or an option of the wrong type.
        ValueError: a trainer that is adapted already, whose model has no fused head, or whose loss is made of real
            logits; another TRL, whose head takes, gives or means something unknown; or an option out of bounds. The
            trainer is then as it was. From the first step: a weight that DeepSpeed ZeRO-3 shards, or as
            ``token_statistics``.
    """
    sampled = validation.check_gradient(gradient)
    validation.check_scan(sampled, ("entropy",), sharded=False)
    validation.check_workspace(workspace)
    validation.check_backend(backend)
    name = type(trainer).__name__
    models = _models(trainer)
    _check_loss(trainer)
    heads = []
    for model in models:
        if STATE in model.__dict__:
            raise ValueError(
                f"trainer is adapted already, got a {name}; call logitless.integrations.trl.restore(trainer) first"
            )
        names = _names_of_forward(name, model)
        head = _Head(names[FUNCTION], {"gradient": gradient, "workspace": workspace, "backend": backend})
        _check_signature(head.own)
        heads.append((model, names, head))
    _check_meaning(heads[0][2].own)
    for model, names, head in heads:
        _install(model, names, head)


def restore(trainer: Any) -> None:
    """Undo ``adapt``: the trainer computes with TRL's own function again.

    Raises:
        TypeError: not a trainer.
        ValueError: it is not adapted.
    """
    models = [model for model in _models(trainer) if STATE in model.__dict__]
    if not models:
        name = type(trainer).__name__
        raise ValueError(f"trainer must be one that logitless.integrations.trl.adapt was called on, got a {name}")
    for model in models:
        state: _State = model.__dict__.pop(STATE)
        state.active = False  # where something has wrapped the forward since, it stays and does nothing
        if model.forward == state.forward:
            model.forward = state.before


@dataclass
class _State:
    """Of one adapted model.

    Attributes:
        before: the ``forward`` that it had.
        forward: the one that it has.
        active: whether that one does anything.
    """

    before: Any
    forward: Any = None
    active: bool = True


def _install(model: nn.Module, names: dict[str, Any], head: _Head) -> None:
    """Have the fused ``forward`` find our head by the name of TRL's function, for as long as it runs.

    ``names`` are the globals of that ``forward``, which other models share: they keep TRL's function.
    """
    state = _State(model.forward)
    before = state.before

    @functools.wraps(getattr(before, "__func__", before))  # generation reads the signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not state.active or not kwargs.get("fused_lm_head"):
            return before(*args, **kwargs)
        found = names[FUNCTION]
        names[FUNCTION] = head
        try:
            return before(*args, **kwargs)
        finally:
            names[FUNCTION] = found

    state.forward = MethodType(forward, model)
    model.__dict__[STATE] = state
    model.forward = state.forward


def _models(trainer: Any) -> list[nn.Module]:
    """The models of `transformers` whose heads a trainer reads: its own and the reference model."""
    if not isinstance(getattr(trainer, "model", None), nn.Module) or not hasattr(trainer, "accelerator"):
        raise TypeError(f"trainer must be one of TRL, with a model and an accelerator, got a {type(trainer).__name__}")
    models: list[nn.Module] = []
    for wrapped in (trainer.model, getattr(trainer, "ref_model", None)):
        if wrapped is None:
            continue
        model = trainer.accelerator.unwrap_model(wrapped)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if model not in models:
            models.append(model)
    return models


def _check_loss(trainer: Any) -> None:
    """Refuse losses of an ``SFTTrainer`` for which TRL forms all logits."""
    if getattr(trainer, "compute_loss_func", None) is not None:
        raise ValueError(
            "trainer must compute its loss from its fused head, got compute_loss_func: TRL gives it logits; override "
            "compute_loss instead"
        )
    nll = getattr(trainer.args, "loss_type", None) == "nll"
    if nll and getattr(trainer, "label_smoother", None) is not None:
        raise ValueError(
            "trainer must compute its loss from its fused head, got label_smoothing_factor="
            f"{trainer.args.label_smoothing_factor}: TRL forms logits for it; set it to 0"
        )


def _names_of_forward(trainer: str, model: nn.Module) -> dict[str, Any]:
    """The globals of the ``forward`` that TRL gave to the model, beneath what has wrapped it since."""
    forward: Any = model.forward
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if isinstance(function, FunctionType) and FUNCTION in function.__code__.co_names:
            return function.__globals__
        forward = getattr(function, "__wrapped__", None)
    raise ValueError(
        f"trainer must have models with TRL's fused head, got a {trainer} with a {type(model).__name__} without one: "
        "it forms logits, or is of a TRL before 1.16 or of one that is unknown here"
    )


def _check_signature(own: Any) -> None:
    taken = tuple(inspect.signature(own.forward).parameters)[1:] if hasattr(own, "forward") else ()
    if taken != TAKEN:
        found = ", ".join(taken) or repr(own)
        raise ValueError(
            f"TRL's fused head must take {', '.join(TAKEN)}, got {found}: this TRL is unknown here; 1.16 is known"
        )


def _check_meaning(own: Any) -> None:
    """Compare TRL's function and ours, every output and gradient, on a few tokens with all that a head can have."""
    made = {"generator": torch.Generator("cpu").manual_seed(0), "dtype": torch.float32, "device": "cpu"}
    hidden, weight, bias = (torch.randn(*size, **made) for size in ((6, 4), (7, 4), (7,)))
    targets = (hidden @ weight.T + bias).argmax(1)
    targets[:3] = torch.tensor([0, 6, 3], device="cpu")
    for cap in (None, 1.5):
        try:
            with torch.device("cpu"):  # for what TRL makes
                theirs, ours = (
                    _tried(function, hidden, weight, bias, targets, cap) for function in (own, _Head(own, {}))
                )
        except Exception as error:
            raise ValueError(
                f"TRL's fused head must be known, got {type(error).__name__} when it was tried: {error}; 1.16 is known"
            ) from error
        for name, expected in theirs.items():
            difference = (ours[name].double() - expected.double()).abs().max().item()
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{name} of TRL's fused head must be known, got a difference of {difference:.1e} from what is "
                    "computed here: this TRL is unknown; 1.16 is known"
                )


def _tried(
    function: Any, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, cap: float | None
) -> dict[str, Tensor]:
    """Outputs and gradients, by name."""
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
    with torch.enable_grad():
        values = dict(zip(GIVEN, function.apply(*leaves, targets, 0.8, 4, cap, 0.7, GIVEN), strict=True))
        upstream = torch.linspace(-1, 1, targets.numel(), dtype=torch.float32, device="cpu")
        loss = (upstream * values["log_probs"] + upstream.flip(0) * values["entropy"]).sum()
        gradients = torch.autograd.grad(loss, leaves)
    named = dict(zip(("gradient of hidden", "gradient of weight", "gradient of bias"), gradients, strict=True))
    return {**{name: value.detach() for name, value in values.items()}, **named}
