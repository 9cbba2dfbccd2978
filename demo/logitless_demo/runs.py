"""``logitless-demo train``: a run in a folder of its own that can be stopped at any moment and taken up again."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console

from logitless_demo.checkpoint import TEMPORARY_SUFFIX, atomic_write, load_checkpoint, save_checkpoint, truncate_log
from logitless_demo.config import TrainConfig, refuse_conflicts, with_flags
from logitless_demo.data import Corpus, Tokenizer, cached_corpus, check_size, load_corpus, tekken
from logitless_demo.errors import InputError
from logitless_demo.memory import MemoryMeter, memory_meter
from logitless_demo.outputs import check_output_folder
from logitless_demo.progress import StepProgress
from logitless_demo.train import Trainer, resolve_device

if TYPE_CHECKING:
    from logitless_demo.parallel import World

TOKEN_CACHE = ".tokens"  # beside the run folders, so that runs on the same text share it


@dataclass(frozen=True)
class RunFolder:
    """The files of one run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def settings(self) -> Path:
        """The run's settings and the key of its tokens; written once."""
        return self.path / "run.json"

    @property
    def log(self) -> Path:
        """One JSON line a step."""
        return self.path / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        """The state after some step."""
        return self.path / "checkpoint.pt"

    @property
    def token_cache(self) -> Path:
        """Where tokens are kept."""
        return self.path.parent / TOKEN_CACHE

    def refuse_existing(self) -> None:
        """Checks that a new run can be written, and that nothing would be overwritten.

        Raises:
            InputError: the path is taken, or cannot be written to.
        """
        for folder in (self.path, self.token_cache):
            check_output_folder("--run-dir", folder)
        if self.settings.exists():
            raise InputError(
                f"--run-dir: {self.path} already holds a run: go on with --resume {self.path}, or give another folder"
            )
        if self.path.exists() and any(self.path.iterdir()):
            raise InputError(f"--run-dir: {self.path} exists and is not an empty folder: give another")

    def create(self, config: TrainConfig, tokens_key: str) -> None:
        """Makes the folder and writes the settings."""
        self.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.settings) as file:
            file.write(json.dumps({"config": config.to_json(), "tokens": tokens_key}, indent=2).encode())

    def read(self) -> tuple[TrainConfig, str]:
        """Returns the settings and the key of the tokens.

        Raises:
            InputError: there is no run in the folder, or its settings cannot be read.
        """
        if not self.settings.is_file():
            raise InputError(f"--resume {self.path}: there is no run in this folder (no {self.settings.name})")
        check_output_folder("--resume", self.path)
        try:
            data = json.loads(self.settings.read_text())
            return TrainConfig.from_json(data["config"]), str(data["tokens"])
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"--resume: {self.settings} cannot be read ({error}): restore it, or start a new run"
            ) from error


@dataclass(frozen=True)
class Division:
    """Over how many processes a run is divided.

    Attributes:
        data: parts of each batch.
        tensor: parts of the vocabulary, and of each layer, within each of these.
    """

    data: int = 1
    tensor: int = 1


ALONE = Division()


def run_training(
    given: Mapping[str, Any],
    run_dir: Path,
    resume: bool,
    base: TrainConfig,
    console: Console,
    load_tokenizer: Callable[[], Tokenizer] = tekken,
    division: Division = ALONE,
) -> int:
    """Trains until the last step or a signal.

    Args:
        given: settings the user gave, by name.
        run_dir: the run's folder.
        resume: whether to go on with the run in it.
        base: the settings not in `given`, for a new run.
        console: where progress is shown.
        load_tokenizer: makes the tokenizer.
        division: over the processes that `torchrun` has started; a run may go on with another.

    Returns:
        The process's exit code: 0, or 128 plus the number of the signal that stopped the run.

    Raises:
        InputError: something given cannot be used.
    """
    from logitless_demo.parallel import check_sizes, join  # what shards weights takes a second to import

    if resume:
        config, tokens_key = RunFolder(run_dir).read()
        refuse_conflicts(config, given)
    else:
        config, tokens_key = with_flags(base, given), ""
    config = resolve_device(config)
    check_sizes(config, division.data, division.tensor)
    with join(division.data, division.tensor, config.device) as world:
        folder = RunFolder(run_dir if world is None else world.first_does(lambda: run_dir))
        if world is not None and not world.first:
            console = Console(quiet=True)

        def prepare() -> str:
            if resume:
                _same_corpus(folder, config, tokens_key, load_tokenizer())
                for leftover in folder.path.glob(f"*{TEMPORARY_SUFFIX}"):
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
                return tokens_key
            folder.refuse_existing()
            with console.status("reading and tokenizing the text"):
                corpus = load_corpus(config.text, load_tokenizer(), folder.token_cache)
            check_size(corpus, config.batch, config.sequence)
            folder.create(config, corpus.key)
            return corpus.key

        tokens_key = prepare() if world is None else world.first_does(prepare)
        corpus = _same_corpus(folder, config, tokens_key, load_tokenizer())
        with memory_meter(config.device) as meter:
            return _train(config, corpus, meter, world, folder, resume, console)


