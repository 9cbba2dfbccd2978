"""A head and what is added to its logits, low-rank adapters above all, as one head."""

from __future__ import annotations

import torch
from torch import Tensor


def joined(
    parts: list[tuple[Tensor, Tensor, float]],  # [..., D_i], [V, D_i] and a factor each
) -> tuple[Tensor, Tensor]:
    """[..., sum D_i] hidden states and [V, sum D_i] weight whose product is the sum of the parts' products."""
    dtype = parts[0][1].dtype
    hidden = [part if factor == 1 else part * factor for part, _, factor in parts]
    widest = max((h.dtype for h in hidden), key=lambda d: d.itemsize)
    return torch.cat([h.to(widest) for h in hidden], -1), torch.cat([weight.to(dtype) for _, weight, _ in parts], 1)
