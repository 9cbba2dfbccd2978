"""``logitless demo``: one model, one text, one seed, three heads."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from logitless.demo.checkpoint import atomic_write
from logitless.demo.config import HEAD_KINDS, ModelConfig, TrainConfig, with_flags
from logitless.demo.data import Corpus, Tokenizer, check_size, load_corpus, tekken
from logitless.demo.environment import describe_hardware, describe_software
from logitless.demo.memory import format_bytes, memory_meter
from logitless.demo.progress import StepProgress
from logitless.demo.ratios import ratio
from logitless.demo.runs import RunFolder
from logitless.demo.train import StepRecord, Trainer, resolve_device

# In float32 two ways to the same loss differ by rounding alone, which stays far below this for a hundred steps.
# Training is chaotic, so that in the end any difference grows: later steps are not judged.
LARGEST_DIFFERENCE = 1e-3
JUDGED_STEPS = 100
LAST_STEPS = 10
# What the two-stage head holds for each logit on a GPU, in bytes: bfloat16 and float32 logits and gradients of both.
BYTES_PER_LOGIT = 16


@dataclass(frozen=True)
class RunResult:
    """One training run of the three.

    Attributes:
        head: which head it used.
        tokens: tokens a step.
        records: its steps.
        held_out_loss: after the last step.
        total_seconds: from making the model to the held-out loss.
    """

    head: str
    tokens: int
    records: tuple[StepRecord, ...]
    held_out_loss: float
    total_seconds: float

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [record.loss for record in self.records]

    def typical(self, name: str) -> float:
        """Returns the median over the steps of a number in their records."""
        return median(getattr(record, name) for record in self.records)

    def summary(self) -> dict[str, float]:
        """Returns the run in a few numbers; times are medians over the steps, memory is the highest."""
        return {
            "training_loss": fmean(self.losses[-LAST_STEPS:]),
            "held_out_loss": self.held_out_loss,
            "peak_bytes": max(record.peak_bytes for record in self.records),
            "head_bytes": max(record.head_bytes for record in self.records),
            "tokens_per_second": self.tokens / self.typical("seconds"),
            "step_seconds": self.typical("seconds"),
            "head_seconds": self.typical("head_seconds"),
            "body_seconds": self.typical("body_seconds"),
            "optimizer_seconds": self.typical("optimizer_seconds"),
            "total_seconds": self.total_seconds,
        }


@dataclass(frozen=True)
class Comparison:
    """All that the report tells.

    Attributes:
        command: what was typed.
        created: local time at the start.
        config: the settings, but for the head.
        vocabulary: token ids, V.
        parameters: weights of the model, the tied embedding counted once.
        train_tokens: tokens to learn from.
        held_out_tokens: tokens held out.
        memory: what the memory numbers count.
        hardware: parts of the machine.
        software: versions.
        runs: one for each head, two-stage first.
    """

    command: str
    created: str
    config: TrainConfig
    vocabulary: int
    parameters: int
    train_tokens: int
    held_out_tokens: int
    memory: str
    hardware: dict[str, str]
    software: dict[str, str]
    runs: tuple[RunResult, ...]

    def differences(self, run: RunResult) -> list[float]:
        """Returns, for each step, the run's loss minus that of the two-stage pipeline."""
        return [own - other for own, other in zip(run.losses, self.runs[0].losses, strict=True)]

    def largest_difference(self, run: RunResult) -> float:
        """Returns the largest of the differences, without its sign."""
        return max(map(abs, self.differences(run)))

    @property
    def exact_is_exact(self) -> bool | None:
        """Whether the exact head kept to the two-stage losses; None but in float32 on a CPU, where nothing blurs it."""
        if (self.config.device, self.config.dtype) != ("cpu", "float32"):
            return None
        exact = next(run for run in self.runs if run.head == "exact")
        return all(abs(difference) <= LARGEST_DIFFERENCE for difference in self.differences(exact)[:JUDGED_STEPS])

    def to_json(self) -> dict[str, Any]:
        """Returns every number as plain JSON data."""
        data = asdict(self)
        data["exact_is_exact"] = self.exact_is_exact
        for run, entry in zip(self.runs, data["runs"], strict=True):
            entry["summary"] = run.summary() | {"largest_difference": self.largest_difference(run)}
        return data


def demo_preset(device: str, vocabulary: int) -> TrainConfig:
    """Returns the demo's settings: minutes on two CPU cores; a larger model, as memory allows, on a GPU."""
    if device == "cpu":
        return TrainConfig(
            model=ModelConfig(hidden=128, layers=4, heads=4),
            steps=50,
            batch=4,
            sequence=128,
            warmup=5,
            eval_tokens=4096,
        )
    sequence = 512
    batch = torch.cuda.mem_get_info()[0] // 2 // (BYTES_PER_LOGIT * vocabulary * sequence)
    return TrainConfig(
        model=ModelConfig(hidden=1024, layers=8, heads=16),
        steps=200,
        batch=min(16, max(1, batch)),
        sequence=sequence,
        learning_rate=1e-3,
        eval_tokens=131_072,
    )


