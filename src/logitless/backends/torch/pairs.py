"""Pairs of a row and a vocabulary block: what the sampled gradient keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Pairs of one block that are computed at a time; bounds the gathered rows of a block that every row keeps.
GROUP_ROWS = 1024


@dataclass(frozen=True)
class Pairs:
    """What the sampled gradient keeps: pairs of a row and a vocabulary block, grouped by block.

    Attributes:
        rows: [P] int32 row of each pair; ascending within a block, so no row twice.
        weights: [P] inverse inclusion probability; 0 where the block is listed for its target alone.
        shares: [P] the block's share of the row's sum of exponentials.
        starts: [B + 1]: the pairs of block b are ``starts[b]`` to ``starts[b + 1]``.
    """

    rows: torch.Tensor
    weights: torch.Tensor
    shares: torch.Tensor
    starts: torch.Tensor
