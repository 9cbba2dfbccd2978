"""The two-stage pipeline in plain PyTorch: full logits, then the loss. What every test compares with.

Each function takes ``form``. ``"two_stage"`` goes through ``F.cross_entropy`` and ``F.log_softmax``, as users write it.
``"statistics"`` goes through the largest logit, the log-sum relative to it and the target's logit, the three numbers a
fused operator keeps of a row; the formulas are equal, their rounding is not (see ``tolerance``).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Literal["two_stage", "statistics"]


def logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """``cap(logit_scale * <x, w_v> + bias_v)`` for every token and vocabulary entry, ``[tokens, vocabulary]``."""
    if not torch.is_autocast_enabled("cpu"):
        dtype = torch.promote_types(input.dtype, linear_weight.dtype)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
    scores = F.linear(input, linear_weight).reshape(input.shape[:-1].numel(), len(linear_weight))
    if logit_scale != 1.0:
        scores = scores * logit_scale
    if linear_bias is not None:
        scores = scores + linear_bias.to(scores.dtype)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores


def token_losses(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weight: Tensor | None = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    form: Form = "two_stage",
) -> Tensor:
    """Each token's loss, 0 where ignored, in the shape of ``target``."""
    scores = logits(input, linear_weight, linear_bias, softcap=softcap, logit_scale=logit_scale)
    flat = target.flatten().long()
    class_weight = None if weight is None else weight.to(scores.dtype)
    if form == "two_stage":
        losses = F.cross_entropy(
            scores,
            flat,
            class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction="none",
        )
    else:
        losses = _losses_from_statistics(scores, flat, class_weight, ignore_index, label_smoothing)
    if z_loss:
        losses = losses + z_loss * scores.logsumexp(-1).square().masked_fill(flat == ignore_index, 0)
    if token_weight is not None:
        losses = losses * token_weight.flatten().to(losses.dtype)
    return losses.view(target.shape)


def _losses_from_statistics(
    scores: Tensor, target: Tensor, class_weight: Tensor | None, ignore_index: int, label_smoothing: float
) -> Tensor:
    ignored = target == ignore_index
    safe = target.masked_fill(ignored, 0)
    if class_weight is None:
        class_weight = scores.new_ones(scores.shape[1])
    below, log_sum = relative_to_peak(scores)
    nll = class_weight[safe] * (log_sum - below.gather(1, safe[:, None]).squeeze(1))
    smooth = class_weight.mean() * log_sum - (class_weight * below).mean(-1)
    return ((1 - label_smoothing) * nll + label_smoothing * smooth).masked_fill(ignored, 0)


def relative_to_peak(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, V] less the largest of their row, and [N] the log of the sum of their exponentials."""
    below = scores - scores.detach().amax(-1, keepdim=True)
    return below, below.exp().sum(-1).log()


def denominator(
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
) -> float:
    """What the sum of the tokens' losses is divided by: 1 unless the reduction is a mean."""
    if reduction != "mean":
        return 1.0
    if normalizer is not None:
        return float(normalizer)
    kept = target[target != ignore_index].long()
    return float(kept.numel() if weight is None else weight.double()[kept].sum())


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    normalizer: float | Tensor | None = None,
    **options,
) -> Tensor:
    losses = token_losses(input, linear_weight, target, weight=weight, ignore_index=ignore_index, **options)
    if reduction == "none":
        return losses
    divisor = denominator(target, weight=weight, reduction=reduction, ignore_index=ignore_index, normalizer=normalizer)
    return losses.sum() / divisor if divisor else losses.sum() * 0


def token_statistics(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    form: Form = "two_stage",
) -> dict[str, Tensor]:
    """``nll``, ``logsumexp`` and ``entropy`` of every token, 0 where ignored, in the shape of ``target``."""
    scores = logits(input, linear_weight, linear_bias, softcap=softcap, logit_scale=logit_scale)
    flat = target.flatten().long()
    ignored = flat == ignore_index
    logsumexp = scores.logsumexp(-1)
    if form == "two_stage":
        log_probability = F.log_softmax(scores, -1)
        nll = F.cross_entropy(scores, flat, ignore_index=ignore_index, reduction="none")
        entropy = -(log_probability.exp() * log_probability).sum(-1)
    else:
        below, log_sum = relative_to_peak(scores)
        nll = log_sum - below.gather(1, flat.masked_fill(ignored, 0)[:, None]).squeeze(1)
        entropy = log_sum - ((below - log_sum[:, None]).exp() * below).sum(-1)
    outputs = {"nll": nll, "logsumexp": logsumexp, "entropy": entropy}
    return {name: value.masked_fill(ignored, 0).view(target.shape) for name, value in outputs.items()}