def run_demo(
    given: Mapping[str, Any],
    run_dir: Path,
    command: str,
    console: Console,
    base: TrainConfig | None = None,
    load_tokenizer: Callable[[], Tokenizer] = tekken,
) -> int:
    """Trains three times and writes the report.

    Args:
        given: settings the user gave, by name.
        run_dir: folder for the results; must not exist or be empty.
        command: what the user typed, for the report.
        console: where progress and results are shown.
        base: the settings not in `given`; None for the demo's own.
        load_tokenizer: makes the tokenizer.

    Returns:
        The process's exit code: 0, or 1 if `Comparison.exact_is_exact` is False.

    Raises:
        InputError: something given cannot be used.
    """
    from logitless.demo.report import write_report  # matplotlib takes a second to import; an error above needs none

    folder = RunFolder(run_dir)
    folder.refuse_existing()
    created = time.strftime("%Y-%m-%d %H:%M:%S")
    device = resolve_device(TrainConfig(device=given.get("device", "auto"))).device
    with console.status("reading and tokenizing the text"):
        tokenizer = load_tokenizer()
        preset = base or demo_preset(device, tokenizer.vocabulary)
        config = resolve_device(with_flags(preset, given))
        corpus = load_corpus(config.text, tokenizer, folder.token_cache)
    check_size(corpus, config.batch, config.sequence)
    console.print(
        f"decoder of {config.model.layers} layers, D={config.model.hidden}, V={corpus.vocabulary:,}; "
        f"{config.steps} steps of {config.tokens:,} tokens on {config.device} in {config.dtype}; "
        f"{len(corpus.train):,} tokens of text",
        highlight=False,
        soft_wrap=True,
    )

    for head in HEAD_KINDS:
        _warm_up(replace(config, head=head), corpus)
    gc.collect()
    runs, parameters = [], 0
    for head in HEAD_KINDS:
        run, parameters = _train(replace(config, head=head), corpus, console)
        runs.append(run)
        gc.collect()  # a model is full of cycles; without this its memory would count as the next run's level
        if config.device == "cuda":
            torch.cuda.empty_cache()

    comparison = Comparison(
        command=command,
        created=created,
        config=config,
        vocabulary=corpus.vocabulary,
        parameters=parameters,
        train_tokens=len(corpus.train),
        held_out_tokens=len(corpus.held_out),
        memory=memory_meter(config.device).what,
        hardware=describe_hardware(config.device),
        software=describe_software(),
        runs=tuple(runs),
    )
    run_dir.mkdir(parents=True, exist_ok=True)
    with atomic_write(run_dir / "results.json") as file:
        file.write(json.dumps(comparison.to_json(), indent=1).encode())
    write_report(comparison, run_dir)
    _print_results(comparison, run_dir, console)
    return 1 if comparison.exact_is_exact is False else 0


def _warm_up(config: TrainConfig, corpus: Corpus) -> None:
    """Does a small step, for libraries to load and kernels to compile: else the first run would pay for it."""
    with memory_meter(config.device) as meter:
        Trainer(replace(config, batch=1), corpus, meter).advance()


def _train(config: TrainConfig, corpus: Corpus, console: Console) -> tuple[RunResult, int]:
    began = time.perf_counter()
    with (
        memory_meter(config.device) as meter,
        StepProgress(console, config.head, config.steps, config.tokens) as progress,
    ):
        trainer = Trainer(config, corpus, meter)
        records = []
        while trainer.step < config.steps:
            records.append(trainer.advance())
            progress.update(records[-1])
        held_out_loss = trainer.held_out_loss()
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return RunResult(config.head, config.tokens, tuple(records), held_out_loss, time.perf_counter() - began), parameters


def _print_results(comparison: Comparison, run_dir: Path, console: Console) -> None:
    table = Table(caption="in brackets: ratio to two-stage")
    table.add_column("")
    for run in comparison.runs:
        table.add_column(run.head, justify="right")
    summaries = [run.summary() for run in comparison.runs]

    def add(label: str, name: str, form: Callable[[float], str]) -> None:
        ratios = [ratio(summary[name], summaries[0][name]) for summary in summaries]
        cells = [f"{form(summary[name])} ({value:.2f})" for summary, value in zip(summaries, ratios, strict=True)]
        table.add_row(label, form(summaries[0][name]), *cells[1:])

    differences = [f"{comparison.largest_difference(run):.1e}" for run in comparison.runs[1:]]
    table.add_row("held-out loss (nats)", *(f"{run.held_out_loss:.4f}" for run in comparison.runs))
    table.add_row("largest loss difference (nats)", "", *differences)
    add("peak memory of the head", "head_bytes", format_bytes)
    add("peak memory of training", "peak_bytes", format_bytes)
    add("tokens per second", "tokens_per_second", "{:,.0f}".format)
    add("time of a step (ms)", "step_seconds", _milliseconds)
    add("of which head (ms)", "head_seconds", _milliseconds)
    console.print(table)
    if comparison.exact_is_exact is not None:
        verdict = "within" if comparison.exact_is_exact else "[bold red]NOT within[/]"
        judged = min(comparison.config.steps, JUDGED_STEPS)
        console.print(f"exact is {verdict} {LARGEST_DIFFERENCE:g} of two-stage at steps 1 to {judged}", highlight=False)
    console.print(f"report: {run_dir / 'report.html'}", soft_wrap=True, highlight=False)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"
