"""Run the benchmark: every case in every dtype, a table each, and files of results with what they were measured on."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from logitless import planning, validation
from logitless.bench import environment, products
from logitless.bench.cases import CASES, Case, make_inputs, redraw
from logitless.bench.isolation import PeerLostError, Progress, call_isolated
from logitless.bench.measure import CaseResult, Protocol, measure
from logitless.bench.outputs import check_output_file
from logitless.bench.peers import BASELINE, PEERS, Peer, with_workspace
from logitless.bench.plot import draw
from logitless.bench.table import print_case
from logitless.bench.trained import load_trained_head
from logitless.errors import InputError

# Seconds of one forward and backward pass, from which a peer on a GPU is left out of the rounds.
SLOWEST_ON_GPU = 5.0
# Seconds that a peer on a GPU may take to compile, to tune and for two passes, before it is given up.
PATIENCE = 150.0
# Threads that a benchmark may ask for: more than any machine has, and few enough for the system to start.
MOST_THREADS = 1024


@dataclass(frozen=True)
class BenchConfig:
    """What to run.

    Attributes:
        cases: names of cases.
        dtypes: names of dtypes.
        peers: names of peers; the baseline is always among them.
        rounds: timed rounds a case.
        threads: of the CPU; None for PyTorch's default.
        seed: of the random inputs.
        device: where.
        trained_head: file of a trained head, for the cases that need one.
        output: the JSON file; a figure is drawn beside it.
        bound: whether to time the matrix products alone, which needs room for all logits.
        workspace: bytes, such as ``"512MiB"``, for one more contender: this library within them.
        slowest: seconds of one forward and backward pass from which a peer is left out of the rounds; None for
            ``SLOWEST_ON_GPU`` there and no limit on a CPU.
    """

    cases: tuple[str, ...]
    dtypes: tuple[str, ...]
    peers: tuple[str, ...]
    rounds: int
    threads: int | None
    seed: int
    device: str
    trained_head: Path | None
    output: Path | None
    bound: bool = True
    workspace: str | None = None
    slowest: float | None = None


def run_bench(config: BenchConfig, command: str, console: Console) -> int:
    """Measure, print and write; returns the exit code.

    Raises:
        InputError: something given cannot be used; found before anything is measured.
        PeerLostError: on a GPU, the process died, and not at a peer's work.
    """
    check(config)
    device = torch.device(config.device)
    if config.trained_head is not None and not any(CASES[name].trained for name in config.cases):
        console.print("--trained-head: not used, for it is no input of these cases", highlight=False)
    _, lacking = _choose_peers(config, device)
    for name, reason in lacking.items():
        console.print(f"{name}: not measured, {reason}", highlight=False)
    report = _Report(command, datetime.now(timezone.utc).isoformat(timespec="seconds"), lacking)
    for name in config.cases:
        for dtype in config.dtypes:
            with console.status(f"{name} {dtype}") as status:
                result = _measure(
                    config,
                    name,
                    dtype,
                    lambda who, what, status=status, name=name, dtype=dtype: status.update(
                        f"{name} {dtype}: {who} {what}"
                    ),
                )
            print_case(console, CASES[name], dtype, result)
            report.results.append((CASES[name], dtype, result))
            if config.output is not None:
                _write(config, config.output, report)
    if config.output is not None:
        console.print(f"\nwritten: {config.output}, {_figure(config.output)}")
    return 0


def check(config: BenchConfig) -> None:
    """Checks all that a run needs.

    Raises:
        InputError: something given cannot be used; the message names the flag.
    """
    for flag, given, known in (("--cases", config.cases, CASES), ("--peers", config.peers, PEERS)):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise InputError(f"{flag} must be among {', '.join(map(repr, known))}, got {unknown[0]!r}")
    check_between("--rounds", config.rounds, 1)
    check_between("--seed", config.seed, 0, 2**63 - 1 - config.rounds)
    if config.threads is not None:
        check_between("--threads", config.threads, 1, MOST_THREADS)
    if config.slowest is not None and not 0 < config.slowest < math.inf:
        raise InputError(f"--slowest must be a positive number of seconds, got {config.slowest}")
    check_device(config.device)
    if config.workspace is not None:
        _check_workspace(config)
    _check_trained_head(config)
    if config.output is not None:
        if config.output == _figure(config.output):
            raise InputError(f"--output must not end in {config.output.suffix}, as the figure beside it does")
        check_output_file("--output", config.output)
        check_output_file("--output", _figure(config.output))


def check_between(flag: str, value: int, least: int, most: int | None = None) -> None:
    """Checks that a number lies within bounds.

    Raises:
        InputError: it does not; the message names the flag.
    """
    if value < least:
        raise InputError(f"{flag} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise InputError(f"{flag} must be at most {most}, got {value}")


def check_device(name: str) -> torch.device:
    """The CPU or a CUDA device that is there.

    Raises:
        InputError: it is another, or not there.
    """
    try:
        device = validation.check_device("--device", name)
    except ValueError as error:
        raise InputError(str(error)) from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: PyTorch sees no CUDA device here: use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: PyTorch sees {torch.cuda.device_count()} CUDA devices here, from cuda:0 on")
    return device


def _check_workspace(config: BenchConfig) -> None:
    try:
        validation.check_workspace(config.workspace)
    except ValueError as error:
        raise InputError(f"--{error}") from error
    for name in config.cases:
        for dtype in config.dtypes:
            try:
                _plan(config, CASES[name], dtype, config.workspace)
            except ValueError as error:
                raise InputError(f"--workspace {config.workspace}, case {name} in {dtype}: {error}") from error


def _check_trained_head(config: BenchConfig) -> None:
    path, trained = config.trained_head, [CASES[name] for name in config.cases if CASES[name].trained]
    if path is None:
        if trained:
            raise InputError(f"--cases {trained[0].name} needs the file of a trained head: give it by --trained-head")
        return
    if not path.is_file():
        raise InputError(f"--trained-head: there is no file {path}: give an existing one")
    if not trained:
        return
    width = load_trained_head(path).hidden.shape[1]
    for case in trained:
        if width > case.hidden:
            raise InputError(f"--trained-head: {path} has D={width}, more than D={case.hidden} of case {case.name}")


def _plan(config: BenchConfig, case: Case, dtype: str, workspace: str | None = None) -> planning.Plan:
    return planning.plan(
        tokens=case.tokens,
        hidden=case.hidden,
        vocabulary=case.vocabulary,
        dtype=dtype,
        device=config.device,
        workspace=workspace,
    )


def _measure(config: BenchConfig, name: str, dtype: str, progress: Progress) -> CaseResult:
    """One case in one dtype: on a GPU in a process of its own, again without each peer that ended it."""
    barred: dict[str, str] = {}
    if torch.device(config.device).type != "cuda":
        return measure_case(config, name, dtype, barred, progress)
    while True:
        try:
            return call_isolated(measure_case, config, name, dtype, barred, progress=progress, patience=PATIENCE)
        except PeerLostError as lost:
            contenders = {*PEERS, *(peer.name for peer in _wanted(config)), products.NAME}
            if lost.peer in barred or lost.peer not in contenders:
                raise
            barred[lost.peer] = lost.reason


def measure_case(config: BenchConfig, name: str, dtype: str, barred: dict[str, str], progress: Progress) -> CaseResult:
    """Measure one case in one dtype in this process, without the peers barred for a reason.

    Raises:
        ValueError: a trained head is needed and missing, or unfit.
        PeerLostError: a peer broke the device.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)
    case = CASES[name]
    inputs = make_inputs(case, getattr(torch, dtype), device, config.seed, config.trained_head)
    protocol = Protocol(
        rounds=config.rounds,
        bound=config.bound,
        slowest=config.slowest or (SLOWEST_ON_GPU if device.type == "cuda" else None),
        redraw=(lambda number: redraw(inputs, config.seed + number)) if case.on_device else None,
        barred=barred,
    )
    peers, _ = _choose_peers(config, device)
    return measure(inputs, peers, protocol, progress)


