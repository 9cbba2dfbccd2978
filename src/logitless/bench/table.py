"""Results for the terminal, within 120 columns."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from logitless.bench.cases import Case
from logitless.bench.measure import CaseResult, Measurement
from logitless.bench.peers import Peer

WIDTH = 120
LONGEST_REASON = 200

COLUMNS = (
    "forward\nms",
    "x\nlogits",
    "fwd+bwd\nms",
    "x\nbound",
    "x two-\nstage",
    "peak\nMiB",
    "less\ngrads",
    "loss\nerror",
    "dX\nerror",
    "dW\nerror",
)


def print_case(console: Console, case: Case, dtype: str, result: CaseResult) -> None:
    """Print one case's times, memory and errors, and under them why some are missing."""
    console.print(f"\n[bold]{case.name}[/bold] {dtype}: {case.description}")
    console.print(
        f"N={case.tokens} D={case.hidden} V={case.vocabulary}; peak memory above inputs; bound: matrix products"
    )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [*([result.bound] if result.bound else []), *result.measurements]
    for row in rows:
        table.add_row(row.peer, *_cells(row))
    _widened(console).print(table)
    for row in rows:
        if row.error is not None:
            first_line = row.error.split("\n", 1)[0][:LONGEST_REASON]
            console.print(f"{row.peer}: {escape(first_line)}", highlight=False, soft_wrap=True)


def print_choices(console: Console, cases: Mapping[str, Case], peers: Mapping[str, Peer], device: torch.device) -> None:
    """Print every case, and every peer with what is lacking for those that cannot run on the device."""
    shapes = Table(*("case", "N", "D", "V", "what it is"), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for case in cases.values():
        shapes.add_row(case.name, str(case.tokens), str(case.hidden), str(case.vocabulary), case.description)
    ways = Table(*("peer", f"on {device}", "what it is"), box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for peer in peers.values():
        ways.add_row(peer.name, peer.lacks(device) or "available", peer.description)
    _widened(console).print(shapes, "", ways)


def _widened(console: Console) -> Console:
    """The same output, wide enough for a table: where it is no terminal its width is taken for 80."""
    return Console(file=console.file, width=max(console.width, WIDTH), quiet=console.quiet)


def _cells(row: Measurement) -> list[str]:
    return [
        _milliseconds(row.forward_median_s),
        _number(row.logits_ratio, ".2f"),
        _milliseconds(row.median_s),
        _number(row.bound_ratio, ".2f"),
        _number(row.ratio, ".2f"),
        _number(row.peak_with_gradients_mib, ",.1f"),
        _number(row.peak_mib, ",.1f"),
        _number(row.loss_error, ".1e"),
        _number(row.hidden_error, ".1e"),
        _number(row.weight_error, ".1e"),
    ]


def _milliseconds(value: float | None) -> str:
    return _number(None if value is None else value * 1e3, ",.2f" if value is not None and value < 1 else ",.0f")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
