"""``logitless-demo compare``: one model, one text, one seed, three heads."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from logitless_demo.checkpoint import atomic_write
from logitless_demo.config import HEAD_KINDS, ModelConfig, TrainConfig, with_flags
from logitless_demo.data import Corpus, Tokenizer, check_size, load_corpus, tekken
from logitless_demo.environment import describe_hardware, describe_software
from logitless_demo.memory import format_bytes, memory_meter
from logitless_demo.progress import StepProgress
from logitless_demo.ratios import ratio
from logitless_demo.results import JUDGED_STEPS, LARGEST_DIFFERENCE, Comparison, RunResult
from logitless_demo.runs import RunFolder
from logitless_demo.train import Trainer, resolve_device

# What the two-stage head holds for each logit on a GPU, in bytes: bfloat16 and float32 logits and gradients of both.
BYTES_PER_LOGIT = 16


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
    from logitless_demo.report import write_report  # matplotlib takes a second to import; an error above needs none

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
