"""``logitless train`` on a small text with one id a byte; a script for one process, or several under torchrun."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from logitless.demo.config import ModelConfig, TrainConfig
from logitless.demo.data import Tokenizer
from logitless.demo.errors import InputError
from logitless.demo.parallel import end_process
from logitless.demo.runs import Division, run_training

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


def bytes_tokenizer() -> Tokenizer:
    """One id a byte, and one more before each document."""
    return Tokenizer("bytes", 301, 256, lambda text: list(text.encode()))


def main(text: str, folder: str, task: str, data: str, tensor: str, head: str, device: str) -> int:
    division, base = Division(int(data), int(tensor)), replace(TINY, device=device)
    given = {"text": text, "head": head} if task == "new" else {}
    try:
        resume = task == "resume"
        status = run_training(given, Path(folder), resume, base, Console(width=120), bytes_tokenizer, division)
        end_process(status)
        return status
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
