"""The ways from hidden states to the loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

import logitless
from logitless_demo.config import TrainConfig
from logitless_demo.data import GRADIENT_STREAM, derived_seed


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    step: int,
    config: TrainConfig,
    group: ProcessGroup | None = None,
    part: int = 0,
) -> Tensor:
    """Returns the mean loss of a batch by the head that `config` names.

    Args:
        hidden: `[N, D]`, float32 or bfloat16.
        weight: `[V, D]`, of the type of `hidden`.
        target: `[N]`, int64.
        step: seeds the sampled gradient, together with the run's seed.
        config: which head, its threshold and its scan.
        group: of the processes that the weight's rows are sharded over, if they are.
        part: number of this process's part of the data, of which each is sampled by itself.

    Returns:
        A float32 scalar.
    """
    if config.head == "two-stage":
        return two_stage(hidden, weight, target)
    if config.head == "compiled":
        return _compiled()(hidden, weight, target)
    if config.head == "exact":
        return logitless.linear_cross_entropy(hidden, weight, target, group=group)
    seed = derived_seed(config.seed + part, GRADIENT_STREAM, step)
    generator = torch.Generator(hidden.device).manual_seed(seed)
    gradient = logitless.Sampled(threshold=config.threshold, generator=generator, scan=config.scan)
    return logitless.linear_cross_entropy(hidden, weight, target, gradient=gradient, group=group)


def two_stage(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Returns the mean loss through logits `[N, V]`; arguments and result as in `head_loss`."""
    # In float32 as under autocast: a bfloat16 loss of 8 would be a multiple of 1/16.
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return torch.compile(two_stage, dynamic=False)  # on first use: the compiler takes a second to import
