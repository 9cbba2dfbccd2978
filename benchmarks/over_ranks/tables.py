"""The results in Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from over_ranks.contenders import AGAINST


def strong_table(content: dict[str, Any]) -> str:
    """In Markdown."""
    model = {(m["problem"], m["contender"], m["ranks"]): m for m in content.get("model", ())}
    columns = (
        *("problem", "ranks", "contender", "ms", "speed-up", "ideal, ms", "predicted, ms", "collectives", "exposed"),
        *(f"x {AGAINST}", "peak, MiB", "error: loss", "dX", "dW"),
    )
    rows: list[tuple[str, ...]] = [columns]
    for result in content.get("results", ()):
        name, ranks = result["problem"]["name"], result["ranks"]
        if "error" in result:
            rows.append((name, str(ranks), "", result["error"].splitlines()[0], *[""] * (len(columns) - 4)))
        for row in result["rows"]:
            who, median, shares = row["contender"], row["median_s"], row["collectives"]
            start = (name, str(ranks), who)
            if median is None:
                rows.append((*start, (row["error"] or "not measured").splitlines()[0], *[""] * (len(columns) - 4)))
                continue
            one, known = time_on_one(content, name, who), model.get((name, who, ranks), {})
            rows.append(
                (
                    *start,
                    milliseconds(median),
                    number(one and one / median),
                    milliseconds(known.get("ideal_s")),
                    milliseconds(known.get("predicted_s")),
                    percent(share["collectives"] for share in shares),
                    percent(share["exposed"] for share in shares),
                    number(row["ratio"]),
                    number(max(row["peak_mib"]), 0),
                    *(f"{row[error]:.1e}" for error in ("loss_error", "hidden_error", "weight_error")),
                )
            )
    alone: list[tuple[str, ...]] = [("problem", "ranks", "collective", "MiB", "ms", "bus GB/s")]
    for group in content.get("collectives", ()):
        where = (group["problem"]["name"], str(group["ranks"]))
        for row in group["rows"]:
            size, time_of = number(row["bytes"] / 2**20), milliseconds(row["median_s"], 3)
            alone.append((*where, row["collective"], size, time_of, number(row["bus_gb_s"], 0)))
    return markdown(rows) + "\n\n" + markdown(alone)


def training_table(content: dict[str, Any]) -> str:
    """In Markdown."""
    columns = ("GPUs", "data", "tensor", "tokens a step", "ms a step", "body", "head", "optimiser")
    rows: list[tuple[str, ...]] = [(*columns, "tokens/s a GPU", "of one GPU's", "peak, MiB")]
    for r in content.get("results", ()):
        start = tuple(str(r[name]) for name in ("gpus", "data", "tensor"))
        if r["error"] is not None:
            rows.append((*start, r["error"].splitlines()[0], *[""] * 7))
            continue
        parts = (milliseconds(r[name], 1) for name in ("median_s", "body_s", "head_s", "optimizer_s"))
        speed, share = number(r["tokens_a_second_a_gpu"], 0), percent([r["efficiency"]] if "efficiency" in r else [])
        rows.append((*start, f"{r['tokens_a_step']:,}", *parts, speed, share, number(max(r["peak_mib"]), 0)))
    return markdown(rows)


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The first row is the head of the table."""
    head, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def milliseconds(seconds: float | None, digits: int = 2) -> str:
    return number(None if seconds is None else seconds * 1e3, digits)


def percent(shares: Iterable[float]) -> str:
    """Least and most over ranks."""
    known = sorted(shares)
    if not known:
        return ""
    return f"{known[0]:.1%}" + (f" to {known[-1]:.1%}" if len(known) > 1 else "")


def time_on_one(content: dict[str, Any], problem: str, contender: str) -> float | None:
    """A contender's time on one rank, if it has been measured."""
    here = [r for r in content["results"] if (r["problem"]["name"], r["ranks"]) == (problem, 1)]
    return next((row["median_s"] for r in here for row in r["rows"] if row["contender"] == contender), None)
