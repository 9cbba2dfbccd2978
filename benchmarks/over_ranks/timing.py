"""Time of one call on a rank's stream, and the share of it that collectives take."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from over_ranks.processes import Member

from logitless.bench import clock


def timed(run: Callable[[], Any], member: Member) -> float:
    """Seconds on this rank's stream, from an all-reduce behind the spin on: all ranks' clocks start together."""
    member.come_together()  # the hosts, so that no rank's spin ends before another's begins
    return clock.seconds(run, member.device, before=member.come_together)


@dataclass(frozen=True)
class Shares:
    """Of one call's time on a rank: in kernels of collectives, in these alone; and that time, under the profiler."""

    collectives: float
    exposed: float
    seconds: float


def share_of_collectives(run: Callable[[], Any], member: Member) -> Shares:
    """From the profiler's timeline of one call. Kernels of collectives wait for the slowest rank in them."""
    cuda = member.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        member.come_together()
        with torch.profiler.record_function("call"):
            if cuda:
                torch.cuda._sleep(clock.BUSY_CYCLES)
                member.come_together()
            result = run()
        if cuda:
            torch.cuda.synchronize()
    del result
    events = list(profiler.events() or ())
    if cuda:
        on_device = [e for e in events if e.device_type.name == "CUDA" and not is_annotation(e)]
        spin_end = max(e.time_range.end for e in on_device if "spin" in e.name)
        after = sorted(
            (e.time_range.start, e.time_range.end, e.name) for e in on_device if e.time_range.start >= spin_end
        )
        if member.ranks > 1:  # all up to the all-reduce that all ranks start from
            after = after[1 + next(place for place, (*_, name) in enumerate(after) if "nccl" in name.lower()) :]
        spans = [(name, start, end) for start, end, name in after]
    else:
        call = next(e for e in events if e.name == "call").time_range
        inside = [e for e in events if call.start <= e.time_range.start < call.end and e.name.startswith("gloo:")]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in inside]
        spans += [("call", call.start, call.start), ("call", call.end, call.end)]
    start, end = min(s for _, s, _ in spans), max(e for _, _, e in spans)
    collective = {name for name, *_ in spans if "nccl" in name.lower() or name.startswith("gloo:")}
    waiting = covered((s, e) for name, s, e in spans if name in collective)
    working = covered((s, e) for name, s, e in spans if name not in collective)
    either = covered((s, e) for _, s, e in spans)
    return Shares(waiting / (end - start), (either - working) / (end - start), (end - start) / 1e6)


def is_annotation(event: Any) -> bool:
    """Whether it marks a stretch of the device's timeline, and is no kernel."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith("nccl:")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, -1.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
