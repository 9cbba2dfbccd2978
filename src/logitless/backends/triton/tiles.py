"""Tile configurations by GPU architecture: the only place that knows a GPU. Those of sm90, Hopper, are measured.

Constraints that every entry must meet:

- ``columns`` is the same for the kernels ``scan``, ``store`` and ``window`` of one architecture and operand width: the
  table of block sums is made by one kernel and read by another. It is a multiple of ``options.BLOCK``.
- Of the products over pairs one side is a block of the vocabulary: ``pairs`` has ``rows`` pairs by a block,
  ``pair_weight`` a block by ``columns`` of the hidden size in steps of ``depth`` pairs, and ``pair_hidden`` the rows of
  ``pairs`` by ``columns`` of the hidden size, ``group`` times before the next tile. What is not named is not free.
- Operands of ``stages`` steps, and the tile that a storing kernel stages, fit shared memory (227 KiB on sm90).
- ``depth`` times the operands' width is at least 64 bytes, the row of a shared-memory bank pattern.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from triton import knobs

from logitless.options import BLOCK

Kind = Literal["scan", "store", "window", "pairs", "pair_weight", "pair_hidden"]
Architecture = Literal["sm80", "sm90", "sm100", "interpreter"]

KINDS: tuple[Kind, ...] = get_args(Kind)

TUNED_FILE = "LOGITLESS_TILES"
"""Environment variable that names a table written by ``logitless tune``."""


@dataclass(frozen=True)
class Tile:
    """How a product is cut up.

    Attributes:
        rows: of the tile of logits.
        columns: of the tile of logits.
        depth: of one step along the hidden size.
        group: row tiles that go down before the next column tile.
        warps: of a program.
        stages: steps of operands in flight.
    """

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int


# Small enough for 99 KiB of shared memory.
UNMEASURED: dict[int, dict[Kind, Tile]] = {
    1: {"scan": Tile(64, 128, 64, 8, 4, 3)},
    2: {**dict.fromkeys(KINDS, Tile(64, 128, 32, 8, 4, 3)), "pair_hidden": Tile(64, 64, BLOCK, 4, 4, 2)},
    4: {**dict.fromkeys(KINDS, Tile(64, 128, 16, 8, 8, 2)), "pair_hidden": Tile(64, 32, BLOCK, 4, 8, 2)},
}

# Architecture -> operand bytes -> kernel -> tile. Operands of one byte are those of the scan in eight bits alone.
TILES: dict[Architecture, dict[int, dict[Kind, Tile]]] = {
    "sm90": {
        1: {"scan": Tile(128, 256, 128, 16, 8, 4)},  # not measured
        2: {
            "scan": Tile(128, 256, 64, 32, 8, 4),
            "store": Tile(128, 256, 64, 32, 8, 3),
            "window": Tile(128, 256, 64, 32, 8, 3),
            "pairs": Tile(64, BLOCK, 64, 1, 4, 4),
            "pair_weight": Tile(BLOCK, 64, 32, 1, 4, 2),
            "pair_hidden": Tile(64, 64, BLOCK, 4, 8, 1),
        },
        4: {
            "scan": Tile(128, 128, 32, 16, 8, 3),
            "store": Tile(128, 128, 32, 16, 8, 2),
            "window": Tile(128, 128, 32, 16, 8, 2),
            "pairs": Tile(64, BLOCK, 32, 1, 4, 3),
            "pair_weight": Tile(BLOCK, 128, 32, 1, 8, 2),
            "pair_hidden": Tile(64, 64, BLOCK, 4, 8, 2),
        },
    },
    "sm80": UNMEASURED,
    "sm100": UNMEASURED,
    # Triton's interpreter: several tiles even of small problems.
    "interpreter": {
        1: {"scan": Tile(16, 128, 32, 2, 4, 1)},
        **{
            itemsize: {
                **dict.fromkeys(KINDS, Tile(16, 128, 16, 2, 4, 1)),
                "pair_weight": Tile(BLOCK, 32, 16, 1, 4, 1),
                "pair_hidden": Tile(16, 16, BLOCK, 2, 4, 1),
            }
            for itemsize in (2, 4)
        },
    },
}

INTERPRETER_PROGRAMS = 3


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(knobs.runtime.interpret)


@functools.lru_cache
def architecture(index: int | None) -> Architecture:
    """That of a CUDA device, None for the interpreter's: sm90 for Hopper, sm100 for data centers' Blackwell.

    All others go by sm80: consumers' Blackwell, too, has no more than 99 KiB of shared memory.
    """
    if index is None:
        return "interpreter"
    major, _ = torch.cuda.get_device_capability(index)
    return "sm90" if major == 9 else "sm100" if major == 10 else "sm80"


def measured(index: int | None) -> bool:
    """Whether the tiles for a device were measured on its architecture, by us or by ``logitless tune``."""
    name = architecture(index)
    return name in ("sm90", "interpreter") or name in tuned()


@functools.lru_cache
def has_fp8_mma(index: int | None) -> bool:
    """Whether a device has tensor cores for e4m3 operands; the interpreter multiplies anything."""
    return index is None or torch.cuda.get_device_capability(index) >= (8, 9)


@functools.lru_cache
def num_sms(index: int | None) -> int:
    """How many persistent programs fill the device."""
    return INTERPRETER_PROGRAMS if index is None else torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache
def tuned() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    """The table that the environment names: architecture -> operand bytes -> kernel -> sizes; empty where it does not.

    Raises:
        OSError: there is no such file.
        ValueError: it is no table, or has architectures that are not known.
    """
    path = os.environ.get(TUNED_FILE)
    if not path:
        return {}
    try:
        table = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{TUNED_FILE}={path} must be a table of `logitless tune`, got no JSON ({error})") from error
    if unknown := sorted(table.keys() - TILES.keys()):
        raise ValueError(
            f"{TUNED_FILE}={path} must name architectures among {', '.join(sorted(TILES))}, got {', '.join(unknown)}: "
            f"run `logitless tune` again"
        )
    return table


@functools.lru_cache
def tile(kind: Kind, itemsize: int, index: int | None) -> Tile:
    """The tile of a kernel for operands of that many bytes on that device."""
    name = architecture(index)
    sizes = tuned().get(name, {}).get(str(itemsize), {}).get(kind)
    return TILES[name][itemsize][kind] if sizes is None else Tile(**sizes)


def device_index(device: torch.device) -> int | None:
    """Index of a CUDA device, None for the interpreter's."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
