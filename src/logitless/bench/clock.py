"""What is timed, and how many seconds it takes on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Runs:
    """What is timed of one contender.

    Attributes:
        forward: the loss alone, without gradients.
        both: loss and gradients.
    """

    forward: Callable[[], Any]
    both: Callable[[], Any]


# Some 10 ms of a GPU's clock: longer than any contender takes to enqueue its work.
BUSY_CYCLES = 20_000_000


def seconds(run: Callable[[], Any], device: torch.device, before: Callable[[], None] = lambda: None) -> float:
    """Seconds from the start of ``run`` to the end of all it set going; its result is freed after the clock stops.

    On a GPU between two events on the current stream, behind work that keeps the device busy while the host enqueues,
    as in training, where the host runs ahead; whoever waits for the device on the way pays for that. ``before`` is
    called last before the clock starts, behind that work.
    """
    if device.type != "cuda":
        before()
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
        del result
        return elapsed
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(BUSY_CYCLES)
    before()
    first.record()
    result = run()
    last.record()
    last.synchronize()
    del result
    return first.elapsed_time(last) / 1e3
