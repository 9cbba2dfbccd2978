"""The kernels that round operands to eight bits, against ``logitless/fp8.py``."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from kernels import DEVICE, DTYPES
from logitless.backends.triton import fp8_quantize as kernels
from logitless.backends.triton.fp8_quantize import new_operand, operand_width, outlier_channels, quantize_rows
from logitless.fp8 import LARGEST, LEAST_SCALE, MAX_OUTLIERS, mean_row, quantize
from logitless.fp8 import outlier_channels as expected_channels
from problems import generator

pytestmark = pytest.mark.usefixtures("one_thread")


def matrix_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of all sizes, with channels of all sizes."""
    random = generator(rows + columns)
    matrix = torch.randn(rows, columns, generator=random) * torch.randn(rows, 1, generator=random).exp()
    return (matrix * torch.randn(columns, generator=random).exp()).to(DEVICE, dtype)


@pytest.mark.parametrize("size", [(1, 8), (5, 24), (70, 136), (3, 1000)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight", [False, True], ids=["hidden", "weight"])
def test_operand(size, dtype, weight):
    rows, columns = size
    matrix = matrix_of(rows, columns, dtype)
    channels = expected_channels(matrix)
    mean = mean_row(matrix)
    operand = new_operand(rows, columns, matrix.device, weight=weight)
    values, scale = operand.values, operand.scales
    assert values.shape == (rows, operand_width(columns))
    assert operand_width(columns) % 16 == 0
    quantize_rows(matrix, channels, mean, operand)
    expected = quantize(matrix.float() - mean if weight else matrix, channels)
    if operand.shifts is not None:
        torch.testing.assert_close(operand.shifts, matrix.float() @ mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scale, expected.scale, rtol=2e-7, atol=0)
    assert torch.equal(values[:, :columns].float(), expected.values.float())
    count, parts = channels.shape[0], [expected.values[:, channels], expected.left_over]
    for place, part in enumerate(reversed(parts) if weight else parts):
        start = columns + place * MAX_OUTLIERS
        assert torch.equal(values[:, start : start + count].float(), part.float())
        assert not values[:, start + count : start + MAX_OUTLIERS].float().any()
    assert not values[:, columns + 2 * MAX_OUTLIERS :].float().any()


def test_rows_wider_than_a_program_takes_at_once(monkeypatch):
    matrix = matrix_of(4, 200)
    channels, mean = torch.arange(MAX_OUTLIERS, device=DEVICE), mean_row(matrix)
    for weight in (True, False):
        monkeypatch.undo()
        whole, parts = (new_operand(4, 200, matrix.device, weight=weight) for _ in range(2))
        quantize_rows(matrix, channels, mean, whole)
        monkeypatch.setattr(kernels, "WIDEST", 64)
        quantize_rows(matrix, channels, mean, parts)
        assert torch.equal(whole.scales, parts.scales)
        assert torch.equal(whole.values.view(torch.uint8), parts.values.view(torch.uint8))
        if whole.shifts is not None and parts.shifts is not None:
            torch.testing.assert_close(whole.shifts, parts.shifts, rtol=1e-5, atol=1e-5)


def test_rows_without_numbers():
    """Zeros stay zeros, numbers too small for a scale of their own stay numbers; NaN and infinity leave NaN."""
    matrix = torch.ones(5, 16, device=DEVICE)
    matrix[0] = 0
    matrix[4] = 2.0**-120
    matrix[1, 3] = torch.inf
    matrix[2, 3] = torch.nan
    operand = new_operand(5, 16, matrix.device, weight=False)
    values, scale = operand.values, operand.scales
    quantize_rows(matrix, torch.arange(16, device=DEVICE), torch.zeros(16, device=DEVICE), operand)
    assert scale[0] == scale[4] == LEAST_SCALE
    assert not values[[0, 4], :16].float().any()
    products = values[:, :16].float().sum(1) * scale
    assert products[1:3].isnan().all()
    assert products[3] == 16
    assert values[3, :16].float().eq(LARGEST).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(1, 8), (300, 200)], ids=str)
def test_loud_channels(size, masked):
    hidden = matrix_of(*size)
    valid_mask = None
    if masked:
        valid_mask = torch.rand(size[0], generator=generator(0)).to(DEVICE) < 0.5
        expected = expected_channels(hidden[valid_mask]) if valid_mask.any() else None
        hidden[~valid_mask] = torch.nan
    else:
        expected = expected_channels(hidden)
    given = outlier_channels(hidden, valid_mask)
    assert given.shape == (min(MAX_OUTLIERS, size[1]),)
    if expected is not None:
        assert torch.equal(given, expected)
