"""Vocabulary parallelism and the training loop, measured over the GPUs of one machine, one process each.

    python benchmarks/parallel.py --output benchmarks/results/parallel
    python benchmarks/parallel.py --output parallel --device cpu --quick --no-compile

Strong scaling: one loss with both gradients, its vocabulary over 1, 2, 4, 8 ranks. Every contender's loss and gradients
are compared with an fp32 reference and its memory taken; then in every round each runs once, in turn, the first round
not counted. A time is between two events on a rank's stream, after an all-reduce that brings the ranks together and
behind a spin in which the hosts run ahead; the largest over ranks, the median over rounds. Weak scaling: steps of
``logitless-demo train`` on a batch in proportion to the ranks. What is done so far is in the files at any moment.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch
from over_ranks.plots import draw_strong, draw_training
from over_ranks.problems import PROBLEMS, TOYS, Settings
from over_ranks.processes import say
from over_ranks.report import Report, header, run_strong, run_training
from over_ranks.tables import strong_table, training_table
from over_ranks.training import TOY_TRAINING, Training

RANKS = (1, 2, 4, 8)


def divisions_of(most: int, only: str | None) -> list[tuple[int, int]]:
    """(data, tensor): one GPU first, then those for weak scaling by FSDP2, then those with tensor parallelism."""
    counts = [count for count in RANKS if 1 < count <= most]
    by_data = [(count, 1) for count in counts] if only != "train" else []
    by_tensor = [(count // 2, 2) for count in counts] if only != "weak" else []
    return [(1, 1), *by_data, *by_tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results and figures")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="instead of each problem's, or one for all")
    parser.add_argument("--rounds", type=int, default=8, help="that count (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, three rounds")
    parser.add_argument(
        "--only",
        choices=("strong", "weak", "train", "plots"),
        help="the loss; training by FSDP2; training with tensor parallelism; or figures and tables of what is there",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="most processes (default: one a GPU, two on a CPU)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    given = parser.parse_args()
    most = given.ranks or (torch.cuda.device_count() if given.device == "cuda" else 2)
    settings = Settings(given.device, 3 if given.quick else given.rounds, not given.no_compile)
    problems = TOYS if given.quick else PROBLEMS
    if given.tokens is not None:
        if len(given.tokens) not in (1, len(problems)):
            parser.error(f"--tokens takes one number or {len(problems)}, got {len(given.tokens)}")
        numbers = given.tokens * len(problems) if len(given.tokens) == 1 else given.tokens
        problems = tuple(replace(p, tokens=tokens) for p, tokens in zip(problems, numbers, strict=True))
    given.output.mkdir(parents=True, exist_ok=True)
    words = [given.output.name if word == str(given.output) else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/parallel.py", *words])
    strong, weak, train = (Report(given.output / f"{name}.json", {}) for name in ("strong", "weak", "train"))
    if given.only == "plots":
        for report in (strong, weak, train):
            report.content = json.loads(report.path.read_text()) if report.path.exists() else {}
    if given.only in (None, "strong"):
        strong.content = header(settings, command)
        for ranks in (count for count in RANKS if count <= most):
            run_strong(strong, ranks, problems, settings)
    if given.only in (None, "weak", "train"):
        report = train if given.only == "train" else weak
        report.content = header(settings, command)
        run_training(report, divisions_of(most, given.only), TOY_TRAINING if given.quick else Training(), settings)
    if strong.content:
        draw_strong(strong.content, strong.path.with_suffix(".png"))
        print(strong_table(strong.content), flush=True)
    for report in (weak, train):
        if report.content:
            draw_training(report.content, report.path.with_suffix(".png"))
            print(training_table(report.content), flush=True)
    say("done")


if __name__ == "__main__":
    main()
