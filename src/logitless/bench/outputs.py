"""Whether results can be written where they are wanted, found out before anything is measured."""

from __future__ import annotations

import tempfile
from pathlib import Path

from logitless.errors import InputError


def check_output_file(flag: str, path: Path) -> None:
    """Checks that a file can be written or replaced, in a folder that need not exist; makes nothing.

    Raises:
        InputError: it cannot; the message begins with the flag.
    """
    folder = path.parent
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"{flag}: nothing can be written to {folder} ({reason}): give another path") from error
    try:
        taken = path.is_dir()
    except OSError as error:  # a name too long
        raise InputError(f"{flag}: {path} cannot be written ({error.strerror}): give another path") from error
    if taken:
        raise InputError(f"{flag} must be a file, got the folder {path}: give the name of a file in it")
