"""Most memory that a call holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes live at once during ``run`` above those live before.

    On a GPU as PyTorch's allocator counts them, on a CPU as its profiler does.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = run()
        del result
    live = peak = 0
    for event in _allocations(profiler):
        live += event
        peak = max(peak, live)
    return peak


def _allocations(profiler: torch.profiler.profile) -> list[int]:
    """Sizes of allocations, and of frees as negative numbers, in order of time."""
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    found: list[tuple[int, int]] = []

    def walk(events: list[Any]) -> None:
        for event in events:
            if event.tag.name == "Allocation":
                found.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(profiler.profiler.kineto_results.experimental_event_tree())
    return [size for _, size in sorted(found, key=lambda pair: pair[0])]
