"""The protocol, in code; ``benchmarks/README.md`` has it in words.

Time: rounds in which every contender runs once, the forward pass alone and then forward and backward, in turn, after
one round that does not count. Given are the median over rounds and, since other work on the machine and the heat of a
GPU slow a round as a whole, medians over rounds of ratios to times in the same round: to the baseline's, and to those
of the matrix products alone. Memory: the largest sum of live allocations above those at the start, from a run of its
own. Error: of loss and gradients against a wider dtype on the same inputs. A peer that fails says why and is left out
of what follows; one that breaks the device ends the measurement, to be repeated without it.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from logitless.bench import products
from logitless.bench.accuracy import Errors, Gradients, compute, errors, reference
from logitless.bench.cases import Inputs
from logitless.bench.clock import Runs, seconds
from logitless.bench.isolation import PeerLostError, Progress
from logitless.bench.memory import peak_bytes
from logitless.bench.peers import BASELINE, Loss, Peer

# Characters of an error that are kept: those of compilers are long, and say what is wrong at their beginning.
LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class Measurement:
    """One peer on one case. What could not be measured is None.

    Attributes:
        peer: its name.
        median_s: seconds of forward and backward.
        rounds_s: of each round.
        ratio: to the baseline's time in the same round, median.
        bound_ratio: to the time of the three matrix products in the same round, median.
        forward_median_s: seconds of the forward pass alone, without gradients.
        forward_rounds_s: of each round.
        logits_ratio: of the forward pass to the time of the product that makes the logits, in the same round, median.
        peak_mib: memory above inputs and gradients.
        peak_with_gradients_mib: memory above inputs.
        peak_ratio: of ``peak_mib`` to the baseline's.
        loss_error: absolute, against the wider reference.
        hidden_error: relative error of the gradient of the hidden states, in the Frobenius norm.
        weight_error: that of the weight's.
        error: why something is missing.
    """

    peer: str
    median_s: float | None = None
    rounds_s: list[float] = field(default_factory=list)
    ratio: float | None = None
    bound_ratio: float | None = None
    forward_median_s: float | None = None
    forward_rounds_s: list[float] = field(default_factory=list)
    logits_ratio: float | None = None
    peak_mib: float | None = None
    peak_with_gradients_mib: float | None = None
    peak_ratio: float | None = None
    loss_error: float | None = None
    hidden_error: float | None = None
    weight_error: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """One case in one dtype.

    Attributes:
        bound: the matrix products alone; None where they were left out.
        measurements: of the peers.
    """

    bound: Measurement | None
    measurements: list[Measurement]


@dataclass(frozen=True)
class Protocol:
    """How to measure.

    Attributes:
        rounds: that count.
        bound: whether to time the matrix products too, which needs room for all logits.
        slowest: seconds of one forward and backward pass from which a peer is left out of the rounds; None for any.
        redraw: fills the inputs afresh for a round; None to keep them.
        barred: reasons not to run, by peer.
    """

    rounds: int
    bound: bool = True
    slowest: float | None = None
    redraw: Callable[[int], None] | None = None
    barred: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Contender:
    """What is known so far.

    Attributes:
        name: of the peer, or of the matrix products.
        start: makes its runs ready; what they hold is freed with them.
        forward: seconds of each round.
        both: likewise.
        errors: None until measured.
        peak: bytes, gradients included; None until measured.
        failure: why it takes no further part.
    """

    name: str
    start: Callable[[], Runs] | None = None
    forward: list[float] = field(default_factory=list)
    both: list[float] = field(default_factory=list)
    errors: Errors | None = None
    peak: int | None = None
    failure: str | None = None


def measure(inputs: Inputs, peers: Sequence[Peer], protocol: Protocol, progress: Progress) -> CaseResult:
    """Measure the peers, the baseline among them, on one case's inputs.

    Raises:
        PeerLostError: the device cannot be used any more after what a peer did.
    """
    progress("reference", "")
    right = reference(inputs)
    contenders = []
    for peer in peers:
        contender = _Contender(peer.name, failure=protocol.barred.get(peer.name))
        contenders.append(contender)
        if contender.failure is None:
            progress(peer.name, "error and memory")
            _first_look(contender, peer, inputs, right, protocol.slowest)
    del right
    bound = None
    if protocol.bound:
        barred = protocol.barred.get(products.NAME)
        bound = _Contender(products.NAME, lambda: products.products(inputs), failure=barred)
    _run_rounds([*([bound] if bound else []), *contenders], inputs.hidden.device, protocol, progress)
    baseline = next(contender for contender in contenders if contender.name == BASELINE)
    gradients = inputs.hidden.nbytes + inputs.weight.nbytes
    return CaseResult(
        _measurement(bound, baseline, bound, gradients) if bound else None,
        [_measurement(contender, baseline, bound, gradients) for contender in contenders],
    )


def _first_look(contender: _Contender, peer: Peer, inputs: Inputs, right: Gradients, slowest: float | None) -> None:
    """Errors, memory, and whether the peer runs at all; compiles and tunes what it does at a first call."""
    device = inputs.hidden.device
    with _failing(contender, device):
        loss = peer.load()
        contender.start = lambda: _runs(loss, inputs)
        contender.errors = errors(compute(loss, inputs), right)
        contender.peak = peak_bytes(lambda: compute(loss, inputs), device)
        if slowest is not None:
            elapsed = seconds(lambda: compute(loss, inputs), device)
            if elapsed > slowest:
                contender.failure = f"left out of the rounds: forward and backward took {elapsed:.1f} s"


def _runs(loss: Loss, inputs: Inputs) -> Runs:
    def forward() -> torch.Tensor:
        with torch.no_grad():
            return loss(inputs.hidden, inputs.weight, inputs.target)

    return Runs(forward, lambda: compute(loss, inputs))


def _run_rounds(contenders: list[_Contender], device: torch.device, protocol: Protocol, progress: Progress) -> None:
    for number in range(protocol.rounds + 1):
        if protocol.redraw is not None:
            protocol.redraw(number)
        for contender in contenders:
            if contender.failure is not None:
                continue
            progress(contender.name, f"round {number} of {protocol.rounds}")
            gc.collect()
            with _failing(contender, device):
                forward, both = _time(contender, device)
                if number:
                    contender.forward.append(forward)
                    contender.both.append(both)


def _time(contender: _Contender, device: torch.device) -> tuple[float, float]:
    assert contender.start is not None
    runs = contender.start()
    return seconds(runs.forward, device), seconds(runs.both, device)


@contextlib.contextmanager
def _failing(contender: _Contender, device: torch.device) -> Iterator[None]:
    """Whatever a peer raises becomes its failure, and what it held is freed for the others."""
    try:
        yield
    except Exception as error:  # a peer's code may raise anything
        contender.failure = f"{type(error).__name__}: {str(error).strip()}"[:LONGEST_MESSAGE]
    if contender.failure is None:
        return
    contender.forward, contender.both = [], []
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
        except RuntimeError:
            raise PeerLostError(contender.name, contender.failure) from None


def _measurement(
    contender: _Contender, baseline: _Contender, bound: _Contender | None, gradient_bytes: int
) -> Measurement:
    above_gradients = None if contender.peak is None else contender.peak - gradient_bytes
    return Measurement(
        peer=contender.name,
        median_s=_median(contender.both),
        rounds_s=contender.both,
        ratio=_ratio(contender.both, baseline.both),
        bound_ratio=_ratio(contender.both, bound.both if bound else []),
        forward_median_s=_median(contender.forward),
        forward_rounds_s=contender.forward,
        logits_ratio=_ratio(contender.forward, bound.forward if bound else []),
        peak_mib=None if above_gradients is None else above_gradients / 2**20,
        peak_with_gradients_mib=None if contender.peak is None else contender.peak / 2**20,
        peak_ratio=None
        if above_gradients is None or baseline.peak is None
        else above_gradients / (baseline.peak - gradient_bytes),
        loss_error=contender.errors.loss if contender.errors else None,
        hidden_error=contender.errors.hidden if contender.errors else None,
        weight_error=contender.errors.weight if contender.errors else None,
        error=contender.failure,
    )


def _median(times: list[float]) -> float | None:
    return statistics.median(times) if times else None


def _ratio(times: list[float], others: list[float]) -> float | None:
    """Median over rounds; None where either did not take part."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True)) if times and others else None