@dataclass
class _Report:
    """What is written.

    Attributes:
        command: that was given.
        started: when.
        lacking: by peer that was not measured, what it lacks.
        results: by case and dtype.
    """

    command: str
    started: str
    lacking: dict[str, str]
    results: list[tuple[Case, str, CaseResult]] = field(default_factory=list)


def _wanted(config: BenchConfig) -> list[Peer]:
    """Those asked for, the baseline first."""
    wanted = [peer for name, peer in PEERS.items() if name in (BASELINE, *config.peers)]
    return wanted if config.workspace is None else [*wanted, with_workspace(config.workspace)]


def _choose_peers(config: BenchConfig, device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """Those to measure, the baseline first; and of those asked for that cannot run, why."""
    wanted = _wanted(config)
    reasons = {peer.name: peer.lacks(device) for peer in wanted}
    lacking = {name: reason for name, reason in reasons.items() if reason is not None}
    return [peer for peer in wanted if peer.name not in lacking], lacking


def _write(config: BenchConfig, output: Path, report: _Report) -> None:
    """Replace the files in one step each, so that a run that is stopped leaves the cases it finished."""
    output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": report.command,
        "started": report.started,
        "hardware": environment.hardware(torch.device(config.device)),
        "software": environment.software(),
        "rounds": config.rounds,
        "threads": config.threads or torch.get_num_threads(),
        "seed": config.seed,
        "not_measured": report.lacking,
        "results": [_content(config, *result) for result in report.results],
    }
    _replace(output, (json.dumps(content, indent=1) + "\n").encode())
    _replace(_figure(output), draw(report.results))


def _content(config: BenchConfig, case: Case, dtype: str, result: CaseResult) -> dict[str, Any]:
    return {"case": asdict(case), "dtype": dtype, "plan": str(_plan(config, case, dtype)), **asdict(result)}


def _figure(output: Path) -> Path:
    return output.with_suffix(".png")


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
