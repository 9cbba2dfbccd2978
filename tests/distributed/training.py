"""``logitless-demo train`` on a small text with one id a byte; a script for one process, or several under torchrun."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from logitless_demo.config import ModelConfig, TrainConfig
from logitless_demo.data import Tokenizer
from logitless_demo.errors import InputError
from logitless_demo.runs import Division, run_training
from logitless_demo.train import StepRecord, Trainer

TINY = replace(
    TrainConfig(),
    model=ModelConfig(hidden=32, layers=2, heads=4),
    steps=6,
    batch=4,
    sequence=16,
    warmup=2,
    eval_every=3,
    eval_tokens=128,
    checkpoint_every=2,
    dtype="float32",
)

LEFT = 70  # exit code where threads outlive the run: they may abort the process while Python ends


def bytes_tokenizer() -> Tokenizer:
    """One id a byte, and one more before each document."""
    return Tokenizer("bytes", 301, 256, lambda text: list(text.encode()))


def main(text: str, folder: str, task: str, data: str, tensor: str, head: str, device: str) -> int:
    division, base = Division(int(data), int(tensor)), replace(TINY, device=device)
    resume = task == "resume"
    given = {} if resume else {"text": text, "head": head}
    if task == "killed":
        sys.stderr.write(f"process {os.getpid()}\n")  # in one piece, beside the others
        Trainer.advance = killed_before(3)
    try:
        return run_training(given, Path(folder), resume, base, Console(width=120), bytes_tokenizer, division)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def killed_before(step: int) -> Callable[[Trainer], StepRecord]:
    """``Trainer.advance`` that kills the last process when a step begins."""
    advance = Trainer.advance

    def advance_or_die(trainer: Trainer) -> StepRecord:
        if trainer.step + 1 == step and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return advance(trainer)

    return advance_or_die


def threads_of_groups() -> list[str]:
    """Names of this process's threads that belong to gloo groups; of none where the system does not tell."""
    names = []
    for name in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # it has ended meanwhile
            names.append(name.read_text().strip())
    return [name for name in names if "gloo" in name]


def threads_left() -> list[str]:
    """The same after a while: the system may list a thread that has been joined a moment longer."""
    deadline = time.monotonic() + 10
    while threads_of_groups() and time.monotonic() < deadline:
        time.sleep(0.01)
    return threads_of_groups()


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    if left := threads_left():
        print(f"process {os.getpid()}: left after the run: {left}", file=sys.stderr)
        code = LEFT
    sys.exit(code)
