"""What the runs of a convergence study say together: a table, differences and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from logitless_demo.checkpoint import atomic_write
from logitless_demo.errors import InputError
from logitless_demo.study import RUNS, pairing

WIDTH = 120  # of the table where the output is no terminal

Results = Mapping[str, Mapping[str, Any]]
"""By run, in the order of the study, what is in its file."""


def summarise(folder: Path, console: Console) -> None:
    """Writes `summary.json` and the figures into the folder of the runs, and prints a table.

    Raises:
        InputError: the file of a run cannot be read.
    """
    from logitless_demo.convergence_plots import draw_figures  # matplotlib takes a second to import

    results = read_results(folder)
    summary = {"runs": [describe(name, results) for name in results], "differences": differences(results)}
    with atomic_write(folder / "summary.json") as file:
        file.write((json.dumps(summary, indent=1) + "\n").encode())
    for name, picture in draw_figures(results).items():
        with atomic_write(folder / f"{name}.png") as file:
            file.write(picture)
    _print(summary, folder, console)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the results of the runs that have a file.

    Raises:
        InputError: one cannot be read.
    """
    results = {}
    for path in [folder / f"{name}.json" for name in RUNS]:
        if path.exists():
            try:
                results[path.stem] = json.loads(path.read_text())
            except ValueError as error:
                raise InputError(f"{path} cannot be read ({error}): remove it to do this run again") from error
    return results


def describe(name: str, results: Results) -> dict[str, Any]:
    """Returns a run in a few numbers; times of a step are medians."""
    result = results[name]
    config, steps, held_out = result["config"], result["steps"], result["held_out"]
    seconds = median(steps["seconds"])
    return {
        "name": name,
        **{setting: config[setting] for setting in ("head", "optimizer", "learning_rate", "seed", "steps")},
        **{setting: config[setting] if config["head"] == "sampled" else None for setting in ("threshold", "scan")},
        "held_out_loss": held_out["loss"],
        "standard_error": held_out["standard_error"],
        "step_milliseconds": seconds * 1e3,
        "head_milliseconds": median(steps["head_seconds"]) * 1e3,
        "tokens_per_second": config["batch"] * config["sequence"] / seconds,
        "training_seconds": math.fsum(steps["seconds"]),
    }


def differences(results: Results) -> list[dict[str, Any]]:
    """Returns, for each pair of runs, the difference of their held-out losses.

    Its standard error is that of the mean difference over the held-out sequences, which both runs read: what is hard
    in one sequence is hard for both, so that it is far below the errors of the two losses.
    """
    found = []
    for name in results:
        for other in results:
            kind = pairing(name, other)
            if kind is None:
                continue
            pairs = zip(*(results[run]["held_out"]["sequence_losses"] for run in (name, other)), strict=True)
            values = [own - theirs for own, theirs in pairs]
            found.append(
                {
                    "run": name,
                    "reference": other,
                    "kind": kind,
                    "difference": fmean(values),
                    "standard_error": standard_error(values),
                }
            )
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """Returns that of the mean of independent values; None of a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _print(summary: Mapping[str, Any], folder: Path, console: Console) -> None:
    table = Table()
    table.add_column("run")
    for heading in ("steps", "held-out loss", "step ms", "head ms", "tokens/s", "training s"):
        table.add_column(heading, justify="right")
    for run in summary["runs"]:
        table.add_row(
            run["name"],
            str(run["steps"]),
            _with_error(run["held_out_loss"], run["standard_error"], ".4f"),
            f"{run['step_milliseconds']:,.2f}",
            f"{run['head_milliseconds']:,.2f}",
            f"{run['tokens_per_second']:,.0f}",
            f"{run['training_seconds']:,.1f}",
        )
    pairs = Table(caption="standard errors are of the difference within each held-out sequence")
    for heading in ("run", "held against", "differs by"):
        pairs.add_column(heading)
    pairs.add_column("held-out loss, difference", justify="right")
    for pair in summary["differences"]:
        difference = _with_error(pair["difference"], pair["standard_error"], "+.4f")
        pairs.add_row(pair["run"], pair["reference"], pair["kind"], difference)
    wide = Console(file=console.file, width=max(console.width, WIDTH), quiet=console.quiet)
    wide.print(table, *([pairs] if summary["differences"] else []))
    console.print(f"written: {folder / 'summary.json'}, figures beside it", soft_wrap=True, highlight=False)


def _with_error(value: float, error: float | None, form: str) -> str:
    return format(value, form) if error is None else f"{value:{form}} \u00b1 {error:.4f}"
