"""``logitless-demo converge``: runs with the exact and the sampled gradient, each in a file of its own when it ends."""

from __future__ import annotations

import copy
import gc
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from logitless_demo.checkpoint import atomic_write, load_checkpoint, save_checkpoint
from logitless_demo.config import TrainConfig
from logitless_demo.convergence_summary import standard_error, summarise
from logitless_demo.data import Corpus, held_out_batches
from logitless_demo.environment import describe_hardware, describe_software
from logitless_demo.errors import InputError
from logitless_demo.frequency import loss_by_frequency, rows_by_frequency
from logitless_demo.memory import memory_meter
from logitless_demo.outputs import check_output_folder
from logitless_demo.progress import StepProgress
from logitless_demo.study import RUNS, SGD_LEARNING_RATE
from logitless_demo.tokens import load_tokens
from logitless_demo.train import StepRecord, Trainer, resolve_device

# Steps before the clock starts, which are undone: they load libraries, compile and allocate.
WARM_UP_STEPS = 3
STEP_FIELDS = ("loss", "gradient_norm", "seconds", "head_seconds")


@dataclass(frozen=True)
class StudyConfig:
    """What to run.

    Attributes:
        tokens: file of the tokens.
        output: folder of the results.
        base: the settings all runs share.
        runs: names of runs.
        sgd_learning_rate: highest rate of the runs with SGD.
        compile_body: whether the decoder, without its head, runs through torch.compile; None for only on a GPU.
    """

    tokens: Path
    output: Path
    base: TrainConfig
    runs: tuple[str, ...] = tuple(RUNS)
    sgd_learning_rate: float = SGD_LEARNING_RATE
    compile_body: bool | None = None


def run_study(study: StudyConfig, command: str, console: Console) -> int:
    """Does the runs that have no file yet, and summarises all that have one.

    Args:
        study: what to run.
        command: what the user typed, for the results.
        console: where progress and results are shown.

    Returns:
        The process's exit code: 0, or 1 if a run could not go on, such as one whose loss is no number.

    Raises:
        InputError: something given cannot be used.
    """
    base = resolve_device(study.base)
    compile_body = base.device == "cuda" if study.compile_body is None else study.compile_body
    configs = _configs(study, base)
    check_output_folder("--output", study.output)
    corpus = load_tokens(study.tokens)
    _check_size(corpus, base)
    settings = {
        name: {"config": config.to_json(), "tokens": corpus.key, "compiled_body": compile_body}
        for name, config in configs.items()
    }
    # Runs that are not asked for are summarised too, so they must fit.
    finished = [name for name in configs if _is_finished(study.output / f"{name}.json", settings[name])]
    if finished:
        console.print(f"finished before: {', '.join(finished)}", highlight=False, soft_wrap=True)
    study.output.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in configs if name in study.runs and name not in finished]
    _check_starts(study.output, wanted)
    failures = 0
    for name in wanted:
        try:
            trainer, measured = _train(name, configs[name], corpus, compile_body, study.output, console)
            if any(RUNS[other].start == name for other in wanted):
                save_checkpoint(_weights(study.output, name), trainer.model.state_dict())
        except InputError as error:
            console.print(f"{name}: given up, {error}", highlight=False, soft_wrap=True)
            failures += 1
            continue
        finally:
            trainer = None
            gc.collect()  # a model is full of cycles, which keep its memory
            if base.device == "cuda":
                torch.cuda.empty_cache()
        about = {
            "name": name,
            "command": command,
            "ended": time.strftime("%Y-%m-%d %H:%M:%S"),
            "hardware": describe_hardware(base.device),
            "software": describe_software(),
        }
        with atomic_write(study.output / f"{name}.json") as file:
            file.write(json.dumps({**about, **settings[name], **measured}).encode())
    summarise(study.output, console)
    return 1 if failures else 0


def _configs(study: StudyConfig, base: TrainConfig) -> dict[str, TrainConfig]:
    """Returns the settings of every run, in the order they run."""
    unknown = [name for name in study.runs if name not in RUNS]
    if unknown:
        raise InputError(f"--runs must be among {', '.join(map(repr, RUNS))}, got {unknown[0]!r}")
    if not (0 < study.sgd_learning_rate < math.inf):
        raise InputError(f"--sgd-learning-rate must be positive, got {study.sgd_learning_rate}")
    return {name: run.config(base, study.sgd_learning_rate) for name, run in RUNS.items()}


def _weights(output: Path, name: str) -> Path:
    """Returns the file of a run's last weights, which is written where a run starts from them."""
    return output / f"{name}.pt"


