"""What surrounds a call changes nothing of the precision it computes in, and finds its settings again."""

from __future__ import annotations

import pytest
import torch

from logitless.precision import FEWER_DIGITS, full_precision_accumulation

GPU = torch.device("cuda")  # settings can be made without one


def settings() -> list[bool]:
    return [getattr(torch.backends.cuda.matmul, name) for name in FEWER_DIGITS]


@pytest.fixture(params=[True, False])
def before(request):
    known = settings()
    for name in FEWER_DIGITS:
        setattr(torch.backends.cuda.matmul, name, request.param)
    yield [request.param] * len(FEWER_DIGITS)
    for name, value in zip(FEWER_DIGITS, known, strict=True):
        setattr(torch.backends.cuda.matmul, name, value)


def test_sums_are_unrounded(before):
    with full_precision_accumulation(GPU):
        assert settings() == [False] * len(FEWER_DIGITS)
        with full_precision_accumulation(GPU):
            assert settings() == [False] * len(FEWER_DIGITS)
        assert settings() == [False] * len(FEWER_DIGITS)
    assert settings() == before


def test_until_the_last_is_out(before):
    """Threads that come and go by turns, as those of several devices do."""
    first, second = full_precision_accumulation(GPU), full_precision_accumulation(GPU)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings() == [False] * len(FEWER_DIGITS)
    second.__exit__(None, None, None)
    assert settings() == before


def test_settings_after_an_error(before):
    with pytest.raises(KeyError), full_precision_accumulation(GPU):
        raise KeyError
    assert settings() == before


def test_other_devices_settings_stay(before):
    with full_precision_accumulation(torch.device("cpu")):
        assert settings() == before


def test_no_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        with full_precision_accumulation(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
