"""A trained model's last hidden states and head, from a file.

The file is what ``torch.save`` writes of a dictionary with ``hidden`` [N, d], ``labels`` [N], and the head either as
``weight`` [V, d] or as ``q8`` [V, d / 32 * 34], the bytes of the Q8_0 format: for each 32 weights an fp16 scale and 32
signed bytes.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path

import torch

from logitless.errors import InputError

Q8_GROUP = 32
Q8_BYTES = 2 + Q8_GROUP


@dataclass(frozen=True)
class TrainedHead:
    """Attributes: hidden [N, d] fp32, weight [V, d] fp32, target [N] int64."""

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor


def load_trained_head(path: Path) -> TrainedHead:
    """Read the file.

    Raises:
        InputError: there is no such file, or it does not hold what it should.
    """
    if not path.is_file():
        raise InputError(f"--trained-head: there is no file {path}: give an existing one")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"--trained-head: {path} is no file of torch.save that can be read ({reason})") from error
    if (
        not isinstance(content, dict)
        or not {"hidden", "labels"} <= content.keys()
        or not {"weight", "q8"} & content.keys()
        or not all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        raise InputError(f"--trained-head: {path} must hold tensors 'hidden', 'labels', and 'weight' or 'q8'")
    if "weight" not in content:
        _check_q8(path, content["q8"])
    weight = content["weight"].float() if "weight" in content else dequantize_q8(content["q8"])
    head = TrainedHead(content["hidden"].float(), weight, content["labels"].long())
    _check_shapes(path, head)
    return head


def _check_q8(path: Path, packed: torch.Tensor) -> None:
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] % Q8_BYTES:
        expected = f"uint8 [V, d / {Q8_GROUP} * {Q8_BYTES}]"
        raise InputError(f"--trained-head: 'q8' of {path} must be {expected}, got {packed.dtype} {list(packed.shape)}")


def _check_shapes(path: Path, head: TrainedHead) -> None:
    hidden, weight, target = head.hidden, head.weight, head.target
    fits = hidden.ndim == weight.ndim == 2 and hidden.shape[1] == weight.shape[1] and target.ndim == 1
    if not fits or not 0 < hidden.shape[0] == target.shape[0]:
        raise InputError(
            f"--trained-head: {path} must hold hidden [N, d], labels [N] and weight [V, d], got {list(hidden.shape)}, "
            f"{list(target.shape)} and {list(weight.shape)}"
        )
    if not 0 <= int(target.min()) <= int(target.max()) < weight.shape[0]:
        raise InputError(f"--trained-head: labels of {path} must lie in [0, {weight.shape[0]}), as its weight has rows")


def dequantize_q8(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [V, d / 32 * 34] -> fp32 [V, d]."""
    groups = packed.unflatten(1, (-1, Q8_BYTES))
    scale = groups[..., :2].contiguous().view(torch.float16).float()
    return (groups[..., 2:].contiguous().view(torch.int8).float() * scale).flatten(1)


def grow(
    weight: torch.Tensor,  # [V', d]
    vocabulary: int,
) -> torch.Tensor:
    """[V, d] a head of at least that many entries: further rows are the given ones at half their length.

    Their logits are half as large, so that they hold little of the mass, spread over many blocks, as rare tokens do.
    """
    missing = max(0, vocabulary - weight.shape[0])
    return torch.cat([weight, (weight / 2).repeat(-(-missing // weight.shape[0]), 1)[:missing]])


def widen(
    hidden: torch.Tensor,  # [N, d]
    weight: torch.Tensor,  # [V, d]
    width: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same logits at a larger hidden size: both operands times one [d, width] matrix of orthonormal rows.

    Raises:
        ValueError: ``width`` is below d.
    """
    narrow = hidden.shape[1]
    if width < narrow:
        raise ValueError(f"width must be at least the head's own, {narrow}, got {width}")
    if width == narrow:
        return hidden, weight
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randn(width, narrow, generator=generator, dtype=torch.float32, device="cpu")
    rotation = torch.linalg.qr(drawn).Q.T.to(hidden.device)
    return hidden @ rotation, weight @ rotation
