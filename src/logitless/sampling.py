"""Which blocks of the vocabulary the sampled gradient keeps, and what weight they get.

A row's softmax puts mass ``m_b`` on block b (``options.BLOCK`` consecutive entries). Block b is kept with probability
``pi_b = min(1, m_b / threshold)`` and weighs ``1 / pi_b`` if kept, 0 if not, so that the expected weight is 1 wherever
there is mass. Selection is systematic: walk along the row, adding up ``pi``; block b is kept when the running sum,
started at the row's offset in [0, 1), passes an integer within it. That happens with probability exactly ``pi_b`` over
a uniform offset, and at most ``ceil(sum pi) <= 1 / threshold + 1`` times a row.

With a cap on the logits, label smoothing has a part that is not of rank one, ``d s_v (z_v / cap)^2``, with mass
wherever ``s`` has. Selection then goes by a mixture of the softmax and of ``s``, which sums to one as well.
"""

from __future__ import annotations

import math

import torch

from logitless.options import BLOCK

# Unit of running sums of probabilities.
SHIFT = 44
ONE = 2.0**SHIFT
# Share of the mixture that goes to the smoothing distribution. The softmax part's variance grows by at most 1 / 0.9.
SMOOTHING_SHARE = 0.1


def block_count(vocabulary: int) -> int:
    """Blocks in a vocabulary; the last may be narrower."""
    return math.ceil(vocabulary / BLOCK)


def kept_pairs_bound(tokens: int, vocabulary: int, threshold: float) -> int:
    """Most (row, block) pairs that can be listed: a row's sample, and its target's block."""
    return tokens * min(block_count(vocabulary), most_sampled(vocabulary, threshold) + 1)


def most_sampled(vocabulary: int, threshold: float) -> int:
    """Most blocks that a row's sample can hold; one more than the masses' sum allows, for their rounding."""
    return min(block_count(vocabulary), math.ceil(1 / threshold) + 1)


def block_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums over blocks of the last dimension: [R, V] or [V] -> [R, B] or [B]."""
    width = values.shape[-1]
    whole = width - width % BLOCK
    sums = values[..., :whole].unflatten(-1, (-1, BLOCK)).sum(-1)
    if whole < width:
        sums = torch.cat((sums, values[..., whole:].sum(-1, keepdim=True)), -1)
    return sums


def mix_in_smoothing(
    masses: torch.Tensor,  # [R, B]
    smoothing: torch.Tensor | float,  # [V] or one number
    vocabulary: int,
) -> torch.Tensor:
    """[R, B] masses of the mixture to sample from when logits are capped and labels smoothed."""
    return masses * (1 - SMOOTHING_SHARE) + block_shares(smoothing, vocabulary, masses.device) * SMOOTHING_SHARE


def block_shares(smoothing: torch.Tensor | float, vocabulary: int, device: torch.device) -> torch.Tensor:
    """[B] float64 share of each block in the smoothing [V] or one number for all."""
    if not isinstance(smoothing, torch.Tensor):
        smoothing = torch.full((vocabulary,), smoothing, dtype=torch.float64, device=device)
    share = block_sums(smoothing.abs().double())
    return share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)


def inclusion_weights(
    masses: torch.Tensor,  # [R, B]
    threshold: float,
    uniforms: torch.Tensor,  # [R]
) -> torch.Tensor:
    """[R, B] float64 weights: inverse inclusion probability where a block is kept, 0 where it is not, or no number.

    Sums are of integers in units of 2^-44: with a thousand blocks a float32 running sum would be off by more than the
    probability of a small block, and sums of integers have no order.
    """
    probability = (masses.double() / threshold).clamp_(max=1.0).nan_to_num_(0.0)
    passed = (probability * ONE).long().cumsum(1).add_((uniforms.double() * ONE).long()[:, None]) >> SHIFT
    first = passed[:, :1] > 0
    kept = torch.cat((first, passed[:, 1:] > passed[:, :-1]), 1)
    return torch.where(kept, 1 / probability, 0.0)


def poisoned_rows(
    logsumexp: torch.Tensor,  # [N]
    a: torch.Tensor,  # [N]
    valid_mask: torch.Tensor | None,  # [N] bool
) -> torch.Tensor:
    """[N] which rows' gradients of logits are NaN: all of the weight's gradient is to be, as of exact gradients.

    Such a row has no masses to choose blocks by, and lists its target's alone. ``a`` is the coefficient of the softmax.
    """
    poisoned = ~logsumexp.isfinite() | a.isnan()
    return poisoned if valid_mask is None else poisoned & valid_mask
