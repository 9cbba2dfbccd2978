"""Whether a patched model's loss and gradients are those of its own logits: tried on a small batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logitless.integrations.deferred import weight_size
from logitless.integrations.forwards import State, Trial
from logitless.integrations.moment import parameters_of

# Shape of the batch that a patch is tried on, and how many of each sequence's labels are ignored.
TRIED, IGNORED = (2, 8), 3


@dataclass(frozen=True)
class Agreement:
    """Of a model with logits and without.

    Attributes:
        softcap: that of the logits, or None.
        logit_scale: of the products.
        loss_error: relative difference of the losses.
        gradient_error: the largest relative difference of gradients.
    """

    softcap: float | None
    logit_scale: float
    loss_error: float
    gradient_error: float


def agreement(model: nn.Module, state: State, example: Mapping[str, Any] | None) -> Agreement:
    """That on the example, or on random tokens.

    Raises:
        ValueError: it is not good enough, or could not be tried.
    """
    name = type(model).__name__
    with _quietly(model, state):
        given = _example(model, state) if example is None else dict(example)
        given.setdefault("use_cache", False)
        exact = {"gradient": "exact", "z_loss": 0.0, "label_smoothing": 0.0}
        plain = _tried(model, state, given, Trial(deferred=False))
        kept, state.options = state.options, {**state.options, **exact}
        trial = Trial(deferred=True)
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
    return Agreement(bound, scale, loss_error, gradient_error)


@dataclass(frozen=True)
class _Outcome:
    """Of one forward pass: its loss, gradients by place, and the largest logit."""

    loss: Tensor
    gradients: list[Tensor | None]
    largest: float


def _tried(model: nn.Module, state: State, given: dict[str, Any], trial: Trial) -> _Outcome:
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
    parameters = [parameter for parameter, _ in parameters_of(state.heads.values())]
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


def _allowed(state: State, plain: _Outcome) -> float:
    """What rounding may do to a gradient.

    It is rounded to the dtype of its tensor. Logits are in fp32; a few roundings of the size of the largest move its
    share of the softmax as much.
    """
    eps = max(torch.finfo(head.weight.dtype).eps for head in state.heads.values())
    return eps + 16 * torch.finfo(torch.float32).eps * (1 + plain.largest)


def _example(model: nn.Module, state: State) -> dict[str, Any]:
    """Random tokens, none of them special, and labels of which some are ignored."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    sizes = [text.vocab_size, *(weight_size(head)[0] for head in state.heads.values())]
    if embedding.weight.ndim == 2 and embedding.weight.shape[0]:  # not flattened or emptied while it is sharded
        sizes.append(embedding.weight.shape[0])
    vocabulary = min(sizes)
    special = {
        v for c in (config, text) for k, v in vars(c).items() if k.endswith(("_id", "_index")) and isinstance(v, int)
    }
    usual = [token for token in range(vocabulary) if token not in special] or [0]
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randint(len(usual), TRIED, generator=generator, device="cpu")
    tokens = torch.tensor(usual, device="cpu")[drawn].to(embedding.weight.device)
    labels = tokens.clone()
    labels[:, :IGNORED] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@contextmanager
def _quietly(model: nn.Module, state: State) -> Iterator[None]:
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
