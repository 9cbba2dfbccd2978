"""Files that are whole at any moment: a reader finds the old content or the new, never a part."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from logitless_demo.errors import InputError

TEMPORARY_SUFFIX = ".tmp"


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that takes the place of `path` when the block ends without an exception.

    The bytes go to a temporary file in the same folder, reach the disk, and only then get the name.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name must reach the disk too; other systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint of tensors and plain data."""
    with atomic_write(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint onto the CPU.

    Raises:
        InputError: the file is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not look at the checksums it has written
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is not a checkpoint that can be read ({_first_line(error)}): restore it, "
            "or remove it to start this run over from its first step"
        ) from error


def truncate_log(path: Path, step: int) -> None:
    """Cuts the lines past `step` off a JSON-lines log, and whatever follows a line that is not whole."""
    if not path.exists():
        return
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if _logged_step(line) > step:
                break
            kept += len(line)
    os.truncate(path, kept)


def _logged_step(line: bytes) -> float:
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except ValueError:
        return float("inf")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
