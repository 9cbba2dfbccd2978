"""The report's figures, each drawn for a light and for a dark page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from logitless_demo.results import Comparison

SMALLEST_SHOWN = (
    1e-7  # of a difference on the logarithmic axis; two losses of about 10 in float32 are equal or 1e-6 apart
)


@dataclass(frozen=True)
class Theme:
    """Colours of a page.

    Attributes:
        text: of letters and axes.
        grid: of lines in the background.
        page: behind everything; used where text stands on a bar.
        heads: by head, chosen from Okabe and Ito's palette, which colour-blind readers can tell apart.
        parts: of a step.
    """

    text: str
    grid: str
    page: str
    heads: dict[str, str]
    parts: dict[str, str]


LIGHT = Theme(
    text="#24292f",
    grid="#d9dde2",
    page="#ffffff",
    heads={"two-stage": "#8a919a", "exact": "#0072b2", "sampled": "#d55e00"},
    parts={"head": "#0072b2", "body": "#56b4e9", "optimiser": "#c3c8ce"},
)
DARK = Theme(
    text="#d5dae0",
    grid="#363c44",
    page="#14171b",
    heads={"two-stage": "#9aa2ac", "exact": "#56b4e9", "sampled": "#e69f00"},
    parts={"head": "#56b4e9", "body": "#2f6f9f", "optimiser": "#5b626b"},
)
# The curves lie on one another: the reference is a broad band, the others thin lines upon it.
LINES: dict[str, dict[str, Any]] = {
    "two-stage": {"linewidth": 6, "alpha": 0.55, "solid_capstyle": "round"},
    "exact": {"linewidth": 1.8},
    "sampled": {"linewidth": 1.8, "linestyle": (0, (4, 2))},
}


@dataclass(frozen=True)
class Picture:
    """A figure as the report shows it.

    Attributes:
        name: of its PNG file, without the ending.
        title: its heading.
        caption: what is to be seen, and what exactly was measured.
        draw: makes the figure in a theme.
    """

    name: str
    title: str
    caption: str
    draw: Callable[[Comparison, Theme], Figure]


def draw_loss(comparison: Comparison, theme: Theme) -> Figure:
    """Draws the training losses over one another."""
    with _axes(theme) as (figure, axes):
        for run in comparison.runs:
            steps = [record.step for record in run.records]
            axes.plot(steps, run.losses, label=run.head, color=theme.heads[run.head], **LINES[run.head])
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (nats per token)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    return figure


def draw_difference(comparison: Comparison, theme: Theme) -> Figure:
    """Draws how far the losses are from those of the two-stage pipeline."""
    with _axes(theme) as (figure, axes):
        for run in comparison.runs[1:]:
            steps = [record.step for record in run.records]
            sizes = [max(abs(difference), SMALLEST_SHOWN) for difference in comparison.differences(run)]
            axes.plot(
                steps, sizes, label=run.head, color=theme.heads[run.head], marker=".", markersize=5, **LINES[run.head]
            )
        axes.set_yscale("log")
        axes.set_ylim(bottom=SMALLEST_SHOWN / 2)
        axes.set_xlabel("step")
        axes.set_ylabel("|loss - two-stage loss| (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
    return figure


def draw_memory(comparison: Comparison, theme: Theme) -> Figure:
    """Draws the peak memory of the head and of the whole training."""
    summaries = [run.summary() for run in comparison.runs]
    scale, unit = (2**30, "GiB") if summaries[0]["peak_bytes"] >= 4 * 2**30 else (2**20, "MiB")
    with _axes(theme) as (figure, axes):
        for offset, run, summary in zip((0.8, 0, -0.8), comparison.runs, summaries, strict=True):
            sizes = [summary["head_bytes"] / scale, summary["peak_bytes"] / scale]
            bars = axes.barh([3 + offset, offset], sizes, height=0.7, label=run.head, color=theme.heads[run.head])
            axes.bar_label(bars, fmt=lambda size: f"{size:,.3g}" if size < 100 else f"{size:,.0f}", padding=4)
        axes.set_yticks([3, 0], ["head alone", "whole training"])
        axes.set_xlabel(f"peak memory ({unit})")
        _tidy_bars(axes)
        axes.legend(frameon=False, loc="best")
    return figure


def draw_throughput(comparison: Comparison, theme: Theme) -> Figure:
    """Draws tokens a second."""
    speeds = [run.summary()["tokens_per_second"] for run in comparison.runs]
    labels = [f"{speed:,.0f}  ({speed / speeds[0]:.2f}\u00d7)" for speed in speeds]
    with _axes(theme, height=2.2) as (figure, axes):
        names = [run.head for run in comparison.runs]
        bars = axes.barh(names, speeds, height=0.65, color=[theme.heads[name] for name in names])
        axes.bar_label(bars, labels, padding=4)
        axes.set_xlabel("tokens per second (more is better)")
        _tidy_bars(axes)
        axes.invert_yaxis()
    return figure


def draw_time(comparison: Comparison, theme: Theme) -> Figure:
    """Draws where the time of a step goes."""
    names = [run.head for run in comparison.runs]
    summaries = [run.summary() for run in comparison.runs]
    with _axes(theme, height=2.5) as (figure, axes):
        left = [0.0] * len(names)
        for part, key in (("head", "head_seconds"), ("body", "body_seconds"), ("optimiser", "optimizer_seconds")):
            widths = [summary[key] * 1e3 for summary in summaries]
            bars = axes.barh(names, widths, left=left, height=0.65, label=part, color=theme.parts[part])
            if part == "head":
                axes.bar_label(bars, [f"{width:,.0f}" for width in widths], label_type="center", color=theme.page)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.bar_label(axes.containers[-1], [f"{end:,.0f}" for end in left], padding=4)  # pyright: ignore[reportArgumentType]
        axes.set_xlabel("time of a step (ms, median)")
        _tidy_bars(axes)
        axes.invert_yaxis()
        axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def render(picture: Picture, comparison: Comparison, theme: Theme, kind: Literal["svg", "png"]) -> bytes:
    """Returns a figure as the bytes of a file."""
    buffer = io.BytesIO()
    with mpl.rc_context(_style(theme)):
        figure = picture.draw(comparison, theme)
        if kind == "svg":
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        else:
            figure.savefig(buffer, format="png", dpi=160, facecolor=theme.page)
    return buffer.getvalue()


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        "font.family": "sans-serif",
        "font.size": 10.5,
        "text.color": theme.text,
        "axes.labelcolor": theme.text,
        "axes.edgecolor": theme.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": theme.grid,
        "grid.linewidth": 0.7,
        "xtick.color": theme.text,
        "ytick.color": theme.text,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "ytick.minor.size": 0,
        "svg.hashsalt": "logitless",  # equal results give equal bytes
    }


@contextmanager
def _axes(theme: Theme, height: float = 3.6) -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_style(theme)):
        figure = Figure(figsize=(7.6, height), layout="constrained")
        yield figure, figure.add_subplot()


def _tidy_bars(axes: Axes) -> None:
    axes.grid(visible=False, axis="y")
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
