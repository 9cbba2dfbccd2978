"""Fixtures that several test files use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is defined: Triton then runs them in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


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
