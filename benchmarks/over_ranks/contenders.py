"""Ways to compute the loss of a vocabulary in shards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from over_ranks.problems import Problem, bounds
from over_ranks.processes import Member
from torch import Tensor

import logitless
from logitless.bench.peers import PEERS, Loss, two_stage


class TwoStageInShards(torch.autograd.Function):
    """Logits of this rank's shard by torch; row statistics merged by all-reduces, as frameworks for training do it.

    The hidden gradient is all-reduced in its own dtype while the weight's is multiplied.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, parts: Parts) -> Tensor:
        logits, shares, at_target = parts.statistics(hidden, weight, target, parts.first)
        peak = shares.clone()
        parts.all_reduce(peak, dist.ReduceOp.MAX)()
        sums = torch.stack(((shares - peak).exp(), at_target))
        parts.all_reduce(sums)()
        logsumexp = peak + sums[0].log()
        ctx.parts = parts
        ctx.save_for_backward(hidden, weight, target, logits, logsumexp)
        return (logsumexp - sums[1]).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, target, logits, logsumexp = ctx.saved_tensors
        parts: Parts = ctx.parts
        gradient = parts.gradient(logits, logsumexp, target, upstream[0] / len(target), parts.first)
        hidden_gradient = gradient @ weight
        arrive = parts.all_reduce(hidden_gradient)
        weight_gradient = gradient.T @ hidden
        arrive()
        return hidden_gradient, weight_gradient, None, None


def shard_statistics(hidden: Tensor, weight: Tensor, target: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, V / t] logits, [N] their log-sum-exp, [N] the target's logit, 0 where it lies elsewhere."""
    logits = F.linear(hidden, weight)
    index = target - first
    inside = (index >= 0) & (index < weight.shape[0])
    at_target = logits.gather(1, torch.where(inside, index, 0)[:, None])[:, 0].float()
    return logits, logits.float().logsumexp(1), torch.where(inside, at_target, 0.0)


def shard_gradient(logits: Tensor, logsumexp: Tensor, target: Tensor, scale: Tensor, first: int) -> Tensor:
    """[N, V / t] the gradient of the logits, in their place."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    softmax = (logits.float() - logsumexp[:, None]).exp()
    one_hot = columns[None, :] == (target - first)[:, None]
    return logits.copy_((softmax - one_hot.float()) * scale)


@dataclass(frozen=True)
class Parts:
    """What a rank does by itself in `TwoStageInShards`, compiled or not, and where its shard begins."""

    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., Tensor]
    first: int
    group: dist.ProcessGroup | None

    def all_reduce(self, tensor: Tensor, kind: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Callable[[], object]:
        """Begins one; what it returns waits for it."""
        if self.group is None:
            return lambda: None
        work = dist.all_reduce(tensor, kind, group=self.group, async_op=True)
        assert work is not None
        return work.wait


def load_two_stage_in_shards(problem: Problem, member: Member, compiled: bool) -> Loss:
    torch.compiler.reset()  # shapes of earlier problems count against the limit of recompilations
    wrap = functools.partial(torch.compile, dynamic=False) if compiled else lambda function: function
    first = bounds(problem.vocabulary, member.ranks)[member.rank]
    parts = Parts(wrap(shard_statistics), wrap(shard_gradient), first, member.group)
    return lambda hidden, weight, target: TwoStageInShards.apply(hidden, weight, target, parts)  # type: ignore


def load_two_stage(problem: Problem, member: Member, compiled: bool) -> Loss:
    return PEERS["torch.compile"].load() if compiled else two_stage


def load_exact(problem: Problem, member: Member, compiled: bool) -> Loss:
    return functools.partial(logitless.linear_cross_entropy, group=member.group)


def load_fastest(problem: Problem, member: Member, compiled: bool) -> Loss:
    """With room for this rank's logits once, and what goes with them."""
    logits = 2 * problem.tokens * -(-problem.vocabulary // member.ranks)
    room = logits * 11 // 10 + (256 << 20)
    return functools.partial(logitless.linear_cross_entropy, group=member.group, workspace=room)


def load_sampled(problem: Problem, member: Member, compiled: bool) -> Loss:
    return functools.partial(logitless.linear_cross_entropy, group=member.group, gradient=logitless.Sampled())


@dataclass(frozen=True)
class Contender:
    """A way to compute the loss.

    Attributes:
        name: how the reports call it.
        load: makes it, for a problem, a rank, and compiled or not.
        peaked: whether on the peaked inputs.
        alone: whether it serves one rank only.
        model: under which name `scaling.py` knows its gradient, if it does.
        look: its colour and marker.
    """

    name: str
    load: Callable[[Problem, Member, bool], Loss]
    look: tuple[str, str]
    peaked: bool = False
    alone: bool = False
    model: str | None = None


# Colours from Okabe and Ito's palette, as in the other figures.
CONTENDERS = (
    Contender("two-stage", load_two_stage, ("#8a919a", "D"), alone=True),
    Contender("two-stage in shards", load_two_stage_in_shards, ("#8a919a", "s")),
    Contender("logitless exact", load_exact, ("#0072b2", "o"), model="exact"),
    Contender("logitless exact fastest", load_fastest, ("#56b4e9", "o"), model="exact"),
    Contender("logitless sampled, flat", load_sampled, ("#e69f00", "o"), model="sampled"),
    Contender("logitless sampled, peaked", load_sampled, ("#d55e00", "o"), peaked=True, model="sampled"),
)
AGAINST = "two-stage in shards"
