"""A small decoder in the manner of today's large ones: RMSNorm, rotary attention, SwiGLU, tied embedding.

It returns hidden states, not logits: what is made of them is the business of the caller's head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from logitless_demo.config import ModelConfig

ROTARY_BASE = 10_000.0
INITIAL_STD = 0.02


def rotation(positions: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Returns the cosines and sines that rotary attention turns queries and keys by.

    Args:
        positions: `[T]`, of any real type.
        size: numbers an attention head has; even.

    Returns:
        Two tensors `[T, size / 2]`, float32.
    """
    exponent = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    angle = positions.float()[:, None] * ROTARY_BASE**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the pairs (i, i + size / 2) of each head by the angle of its position.

    Args:
        x: `[..., T, size]`, queries or keys.
        turn: what `rotation` returned for the same T and size.

    Returns:
        `[..., T, size]`, of the type of `x`.
    """
    cosine, sine = turn
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).type_as(x)


class Attention(nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size = config.hidden // config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden, bias=False)
        self.out = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        # Head by head, so that some of the rows of the weight are some of the heads.
        query, key, value = self.qkv(x).unflatten(-1, (-1, 3, self.size)).permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(rotate(query, turn), rotate(key, turn), value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU, 8/3 as wide inside as outside, rounded up to a multiple of 64."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        inner = 64 * math.ceil(config.hidden * 8 / 3 / 64)
        self.gate_and_up = nn.Linear(config.hidden, 2 * inner, bias=False)
        self.out = nn.Linear(inner, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        gate, up = self.gate_and_up(x).unflatten(-1, (-1, 2)).unbind(-1)
        return self.out(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention, then feed-forward, each on a normalised residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.attention = Attention(config)
        self.feedforward_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.feedforward = FeedForward(config)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """Maps `[B, T, D]` to `[B, T, D]`."""
        x = x + self.attention(self.attention_norm(x), turn)
        return x + self.feedforward(self.feedforward_norm(x))


class Decoder(nn.Module):
    """Token ids to hidden states.

    Args:
        config: the sizes.
        vocabulary: rows V of the embedding, which is the head's weight too.
        sequence: tokens of the longest sequence.
        seed: of the initial weights; the same seed gives the same weights on every device.
    """

    cosine: Tensor
    sine: Tensor

    def __init__(self, config: ModelConfig, vocabulary: int, sequence: int, seed: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # whose generator draws the weights
            self.embedding = nn.Embedding(vocabulary, config.hidden)
            self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
            # In memory, since a compiler would compute them anew for every number that is turned.
            cosine, sine = rotation(torch.arange(sequence), config.hidden // config.heads)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What is added to the residual stream starts smaller, so that its size does not grow with the depth.
                std = INITIAL_STD / math.sqrt(2 * config.layers) if name.endswith("out.weight") else INITIAL_STD
                nn.init.normal_(parameter, std=std, generator=generator)

    @property
    def head_weight(self) -> Tensor:
        """The head's weight `[V, D]`, tied to the embedding."""
        return self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns hidden states.

        Args:
            tokens: `[B, T]`, int64, T no more than the longest sequence.

        Returns:
            `[B, T, D]`: row t has seen the tokens up to and including t.
        """
        length = tokens.shape[1]
        turn = self.cosine[:length], self.sine[:length]
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, turn)
        return self.norm(x)
