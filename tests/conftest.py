"""Fixtures that several test files use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch

WITHOUT_GPU = not torch.cuda.is_available()
if WITHOUT_GPU:
    # Before any kernel is defined: Triton then runs them in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def quick_interpreter() -> Iterator[None]:
    """Makes ready for a module's device functions once, not at each call of one, which takes half of a kernel's time.

    What the interpreter exchanges in Triton's language for a launch it exchanges again, with the same result, for each
    device function that the kernel calls.
    """
    if not (WITHOUT_GPU and find_spec("triton")):
        yield
        return
    from triton.runtime import interpreter

    ready: set[str] = set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn.__module__ not in ready:
            ready.add(function.fn.__module__)
            return plain(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    plain = interpreter.InterpretedFunction.__call__
    interpreter.InterpretedFunction.__call__ = call
    yield
    interpreter.InterpretedFunction.__call__ = plain


@pytest.fixture
def one_thread():
    """For thousands of small products, whose threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """PyTorch asked for algorithms that give the same bits each time; new memory is filled with NaN then."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
