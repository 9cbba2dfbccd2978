"""In what precision a call computes, whatever the surroundings allow their own products."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Within, autocast is off, and products of 16-bit operands add up in fp32 throughout.

    PyTorch by default lets the GPU's library cut a long sum in pieces and round each before it adds them: a shard's
    gradient, a product of few rows and many terms, then has twice the error of the whole's.
    """
    with torch.autocast(device.type, enabled=False), contextlib.ExitStack() as settings:
        if device.type == "cuda":
            for dtype in ("bf16", "fp16"):
                settings.enter_context(_sums_unrounded(f"allow_{dtype}_reduced_precision_reduction"))
        yield


@contextlib.contextmanager
def _sums_unrounded(setting: str) -> Iterator[None]:
    """With one of PyTorch's settings off. Threads that do so at the same time leave it as it was."""
    products = torch.backends.cuda.matmul
    if not getattr(products, setting):
        yield
        return
    setattr(products, setting, False)
    try:
        yield
    finally:
        setattr(products, setting, True)
