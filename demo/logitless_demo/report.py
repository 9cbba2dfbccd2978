"""The report: one HTML file that holds its pictures and every number, and the pictures as PNG files beside it."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from html import escape
from pathlib import Path

from logitless_demo.checkpoint import atomic_write
from logitless_demo.memory import format_bytes
from logitless_demo.plots import (
    DARK,
    LIGHT,
    Picture,
    draw_difference,
    draw_loss,
    draw_memory,
    draw_throughput,
    draw_time,
    render,
)
from logitless_demo.ratios import ratio
from logitless_demo.results import Comparison

HEAD_NAMES = {"two-stage": "two-stage (logits)", "exact": "exact", "sampled": "sampled"}

STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #24292f; --soft: #59636e; --line: #d9dde2; --panel: #f6f7f9;
  --exact: #0072b2; --sampled: #d55e00; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #d5dae0; --soft: #98a1ab; --line: #363c44;
  --panel: #1c2025; --exact: #56b4e9; --sampled: #e69f00; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 3rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .6rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.8rem 0 .4rem; }
p { margin: .4rem 0; }
.lead { color: var(--soft); font-size: 1.05rem; }
.soft, figcaption { color: var(--soft); font-size: .9rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.8rem 0; }
.card { background: var(--panel); border-radius: .6rem; padding: .9rem 1.1rem; }
.card b { display: block; font-size: 1.5rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); display: block; font-size: .87rem; line-height: 1.4; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .5rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; padding-left: 0; min-width: 11rem; }
thead th { font-weight: 600; border-bottom-width: 2px; }
tbody th { font-weight: 400; }
.ratio { color: var(--soft); }
.exact { color: var(--exact); } .sampled { color: var(--sampled); }
figure { margin: 0; } figure img { width: 100%; height: auto; display: block; margin: .4rem 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.2rem; font-size: .93rem; margin: .6rem 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


@dataclass(frozen=True)
class _Row:
    key: str
    label: str
    form: str
    scale: float = 1.0
    ratio: bool = True


ROWS = (
    _Row("head_bytes", "peak memory of the head (MiB)", "{:,.0f}", 2**-20),
    _Row("peak_bytes", "peak memory of training (MiB)", "{:,.0f}", 2**-20),
    _Row("tokens_per_second", "tokens per second", "{:,.0f}"),
    _Row("step_seconds", "time of a step (ms, median)", "{:,.1f}", 1e3),
    _Row("head_seconds", "&emsp;of which head (ms)", "{:,.1f}", 1e3),
    _Row("body_seconds", "&emsp;of which body (ms)", "{:,.1f}", 1e3),
    _Row("optimizer_seconds", "&emsp;of which optimiser (ms)", "{:,.1f}", 1e3),
    _Row("training_loss", "training loss, last ten steps (nats)", "{:.4f}"),
    _Row("held_out_loss", "held-out loss (nats)", "{:.4f}"),
    _Row("largest_difference", "largest difference of a step's loss (nats)", "{:.1e}", ratio=False),
    _Row("total_seconds", "whole run (s)", "{:,.1f}"),
)


def write_report(comparison: Comparison, folder: Path) -> None:
    """Writes `report.html` and one PNG a picture.

    Args:
        comparison: what to tell.
        folder: where to; must exist.
    """
    pictures = _pictures(comparison)
    for picture in pictures:
        with atomic_write(folder / f"{picture.name}.png") as file:
            file.write(render(picture, comparison, LIGHT, "png"))
    with atomic_write(folder / "report.html") as file:
        file.write(_page(comparison, pictures).encode())


def _pictures(comparison: Comparison) -> tuple[Picture, ...]:
    held = f"Memory is {comparison.memory}."
    return (
        Picture(
            "loss",
            "Loss",
            "The three runs start from the same weights and see the same batches. Two-stage is the broad band beneath.",
            draw_loss,
        ),
        Picture(
            "difference",
            "Difference from two-stage",
            "The exact head differs by rounding. The sampled head's loss is exact too, but its gradient is an unbiased "
            "estimate, so its weights take a slightly different path. Differences below 1e-7 are drawn at 1e-7.",
            draw_difference,
        ),
        Picture(
            "memory",
            "Memory",
            f"{held} Head alone: highest during the head's forward and backward above the level just before; this "
            "holds the gradient of the weight, which all three need. Whole training: highest during any step "
            "above the level before the model was made; weights, gradients and optimiser state included.",
            draw_memory,
        ),
        Picture(
            "throughput",
            "Speed",
            "Tokens of a step over the median time of a step, from making the batch to the updated weights.",
            draw_throughput,
        ),
        Picture(
            "time",
            "Where the time goes",
            "The graph is cut between the decoder's body and its head, and the forward and backward of each are timed "
            "apart. The embedding's gradient belongs to the body.",
            draw_time,
        ),
    )


def _page(comparison: Comparison, pictures: tuple[Picture, ...]) -> str:
    config = comparison.config
    data = json.dumps(comparison.to_json()).replace("</", "<\\/")
    figures = "\n".join(_figure(picture, comparison) for picture in pictures)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>logitless-demo compare, {escape(comparison.created)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>A language model trained without logits</h1>
<p class="lead">One decoder of {comparison.parameters / 1e6:.1f} million weights, trained three times from one seed on
the same text: through a [{config.tokens:,}, {comparison.vocabulary:,}] tensor of logits, exactly without it, and
without it with the sampled gradient.</p>
{_cards(comparison)}
{_table(comparison)}
{figures}
<h2>How it was run</h2>
{_facts(comparison)}
</main>
<script type="application/json" id="results">{data}</script>
</body>
</html>
"""


