"""What vocabulary parallelism costs and saves: a model, from measured times of one GPU and stated link bandwidths.

    python benchmarks/scaling.py --output benchmarks/results/scaling.json

Kernels take the time they took on one GPU, by default an H200 at D=4096, V=128256, in proportion to N and to the rows
of the weight that a rank has. A ring moves (t - 1) / t of an all-gather's result, and twice that of an all-reduce,
through each rank's link.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

# Bytes a second and seconds a step, of a link in one direction: NVLink within 8 GPUs, a card of 400 Gb/s each beyond.
NODE = 8
LINKS = {"NVLink": (450e9, 5e-6), "network": (50e9, 15e-6)}
STATISTICS = 2  # of each row: log-sum-exp and target logit
TOKENS = (8192, 65_536, 1_048_576)
RANKS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Head:
    """A head, and what one GPU took for it.

    Attributes:
        hidden: D.
        vocabulary: V.
        tokens: N of the measurement.
        seconds: of loss and both gradients, by gradient: exact or sampled.
    """

    hidden: int
    vocabulary: int
    tokens: int
    seconds: Mapping[str, float]


# In bf16, from results/gpu/fp8-h200.json, where the loss alone takes 11.43 ms.
LLAMA3 = Head(4096, 128_256, 8192, {"exact": 33.81e-3, "sampled": 14.02e-3})


@dataclass(frozen=True)
class Cost:
    """One rank's part of a call, forward and backward; times in seconds, sizes in bytes.

    Attributes:
        gradient: exact or sampled.
        tokens: N.
        ranks: t.
        flops: of its products, counted as the exact gradient's or the loss's alone.
        weight: its rows of the weight, as much again its gradient.
        compute: its kernels.
        gather: the forward all-gather of the statistics.
        reduce: the backward all-reduce of the hidden gradient, in fp32.
        gathered: bytes that the all-gather leaves.
    """

    gradient: str
    tokens: int
    ranks: int
    flops: float
    weight: float
    compute: float
    gather: float
    reduce: float
    gathered: float

    @property
    def seconds(self) -> float:
        """The call, if nothing hides that it waits for a link."""
        return self.compute + self.gather + self.reduce

    @property
    def exposed(self) -> float:
        """Share of the call in which it waits for a link, if nothing hides that."""
        return (self.gather + self.reduce) / self.seconds


def ring(size: float, ranks: int) -> float:
    """Seconds in which every rank gets `size` bytes, of which it has one part of `ranks`."""
    if ranks == 1:
        return 0.0
    bandwidth, latency = LINKS["NVLink" if ranks <= NODE else "network"]
    return size * (ranks - 1) / ranks / bandwidth + (ranks - 1) * latency


def cost(gradient: str, tokens: int, ranks: int, head: Head = LLAMA3) -> Cost:
    gathered = 4 * STATISTICS * tokens * ranks
    return Cost(
        gradient=gradient,
        tokens=tokens,
        ranks=ranks,
        flops=(6 if gradient == "exact" else 2) * tokens * head.hidden * head.vocabulary / ranks,
        weight=2 * head.hidden * head.vocabulary / ranks,
        compute=head.seconds[gradient] * tokens / head.tokens / ranks,
        gather=ring(gathered, ranks),
        reduce=2 * ring(4 * tokens * head.hidden, ranks),
        gathered=gathered,
    )


def table(costs: list[Cost]) -> str:
    """The costs in Markdown."""
    lines = [
        "| gradient | tokens | ranks | TFLOP | weight, MiB | kernels, ms | all-gather, ms | all-reduce, ms | waiting |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {c.gradient} | {c.tokens:,} | {c.ranks} | {c.flops / 1e12:.2f} | {c.weight / 2**20:.0f} "
        f"| {c.compute * 1e3:.2f} | {c.gather * 1e3:.2f} | {c.reduce * 1e3:.2f} | {c.exposed:.0%} |"
        for c in costs
    ]
    return "\n".join(lines)


def draw(costs: list[Cost], path: Path) -> None:
    """Time of a call by ranks: kernels alone, and with both collectives."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for place, tokens in enumerate(TOKENS, 1):
        axes = figure.add_subplot(1, len(TOKENS), place)
        for gradient, colour in (("exact", "#0072b2"), ("sampled", "#d55e00")):
            here = [c for c in costs if (c.tokens, c.gradient) == (tokens, gradient)]
            ranks, alone = [c.ranks for c in here], [c.compute * 1e3 for c in here]
            whole = [c.seconds * 1e3 for c in here]
            axes.plot(ranks, alone, color=colour, linestyle="dotted", label=f"{gradient}, kernels")
            axes.plot(ranks, whole, color=colour, marker="o", markersize=4, label=f"{gradient}, with collectives")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(RANKS, [str(count) for count in RANKS])
        axes.axvline(NODE * math.sqrt(2), color="#c8ccd1", linewidth=0.8)
        axes.set_title(f"{tokens:,} tokens", fontsize=10)
        axes.set_xlabel("ranks")
        axes.set_ylabel("ms a call" if place == 1 else "")
        axes.grid(color="#e3e6e9", linewidth=0.6)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file; a figure and a table go beside it")
    parser.add_argument("--hidden", type=int, default=LLAMA3.hidden, help="D (default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=LLAMA3.vocabulary, help="V (default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=LLAMA3.tokens, help="N of what was measured (default: %(default)s)"
    )
    for gradient, seconds in LLAMA3.seconds.items():
        text = f"seconds that one GPU took with the {gradient} gradient (default: %(default)s)"
        parser.add_argument(f"--{gradient}", type=float, default=seconds, help=text)
    given = parser.parse_args()
    output, measured = given.output, {gradient: vars(given)[gradient] for gradient in LLAMA3.seconds}
    head = Head(given.hidden, given.vocabulary, given.tokens, measured)
    costs = [cost(gradient, tokens, ranks, head) for gradient in measured for tokens in TOKENS for ranks in RANKS]
    output.write_text(json.dumps([asdict(c) | {"exposed": c.exposed} for c in costs], indent=1) + "\n")
    draw(costs, output.with_suffix(".png"))
    print(table(costs))


if __name__ == "__main__":
    main()
