"""Tile configurations, measured, per GPU generation: the only place that knows a GPU.

Constraints that every entry must meet:

- ``columns`` is the same for the kernels ``scan``, ``store`` and ``window`` of one generation and operand width: the
  table of block sums is made by one kernel and read by another. It is a multiple of ``options.BLOCK``.
- Of the products over pairs one side is a block of the vocabulary: ``pairs`` has ``rows`` pairs by a block,
  ``pair_weight`` a block by ``columns`` of the hidden size in steps of ``depth`` pairs, and ``pair_hidden`` the rows of
  ``pairs`` by ``columns`` of the hidden size, ``group`` times before the next tile. What is not named is not free.
- Operands of ``stages`` steps, and the tile that a storing kernel stages, fit shared memory (227 KiB on Hopper).
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


# Generation -> operand bytes -> kernel -> tile. Operands of one byte are those of the scan in eight bits alone.
TILES: dict[str, dict[int, dict[Kind, Tile]]] = {
    "hopper": {
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
    # Other GPUs: small enough for 99 KiB of shared memory. Not measured.
    "other": {
        1: {"scan": Tile(64, 128, 64, 8, 4, 3)},
        2: {**dict.fromkeys(KINDS, Tile(64, 128, 32, 8, 4, 3)), "pair_hidden": Tile(64, 64, BLOCK, 4, 4, 2)},
        4: {**dict.fromkeys(KINDS, Tile(64, 128, 16, 8, 8, 2)), "pair_hidden": Tile(64, 32, BLOCK, 4, 8, 2)},
    },
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
def generation(index: int | None) -> str:
    """Name of the generation of a CUDA device; None for the interpreter's."""
    if index is None:
        return "interpreter"
    return "hopper" if torch.cuda.get_device_capability(index)[0] == 9 else "other"


@functools.lru_cache
def multiplies_eight_bits(index: int | None) -> bool:
    """Whether a device has matrix units for e4m3 operands; the interpreter multiplies anything."""
    return index is None or torch.cuda.get_device_capability(index) >= (8, 9)


@functools.lru_cache
def processors(index: int | None) -> int:
    """How many persistent programs fill the device."""
    return INTERPRETER_PROGRAMS if index is None else torch.cuda.get_device_properties(index).multi_processor_count


@functools.lru_cache
def _tuned() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    path = os.environ.get(TUNED_FILE)
    return json.loads(Path(path).read_text()) if path else {}


@functools.lru_cache
def tile(kind: Kind, itemsize: int, index: int | None) -> Tile:
    """The tile of a kernel for operands of that many bytes on that device."""
    name = generation(index)
    tuned = _tuned().get(name, {}).get(str(itemsize), {}).get(kind)
    return TILES[name][itemsize][kind] if tuned is None else Tile(**tuned)


def device_index(device: torch.device) -> int | None:
    """Index of a CUDA device, None for the interpreter's."""
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index
