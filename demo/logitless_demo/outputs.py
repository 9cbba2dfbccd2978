"""Whether results can be written where they are wanted, found out before they are computed."""

from __future__ import annotations

import tempfile
from pathlib import Path

from logitless_demo.errors import InputError


def check_output_folder(flag: str, folder: Path) -> None:
    """Checks that files can be written in a folder, which need not exist; makes nothing.

    Raises:
        InputError: they cannot; the message begins with the flag.
    """
    existing = folder
    try:
        while not existing.exists():
            existing = existing.parent
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{flag}: nothing can be written to {existing} ({reason}): give another path") from error


def check_output_file(flag: str, path: Path) -> None:
    """Checks that a file can be written or replaced.

    Raises:
        InputError: it cannot; the message begins with the flag.
    """
    check_output_folder(flag, path.parent)
    try:
        taken = path.is_dir()
    except OSError as error:  # a name too long
        raise InputError(f"{flag}: {path} cannot be written ({error.strerror}): give another path") from error
    if taken:
        raise InputError(f"{flag} must be a file, got the folder {path}: give the name of a file in it")
