"""Memory against time: a panel for each case, a point for each peer."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from logitless.bench.cases import Case
from logitless.bench.measure import CaseResult, Measurement


class Mark(NamedTuple):
    """How a contender is drawn, and what a reader who does not know the command line calls it."""

    label: str
    colour: str
    marker: str


# By name. Colours are Okabe and Ito's, which colour-blind readers can tell apart.
MARKS = {
    "two-stage": Mark("PyTorch: logits, then cross-entropy", "#8a919a", "s"),
    "torch.compile": Mark("PyTorch, the same compiled", "#8a919a", "D"),
    "torch chunked": Mark("PyTorch F.linear_cross_entropy", "#8a919a", "v"),
    "liger": Mark("Liger Kernel", "#009e73", "^"),
    "liger cute": Mark("Liger Kernel, CuTe", "#009e73", "P"),
    "cce": Mark("Cut Cross-Entropy", "#cc79a7", "^"),
    "cce unfiltered": Mark("Cut Cross-Entropy, all gradients", "#cc79a7", "P"),
    "quack": Mark("QuACK, chunked", "#e69f00", "X"),
    "logitless exact": Mark("logitless, default", "#0072b2", "o"),
    "logitless exact fastest": Mark("logitless, room for all logits", "#56b4e9", "o"),
    "logitless sampled": Mark("logitless, sampled gradient", "#d55e00", "o"),
    "logitless fp8": Mark("logitless, sampled, fp8 scan", "#8c564b", "o"),
}


def _mark(peer: str) -> Mark:
    """Of a contender; one that is not listed is this library within a workspace of the caller's."""
    workspace = peer.removeprefix("logitless ")
    return MARKS.get(peer, Mark(f"logitless, workspace of {workspace}", "#0072b2", "D"))


TEXT, GRID, PAGE = "#24292f", "#d9dde2", "#ffffff"
PANELS_IN_A_ROW = 2
SHOWN_TICKS = (1, 2, 5)


def draw(results: Sequence[tuple[Case, str, CaseResult]]) -> bytes:
    """The figure as the bytes of a PNG file."""
    columns = min(PANELS_IN_A_ROW, len(results))
    rows = math.ceil(len(results) / columns)
    style: dict[Any, Any] = {
        "font.size": 10,
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": GRID,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": GRID,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(5.4 * columns + 0.4, 4.2 * rows + 0.9), layout="constrained")
        for place, (case, dtype, result) in enumerate(results, 1):
            _draw_panel(figure.add_subplot(rows, columns, place), case, dtype, result)
        shown = {m.peer for _, _, result in results for m in result.measurements if _point(m) is not None}
        handles = [_handle(name) for name in (*MARKS, *sorted(shown - MARKS.keys())) if name in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=columns + 1, frameon=False, fontsize=9)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor=PAGE)
    return buffer.getvalue()


class _Point(NamedTuple):
    peer: str
    milliseconds: float
    peak: float
    gradients: float


def _point(m: Measurement) -> _Point | None:
    """Where a peer stands, in MiB; None if it has no time."""
    if m.median_s is None or m.peak_with_gradients_mib is None or m.peak_mib is None:
        return None
    return _Point(m.peer, m.median_s * 1e3, m.peak_with_gradients_mib, m.peak_with_gradients_mib - m.peak_mib)


def _draw_panel(axes: Axes, case: Case, dtype: str, result: CaseResult) -> None:
    points = [point for m in result.measurements if (point := _point(m)) is not None]
    for peer, time, peak, _ in points:
        mark = _mark(peer)
        axes.plot(time, peak, mark.marker, color=mark.colour, markersize=9, alpha=0.9)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.12)
    if result.bound is not None and result.bound.median_s is not None:
        axes.axvline(result.bound.median_s * 1e3, color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
        _label(axes, "the three matrix products alone", x=result.bound.median_s * 1e3, rotation=90)
    if points:
        gradients = points[0].gradients
        axes.axhline(gradients, color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
        _label(axes, "the gradients themselves", y=gradients)
    axes.set_title(
        f"{case.name}, {dtype}\nN={case.tokens:,}  D={case.hidden:,}  V={case.vocabulary:,}", loc="left", fontsize=10
    )
    axes.set_xlabel("time of forward and backward pass, ms")
    axes.set_ylabel("peak memory above inputs, MiB")
    axes.grid(visible=True, linewidth=0.7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=SHOWN_TICKS))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, text: str, *, x: float | None = None, y: float | None = None, rotation: int = 0) -> None:
    """Name a line across the panel: a vertical one at its upper end, a level one below its right, where no point is."""
    place = (1, y) if x is None else (x, 1)
    transform = axes.get_yaxis_transform() if x is None else axes.get_xaxis_transform()
    axes.annotate(
        text,
        place,
        xycoords=transform,
        xytext=(-3, -3),
        textcoords="offset points",
        rotation=rotation,
        ha="right",
        va="top",
        fontsize=8,
    )


def _handle(peer: str) -> Line2D:
    mark = _mark(peer)
    return Line2D([], [], color=mark.colour, marker=mark.marker, linestyle="none", markersize=8, label=mark.label)
