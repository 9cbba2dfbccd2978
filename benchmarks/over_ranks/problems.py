"""Heads and their inputs: flat logits, and logits as peaked as those of a trained model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from over_ranks.processes import Member
from torch import Tensor

import logitless
from logitless.bench.cases import Inputs
from logitless.options import BLOCK
from logitless.sampling import block_sums

THRESHOLD = logitless.Sampled().threshold
# Blocks that a peaked head is to keep a token, as trained models' do, and tokens that are looked at for it.
KEPT, LOOKED_AT = 17, 512


@dataclass(frozen=True)
class Problem:
    """A head by its sizes: tokens N, hidden D, vocabulary V."""

    name: str
    tokens: int
    hidden: int
    vocabulary: int


PROBLEMS = (Problem("llama3", 8192, 4096, 128_256), Problem("gemma-long", 32_768, 2304, 262_144))
TOYS = (Problem("toy", 96, 64, 2048), Problem("toy-wide", 192, 32, 4096))


@dataclass(frozen=True)
class Settings:
    """What is the same for all measurements."""

    kind: str  # of device: cpu or cuda
    rounds: int
    compile: bool
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """Inputs of one kind, with the whole weight; how far the hidden states were scaled, and blocks kept a token."""

    inputs: Inputs
    scale: float
    kept: float


def bounds(vocabulary: int, ranks: int) -> list[int]:
    """Where each rank's rows of the weight begin, and the end."""
    return [vocabulary * rank // ranks for rank in range(ranks + 1)]


def flat(problem: Problem, member: Member, seed: int) -> Drawn:
    """Standard normal hidden states, weight scaled by 1 / sqrt(D): logits of standard deviation 1."""
    device, dtype = member.device, torch.bfloat16
    random = torch.Generator(device).manual_seed(seed)
    inputs = Inputs(
        torch.empty(problem.tokens, problem.hidden, dtype=dtype, device=device).normal_(generator=random),
        torch.empty(problem.vocabulary, problem.hidden, dtype=dtype, device=device).normal_(
            std=problem.hidden**-0.5, generator=random
        ),
        torch.randint(problem.vocabulary, (problem.tokens,), generator=random, device=device),
    )
    for tensor in (inputs.hidden, inputs.weight, inputs.target):
        member.broadcast(tensor)
    return Drawn(inputs, 1.0, kept_blocks(logits_of(inputs, slice(0, LOOKED_AT)), inputs.target))


def peaked(of: Inputs, member: Member, seed: int) -> Drawn:
    """The same with hidden states so large that a token keeps as many blocks as a trained model's; likely targets."""
    logits = logits_of(of, slice(0, LOOKED_AT))
    wanted = min(KEPT, logits.shape[1] // BLOCK / 2)
    low, high, scale = 1.0, 64.0, 8.0
    for _ in range(20):
        probability = (block_sums((logits * scale).softmax(1)) / THRESHOLD).clamp_(max=1)
        low, high = (scale, high) if float(probability.sum(1).mean()) > wanted else (low, scale)
        scale = (low * high) ** 0.5
    del logits
    scale = float(member.broadcast(torch.tensor(scale, dtype=torch.float64, device=member.device)))
    inputs = replace(of, hidden=of.hidden * scale, target=torch.empty_like(of.target))
    random = torch.Generator(member.device).manual_seed(seed)
    for first in range(0, len(inputs.target), LOOKED_AT):
        rows = slice(first, first + LOOKED_AT)
        inputs.target[rows] = logits_of(inputs, rows).softmax(1).multinomial(1, generator=random)[:, 0]
    member.broadcast(inputs.target)
    return Drawn(inputs, scale, kept_blocks(logits_of(inputs, slice(0, LOOKED_AT)), inputs.target))


def logits_of(inputs: Inputs, rows: slice) -> Tensor:
    """[rows, V] in fp32."""
    return (inputs.hidden[rows] @ inputs.weight.T).float()


def kept_blocks(logits: Tensor, target: Tensor) -> float:
    """Blocks that a token lists on one rank, expected: its sample, and its target's where that is not in it."""
    probability = (block_sums(logits.softmax(1)) / THRESHOLD).clamp_(max=1)
    own = probability.gather(1, target[: len(logits), None] // BLOCK)[:, 0]
    return float((probability.sum(1) + 1 - own).mean())
