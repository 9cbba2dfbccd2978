"""Run the benchmark: every case in every dtype, a table on the terminal, a JSON file with what it was measured on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from logitless import planning
from logitless.bench.cases import CASES, Case, make_inputs
from logitless.bench.measure import Measurement, measure
from logitless.bench.peers import BASELINE, available_peers
from logitless.demo.environment import describe_hardware, describe_software


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
        output: the JSON file.
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


def run_bench(config: BenchConfig, command: str, console: Console) -> int:
    """Measure, print and write; returns the exit code.

    Raises:
        ValueError: a trained head is needed and missing, or unfit.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    peers = {name: loss for name, loss in available_peers().items() if name in (BASELINE, *config.peers)}
    results = []
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    for name in config.cases:
        case = CASES[name]
        for dtype in config.dtypes:
            inputs = make_inputs(
                case, getattr(torch, dtype), torch.device(config.device), config.seed, config.trained_head
            )
            with console.status(f"{name} {dtype}") as status:
                measurements = measure(
                    inputs,
                    peers,
                    config.rounds,
                    lambda what, status=status, name=name, dtype=dtype: status.update(f"{name} {dtype}: {what}"),
                )
            console.print(_table(case, dtype, measurements))
            plan = planning.plan(
                tokens=case.tokens,
                hidden=case.hidden,
                vocabulary=case.vocabulary,
                dtype=dtype,
                device=config.device,
            )
            results.append(
                {
                    "case": asdict(case),
                    "dtype": dtype,
                    "plan": str(plan),
                    "measurements": [asdict(measurement) for measurement in measurements],
                }
            )
            if config.output is not None:
                _write(config, command, started, results)
    if config.output is not None:
        console.print(f"written: {config.output}")
    return 0


def _table(case: Case, dtype: str, measurements: list[Measurement]) -> Table:
    title = f"{case.name}: N={case.tokens} D={case.hidden} V={case.vocabulary} {dtype} ({case.description})"
    table = Table(title=title, title_justify="left")
    table.add_column("forward + backward")
    for heading in ("median s", "ratio", "peak MiB", "ratio", "loss error", "dX error", "dW error"):
        table.add_column(heading, justify="right")
    for m in measurements:
        table.add_row(
            m.peer,
            f"{m.median_s:.3f}",
            f"{m.ratio:.2f}",
            f"{m.peak_mib:.1f}",
            f"{m.peak_ratio:.3f}",
            f"{m.loss_error:.1e}",
            f"{m.hidden_error:.1e}",
            f"{m.weight_error:.1e}",
        )
    return table


def _write(config: BenchConfig, command: str, started: str, results: list[dict]) -> None:
    """Replace the file in one step, so that a run that is stopped leaves the cases it finished."""
    assert config.output is not None
    config.output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "started": started,
        "hardware": describe_hardware(config.device),
        "software": describe_software(),
        "rounds": config.rounds,
        "threads": torch.get_num_threads(),
        "seed": config.seed,
        "results": results,
    }
    partial = config.output.with_name(config.output.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(config.output)
