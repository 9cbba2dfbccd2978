"""In what precision a call computes, whatever the surroundings allow their own products."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Within, autocast is off, and products of 16-bit operands add up in fp32 throughout.

    The settings are the process's. Threads that are within at the same time leave them as they were.
    """
    products = torch.backends.cuda.matmul
    allowed = [name for name in FEWER_DIGITS if getattr(products, name)] if device.type == "cuda" else []
    for name in allowed:
        setattr(products, name, False)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for name in allowed:
            setattr(products, name, True)
