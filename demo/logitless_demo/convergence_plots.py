"""The figures of a convergence study, for a light page."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from logitless_demo.frequency import DECILES
from logitless_demo.plots import LIGHT
from logitless_demo.study import RUNS, pairing

# A colour for each gradient, most from Okabe and Ito's palette; seeds differ by their dashes, SGD is dotted, a short
# run has both.
EXACT = LIGHT.heads["exact"]
SAMPLED = {1 / 16: "#e69f00", 1 / 32: "#cc79a7", 1 / 64: LIGHT.heads["sampled"], 1 / 128: "#009e73"}
FP8 = "#8c564b"
SECOND_SEED, SHORT = (0, (5, 2)), (0, (5, 1.5, 1, 1.5))
SGD, SECOND_SGD = (0, (1, 1.2)), (0, (1, 3))
FIRST_SEEDS = (0, 2)  # of the runs from the start, and of those from trained weights
SMOOTHED_STEPS = 50
# The loss falls so fast at first that on an axis with all of it the rest is flat.
SHOWN_FROM = 0.2
SHOWN_TICKS = (1, 2, 5)

Results = Mapping[str, Mapping[str, Any]]


def draw_figures(results: Results) -> dict[str, bytes]:
    """Returns the figures that can be drawn of these runs, by name, as the bytes of PNG files."""
    results = {name: result for name, result in results.items() if not RUNS[name].timed}
    style: dict[Any, Any] = {
        "font.size": 10,
        "text.color": LIGHT.text,
        "axes.labelcolor": LIGHT.text,
        "axes.edgecolor": LIGHT.grid,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": LIGHT.grid,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "xtick.color": LIGHT.text,
        "ytick.color": LIGHT.text,
    }
    pictures = {}
    with mpl.rc_context(style):
        for prefix, kinds in (("", tuple(DRAWN)), ("tuned_", ("loss",))):
            chosen = {name: result for name, result in results.items() if (RUNS[name].start is None) == (not prefix)}
            pictures |= {prefix + kind: _png(DRAWN[kind](chosen)) for kind in kinds if chosen}
    return pictures


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Returns the mean of each `width` values in a row: `width - 1` fewer than there were."""
    return np.convolve(values, np.full(width, 1 / width), mode="valid").tolist()


def _draw_loss(results: Results) -> Figure:
    figure, (by_step, by_time) = _panels(2)
    shown = []
    for name, result in results.items():
        steps, seconds, losses = (
            [entry[key] for entry in result["evaluations"]] for key in ("step", "seconds", "loss")
        )  # fmt: skip
        by_step.plot(steps, losses, label=name, **_line(name))
        by_time.plot(seconds, losses, **_line(name))
        shown += [loss for step, loss in zip(steps, losses, strict=True) if step >= SHOWN_FROM * steps[-1]]
    margin = 0.05 * (max(shown) - min(shown)) or 0.05
    by_step.set_ylim(min(shown) - margin, max(shown) + margin)
    by_time.sharey(by_step)
    by_step.set_xlabel("step")
    by_time.set_xlabel("training time (s)")
    by_step.set_ylabel("held-out loss (nats per token)")
    _legend(figure, by_step)
    return figure


def _draw_gradient_norm(results: Results) -> Figure:
    figure, (axes,) = _panels(1)
    for name, result in results.items():
        norms = result["steps"]["gradient_norm"]
        width = min(SMOOTHED_STEPS, len(norms))
        axes.plot(range(width, len(norms) + 1), smooth(norms, width), label=name, **_line(name))
    _logarithmic(axes)
    axes.set_xlabel("step")
    axes.set_ylabel(f"gradient norm, mean of {SMOOTHED_STEPS} steps")
    _legend(figure, axes)
    return figure


def _draw_deciles(results: Results) -> Figure:
    figure, (axes,) = _panels(1)
    places = range(1, DECILES + 1)
    for name, other in itertools.permutations(results, 2):
        differences = _decile_differences(results[name], results[other])
        label = f"{name} less {other}"
        if pairing(name, other) == "gradient":
            axes.plot(places, differences, label=label, marker="o", markersize=4, **_line(name))
        if pairing(name, other) == "seed" and (RUNS[name].head, RUNS[name].optimizer) == ("exact", "adamw"):
            sizes = np.abs(differences)
            axes.fill_between(places, -sizes, sizes, color=LIGHT.grid, label=f"{label}, either sign")
    axes.set_xticks(places)
    axes.set_xlabel("decile of held-out tokens by training frequency of their target, the rarest first")
    axes.set_ylabel("difference of held-out loss (nats)")
    _legend(figure, axes)
    return figure


def _draw_rows(results: Results) -> Figure:
    figure, panels = _panels(2)
    places = range(DECILES + 1)
    for axes, value, label in zip(panels, ("norm", "drift"), ("norm", "distance from start"), strict=True):
        for name, result in results.items():
            rows = result["rows"]
            means = _numbers([rows["never_seen"][value], *(group[value] for group in rows["deciles"])])
            axes.plot(places, means, label=name, marker="o", markersize=4, **_line(name))
        _logarithmic(axes)
        axes.set_xticks(places, ["never", *map(str, places[1:])])
        axes.set_xlabel("decile of ids by training frequency, the rarest first")
        axes.set_ylabel(f"mean {label} of the head's rows")
    _legend(figure, panels[0])
    return figure


DRAWN: dict[str, Callable[[Results], Figure]] = {
    "loss": _draw_loss,
    "gradient_norm": _draw_gradient_norm,
    "rows": _draw_rows,
    "deciles": _draw_deciles,
}


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.4 * count + 1.8, 4.6), layout="constrained")
    return figure, [figure.add_subplot(1, count, place) for place in range(1, count + 1)]


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    columns = 2 * len(figure.axes)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.5, fontsize=9)


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=SHOWN_TICKS))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _line(name: str) -> dict[str, Any]:
    run = RUNS[name]
    colour = EXACT if run.head == "exact" else SAMPLED[run.threshold] if run.scan == "input" else FP8
    dashes = "solid"
    if run.optimizer == "sgd":
        dashes = SECOND_SGD if run.seed else SGD
    elif run.share < 1 and run.start is None:
        dashes = SHORT
    elif run.seed not in FIRST_SEEDS:
        dashes = SECOND_SEED
    return {"color": colour, "linestyle": dashes, "linewidth": 1.6}


def _decile_differences(result: Mapping[str, Any], reference: Mapping[str, Any]) -> list[float]:
    own, theirs = (_numbers([group["loss"] for group in run["losses"]["deciles"]]) for run in (result, reference))
    return [mine - other for mine, other in zip(own, theirs, strict=True)]


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Returns NaN, which leaves a gap in a line, for what an empty group lacks."""
    return [math.nan if value is None else value for value in values]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor=LIGHT.page)
    return buffer.getvalue()