def _check_starts(output: Path, wanted: list[str]) -> None:
    for name in wanted:
        start = RUNS[name].start
        if start is not None and start not in wanted and not _weights(output, start).exists():
            raise InputError(
                f"--runs: {name} starts from the weights of {start}, and {_weights(output, start)} is not there: "
                f"name {start} too, and remove {output / start}.json if it is there"
            )


def _check_size(corpus: Corpus, config: TrainConfig) -> None:
    needed = (config.batch + 1) * config.sequence
    if len(corpus.train) < needed or len(corpus.held_out) <= config.sequence:
        raise InputError(
            f"--tokens: {len(corpus.train)} tokens to train on and {len(corpus.held_out)} held out, needed are "
            f"{needed} and {config.sequence + 1}: prepare more text, or lower --sequence or --batch"
        )


def _is_finished(path: Path, settings: dict[str, Any]) -> bool:
    """Returns whether the run has its file.

    Raises:
        InputError: the file is of a run with other settings, or cannot be read.
    """
    if not path.exists():
        return False
    try:
        stored = json.loads(path.read_text())
        differing = [name for name, value in _flat(settings).items() if _flat(stored)[name] != value]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"--output: {path} cannot be read ({error!r}): remove it to do this run again") from error
    if differing:
        raise InputError(
            f"--output: {path} is of a run with another {differing[0]} ({_flat(stored)[differing[0]]}, "
            f"now {_flat(settings)[differing[0]]}): give another folder, or remove it to do this run again"
        )
    return True


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns every setting by its name alone."""
    config = dict(settings["config"])
    return {**config.pop("model"), **config, "tokens": settings["tokens"], "compiled_body": settings["compiled_body"]}


def _train(
    name: str, config: TrainConfig, corpus: Corpus, compile_body: bool, output: Path, console: Console
) -> tuple[Trainer, dict[str, Any]]:
    """Trains and returns the trainer and what was measured."""
    torch.compiler.reset()  # what earlier runs compiled counts against a limit, past which nothing is compiled
    with (
        memory_meter(config.device) as meter,
        StepProgress(console, name, config.steps, config.tokens) as progress,
    ):
        trainer = Trainer(config, corpus, meter, compile_body)
        start = RUNS[name].start
        if start is not None:
            trainer.model.load_state_dict(load_checkpoint(_weights(output, start)))
        initial = trainer.model.head_weight.detach().clone()
        _warm_up(trainer)
        nll = trainer.held_out_nll()
        records: list[StepRecord] = []
        evaluations = [{"step": 0, "seconds": 0.0, "loss": nll.mean().item()}]
        while trainer.step < config.steps:
            record = trainer.advance()
            records.append(record)
            if trainer.step == config.steps or (config.eval_every and trainer.step % config.eval_every == 0):
                nll = trainer.held_out_nll()
                record = replace(record, held_out_loss=nll.mean().item())
                seconds = math.fsum(done.seconds for done in records)
                evaluations.append({"step": trainer.step, "seconds": seconds, "loss": record.held_out_loss})
            progress.update(record)
        weight = trainer.model.head_weight.detach()
        norm, drift = (rows.norm(dim=1).cpu().numpy() for rows in (weight, weight - initial))
    counts = np.bincount(corpus.train, minlength=corpus.vocabulary)
    return trainer, {
        "start": start,
        "vocabulary": corpus.vocabulary,
        "train_tokens": len(corpus.train),
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "steps": {field: [getattr(record, field) for record in records] for field in STEP_FIELDS},
        "evaluations": evaluations,
        "held_out": _held_out(nll, config.sequence),
        "losses": loss_by_frequency(nll.numpy(), _held_out_targets(corpus, config), counts),
        "rows": rows_by_frequency(norm, drift, counts),
    }


def _warm_up(trainer: Trainer) -> None:
    """Does a few steps and undoes them."""
    state = copy.deepcopy(trainer.state_dict())
    for _ in range(WARM_UP_STEPS):
        trainer.advance()
    trainer.load_state_dict(state)


def _held_out(nll: Tensor, sequence: int) -> dict[str, Any]:
    """Returns the loss of each held-out sequence, their mean, and its standard error, None of a single one."""
    losses = nll.view(-1, sequence).double().mean(1)
    return {
        "tokens": nll.numel(),
        "loss": losses.mean().item(),
        "standard_error": standard_error(losses.tolist()),
        "sequence_losses": losses.tolist(),
    }


def _held_out_targets(corpus: Corpus, config: TrainConfig) -> NDArray[np.int64]:
    """Returns the ids `[tokens]` whose losses `Trainer.held_out_nll` returns."""
    batches = held_out_batches(corpus.held_out, config.eval_tokens, config.batch, config.sequence)
    return torch.cat([target.flatten() for _, target in batches]).numpy()
