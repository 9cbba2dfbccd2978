"""The backends by name. What a backend is stands in ``contract``."""

from __future__ import annotations

import importlib
from typing import cast

from logitless.backends.contract import BackendModule


def load(name: str) -> BackendModule:
    """The backend of that name; imported on first use, so that optional dependencies stay optional."""
    return cast("BackendModule", importlib.import_module(f"logitless.backends.{name}"))