def _train(
    config: TrainConfig,
    corpus: Corpus,
    meter: MemoryMeter,
    world: World | None,
    folder: RunFolder,
    resume: bool,
    console: Console,
) -> int:
    """Makes the model and trains it; nothing has it any more when the exit code is returned."""
    trainer = Trainer(config, corpus, meter, world=world)
    _take_up(trainer, folder)
    if world is None or world.first:
        truncate_log(folder.log, trainer.step)
    if resume:
        console.print(f"resuming {folder.path} after step {trainer.step} of {config.steps}", highlight=False)
    return _train_to_the_end(trainer, folder, console)


def _take_up(trainer: Trainer, folder: RunFolder) -> None:
    """Goes on from the newest checkpoint, if there is one."""
    from logitless_demo.parallel import last_sharded, load_sharded

    sharded, alone = last_sharded(folder.path), None
    if folder.checkpoint.exists():
        alone = load_checkpoint(folder.checkpoint)
    if alone is not None and (sharded is None or int(alone["step"]) > sharded[1]):
        if trainer.world is not None:
            raise InputError(
                f"{folder.checkpoint} is of a run in one process: go on in one, or start a new run under torchrun"
            )
        trainer.load_state_dict(alone)
    elif sharded is not None:
        load_sharded(sharded[0], trainer.model, trainer.optimizer)
        trainer.go_on_from(sharded[1])


def _train_to_the_end(trainer: Trainer, folder: RunFolder, console: Console) -> int:
    config, world = trainer.config, trainer.world
    path = folder.log if world is None or world.first else Path(os.devnull)
    with (
        _stop_request() as stop,
        path.open("a", buffering=1) as log,
        StepProgress(console, config.head, config.steps, config.tokens, done=trainer.step) as progress,
    ):
        stopped = 0
        while trainer.step < config.steps and not stopped:
            record = trainer.advance()
            last = trainer.step == config.steps
            if last or _due(trainer.step, config.eval_every):
                record = replace(record, held_out_loss=trainer.held_out_loss())
            log.write(json.dumps(asdict(record)) + "\n")
            progress.update(record)
            stopped = stop.signal or 0
            if world is not None:  # a signal may reach some processes a step before the others
                stopped = world.largest(stopped)
            if last or stopped or _due(trainer.step, config.checkpoint_every):
                if path == folder.log:
                    os.fsync(log.fileno())  # the log must never miss a step that the checkpoint has done
                _save(trainer, folder)
    if trainer.step < config.steps:
        console.print(
            f"stopped after step {trainer.step} of {config.steps}; "
            f"go on with: logitless-demo train --resume {shlex.quote(str(folder.path))}",
            soft_wrap=True,
            highlight=False,
        )
        return 128 + stopped
    console.print(f"all {config.steps} steps done: {folder.path}", soft_wrap=True, highlight=False)
    return 0


def _save(trainer: Trainer, folder: RunFolder) -> None:
    if trainer.world is None:
        save_checkpoint(folder.checkpoint, trainer.state_dict())
        return
    from logitless_demo.parallel import save_sharded

    save_sharded(folder.path, trainer.world, trainer.model, trainer.optimizer, trainer.step)


def _same_corpus(folder: RunFolder, config: TrainConfig, key: str, tokenizer: Tokenizer) -> Corpus:
    corpus = cached_corpus(key, tokenizer, folder.token_cache)
    if corpus is None:
        corpus = load_corpus(config.text, tokenizer, folder.token_cache)
        if corpus.key != key:
            raise InputError(
                f"the text at {config.text or 'the standard library'} is no longer what {folder.path} was started on: "
                "restore it, or start a new run"
            )
    return corpus


@dataclass
class _StopRequest:
    signal: int | None = None


@contextmanager
def _stop_request() -> Iterator[_StopRequest]:
    """Turns the first SIGINT or SIGTERM into a request to stop after the current step; a second one acts as usual."""
    request = _StopRequest()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: FrameType | None) -> None:
        request.signal = number
        signal.signal(number, previous[signal.Signals(number)])

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
