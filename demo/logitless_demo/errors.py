"""The one exception that the command line shows as a line of text instead of a traceback."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what and how to mend it."""
