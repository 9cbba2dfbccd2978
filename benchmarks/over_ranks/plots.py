"""The results as figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from over_ranks.contenders import CONTENDERS


def draw_strong(content: dict[str, Any], path: Path) -> None:
    """Time of a call by ranks: measured, ideal, and as the model has it."""
    names = list(dict.fromkeys(r["problem"]["name"] for r in content.get("results", ())))
    if not names:
        return
    figure = Figure(figsize=(6 * len(names), 4.8), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        here = [r for r in content["results"] if r["problem"]["name"] == name]
        counts = sorted({r["ranks"] for r in here})
        for contender in CONTENDERS:
            colour, marker = contender.look
            points = sorted(
                (r["ranks"], row["median_s"] * 1e3)
                for r in here
                for row in r["rows"]
                if row["contender"] == contender.name and row["median_s"] is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=contender.name)
            model = sorted(
                (m["ranks"], m["ideal_s"] * 1e3, m["predicted_s"] * 1e3)
                for m in content.get("model", ())
                if (m["problem"], m["contender"]) == (name, contender.name)
            )
            if len(model) > 1:
                x, ideal, predicted = zip(*model, strict=True)
                axes.plot(x, ideal, color=colour, linestyle="dotted", linewidth=1)
                axes.plot(x, predicted, color=colour, marker="_", markersize=9, linestyle="none")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        sizes = here[0]["problem"]
        axes.set_title(f"N={sizes['tokens']:,}  D={sizes['hidden']:,}  V={sizes['vocabulary']:,}", fontsize=10)
        axes.set_xlabel("ranks; dotted: one rank's time over ranks, dashes: the model")
        axes.set_ylabel("ms a call, forward and backward" if place == 1 else "")
        axes.grid(color="#e3e6e9", linewidth=0.6)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=160)


def draw_training(content: dict[str, Any], path: Path) -> None:
    """Tokens a second and GPU by GPUs."""
    done = [r for r in content.get("results", ()) if r["error"] is None]
    if not done:
        return
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "FSDP2": ([r for r in done if r["tensor"] == 1], "#0072b2", "o"),
        "with tensor parallelism over 2": ([r for r in done if r["tensor"] == 2], "#d55e00", "s"),
    }
    for label, (rows, colour, marker) in kinds.items():
        points = sorted((r["gpus"], r["tokens_a_second_a_gpu"]) for r in rows)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=label)
    one = next((r for r in done if r["gpus"] == 1), None)
    if one is not None:
        axes.axhline(one["tokens_a_second_a_gpu"], color="#8a919a", linestyle="dotted", linewidth=1)
    counts = sorted({r["gpus"] for r in done})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens a second and GPU")
    axes.grid(color="#e3e6e9", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=160)
