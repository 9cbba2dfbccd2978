"""In what precision a call computes, whatever the surroundings allow their own products."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

# Of `torch.backends.cuda.matmul`: whether products of 16-bit operands may add up in fewer digits than fp32 has. The
# first two are on by default, and let the library cut a long sum into parts and round each before it adds them: the
# gradient of a small shard, few rows and many terms, then has twice the error of the whole's.
FEWER_DIGITS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


_lock = threading.Lock()
_within = 0
_allowed: list[str] = []


@contextlib.contextmanager
def full_precision_accumulation(device: torch.device) -> Iterator[None]:
    """Within, autocast is off, and products of 16-bit operands add up in fp32 throughout.

    The settings are the process's: they are off until the last of the threads that are within is out.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        _enter()
        try:
            yield
        finally:
            _leave()


def _enter() -> None:
    global _within
    with _lock:
        if _within == 0:
            _allowed[:] = [name for name in FEWER_DIGITS if getattr(torch.backends.cuda.matmul, name)]
            _set(False)
        _within += 1


def _leave() -> None:
    global _within
    with _lock:
        _within -= 1
        if _within == 0:
            _set(True)


def _set(value: bool) -> None:
    for name in _allowed:
        setattr(torch.backends.cuda.matmul, name, value)
