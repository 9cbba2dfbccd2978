"""The protocol, in code.

Time: rounds in which every peer runs once, forward and backward, in turn, after one round that does not count; given
are the median over rounds and, since other work on the machine slows a round as a whole, the median over rounds of the
ratio to the baseline's time in the same round. Memory: the largest sum of live allocations above those at the start,
less the gradients, from a run of its own under PyTorch's allocation profiler. Error: of loss and gradients against the
two-stage pipeline in the next wider dtype on the same inputs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from logitless.bench.cases import Inputs
from logitless.bench.peers import BASELINE, Loss, two_stage


@dataclass(frozen=True)
class Measurement:
    """One peer on one case.

    Attributes:
        peer: its name.
        median_s: seconds of forward and backward.
        rounds_s: of each round.
        ratio: to the baseline's time in the same round, median.
        peak_mib: memory above inputs and gradients; None where it could not be measured.
        peak_ratio: to the baseline's.
        loss_error: absolute, against the wider reference.
        hidden_error: relative error of the gradient of the hidden states, in the Frobenius norm.
        weight_error: that of the weight's.
    """

    peer: str
    median_s: float
    rounds_s: list[float]
    ratio: float
    peak_mib: float
    peak_ratio: float
    loss_error: float
    hidden_error: float
    weight_error: float


@dataclass(frozen=True)
class _Gradients:
    loss: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor


def measure(inputs: Inputs, peers: dict[str, Loss], rounds: int, progress: Callable[[str], None]) -> list[Measurement]:
    """Measure every peer on one case's inputs; the baseline is among them."""
    wider = torch.float64 if inputs.hidden.dtype == torch.float32 else torch.float32
    progress("reference")
    reference = _run(two_stage, Inputs(inputs.hidden.to(wider), inputs.weight.to(wider), inputs.target))
    errors, peaks = {}, {}
    for name, loss in peers.items():
        progress(f"{name}: error and memory")
        errors[name] = _errors(_run(loss, inputs), reference)
        peaks[name] = peak_bytes(lambda loss=loss: _run(loss, inputs), _gradient_bytes(inputs))
    del reference
    times: dict[str, list[float]] = {name: [] for name in peers}
    for number in range(rounds + 1):
        for name, loss in peers.items():
            progress(f"round {number} of {rounds}: {name}")
            gc.collect()
            seconds = _time(loss, inputs)
            if number:
                times[name].append(seconds)
    return [
        Measurement(
            peer=name,
            median_s=statistics.median(times[name]),
            rounds_s=times[name],
            ratio=statistics.median(a / b for a, b in zip(times[name], times[BASELINE], strict=True)),
            peak_mib=peaks[name] / 2**20,
            peak_ratio=peaks[name] / peaks[BASELINE],
            loss_error=errors[name][0],
            hidden_error=errors[name][1],
            weight_error=errors[name][2],
        )
        for name in peers
    ]


def _run(loss: Loss, inputs: Inputs) -> _Gradients:
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    value = loss(hidden, weight, inputs.target)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return _Gradients(value.detach(), hidden.grad, weight.grad)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(loss: Loss, inputs: Inputs) -> float:
    _synchronise(inputs.hidden.device)
    start = time.perf_counter()
    gradients = _run(loss, inputs)
    _synchronise(inputs.hidden.device)
    seconds = time.perf_counter() - start
    del gradients
    return seconds


def _errors(ours: _Gradients, reference: _Gradients) -> tuple[float, float, float]:
    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.to(b.dtype) - b).norm() / b.norm())

    return (
        float((ours.loss.to(reference.loss.dtype) - reference.loss).abs()),
        relative(ours.hidden, reference.hidden),
        relative(ours.weight, reference.weight),
    )


def _gradient_bytes(inputs: Inputs) -> int:
    return inputs.hidden.nbytes + inputs.weight.nbytes


def peak_bytes(run: Callable[[], Any], result_bytes: int) -> int:
    """Most bytes live at once during ``run`` above those live before, less ``result_bytes``."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before - result_bytes
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = run()
        del result
    live = peak = 0
    for event in _allocations(profiler):
        live += event
        peak = max(peak, live)
    return peak - result_bytes


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