def _cards(comparison: Comparison) -> str:
    reference, exact, sampled = (run.summary() for run in comparison.runs)
    difference = comparison.largest_difference(comparison.runs[1])
    cards = (
        (
            f"{ratio(reference['head_bytes'], exact['head_bytes']):.1f}&times; less",
            f"memory for the head, exact: {format_bytes(exact['head_bytes'])} "
            f"instead of {format_bytes(reference['head_bytes'])}",
        ),
        (f"{ratio(reference['head_seconds'], exact['head_seconds']):.2f}&times;", "speed of the head, exact"),
        (f"{ratio(reference['head_seconds'], sampled['head_seconds']):.2f}&times;", "speed of the head, sampled"),
        (f"{difference:.1e}", "nats: largest difference of a step's loss, exact from two-stage"),
    )
    items = (f'<div class="card"><b>{number}</b><span>{text}</span></div>' for number, text in cards)
    return f'<div class="cards">{"".join(items)}</div>'


def _table(comparison: Comparison) -> str:
    differences = [{"largest_difference": comparison.largest_difference(run)} for run in comparison.runs]
    summaries = [run.summary() | difference for run, difference in zip(comparison.runs, differences, strict=True)]
    titles = [f'<th class="{run.head}">{HEAD_NAMES[run.head]}</th>' for run in comparison.runs]
    header = "<th></th>" + '<th class="ratio">ratio</th>'.join([titles[0] + titles[1], titles[2], ""])
    body = "".join(_table_row(row, [summary[row.key] for summary in summaries]) for row in ROWS)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div><p class="soft">Ratios are to two-stage.</p>'


def _table_row(row: _Row, values: list[float]) -> str:
    reference, *others = (row.form.format(value * row.scale) for value in values)
    cells = f"<td>{reference if row.ratio else ''}</td>"
    for text, value in zip(others, values[1:], strict=True):
        to_reference = f"{ratio(value, values[0]):.3f}" if row.ratio else ""
        cells += f'<td>{text}</td><td class="ratio">{to_reference}</td>'
    return f"<tr><th>{row.label}</th>{cells}</tr>"


def _figure(picture: Picture, comparison: Comparison) -> str:
    light, dark = (_data_uri(render(picture, comparison, theme, "svg")) for theme in (LIGHT, DARK))
    return f"""<h2>{picture.title}</h2>
<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">
<img src="{light}" alt="{escape(picture.title)}"></picture>
<figcaption>{escape(picture.caption)}</figcaption></figure>"""


def _data_uri(svg: bytes) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()


def _facts(comparison: Comparison) -> str:
    config = comparison.config
    facts = {
        "command": f"<code>{escape(comparison.command)}</code>",
        "started": escape(comparison.created),
        "text": f"{escape(config.text or 'the sources of the Python standard library')}: "
        f"{comparison.train_tokens:,} tokens to learn from, {comparison.held_out_tokens:,} held out by document",
        "model": f"{config.model.layers} layers, hidden {config.model.hidden}, {config.model.heads} heads, "
        f"vocabulary {comparison.vocabulary:,}, head tied to the embedding",
        "training": f"{config.steps} steps of {config.batch} &times; {config.sequence} tokens, AdamW, learning rate "
        f"{config.learning_rate:g}, products in {config.dtype}, weights in float32",
        "sampled": f"threshold {config.threshold:g}",
        "seed": str(config.seed),
        **{name: escape(value) for name, value in comparison.hardware.items()},
        "versions": escape(", ".join(f"{name} {value}" for name, value in comparison.software.items())),
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items()) + "</dl>"
