"""Kernels in Triton: for NVIDIA GPUs, and on any CPU in Triton's interpreter, for tests."""

from __future__ import annotations

import torch

from logitless.backends.contract import (
    AffineCoefficients,
    Coefficients,
    Gradients,
    Problem,
    Schedule,
    Shape,
    Statistics,
    TensorForm,
)
from logitless.backends.triton import dense, prepared, sampled, selection, tiles
from logitless.backends.triton.memory import blocks, index_of
from logitless.backends.triton.memory import cost as cost
from logitless.backends.triton.memory import window_multiple as window_multiple
from logitless.backends.triton.memory import workspace as workspace
from logitless.backends.triton.prepared import finish as finish
from logitless.backends.triton.prepared import forward_with_gradients as forward_with_gradients

READS_MATRIX = True

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Bytes to which TMA wants rows aligned, in elements of the hidden size.
HIDDEN_MULTIPLE = 8


def unsupported(shape: Shape) -> str | None:
    """The reason why a problem needs another backend, or None."""
    if shape.device_type != "cuda" and not (shape.device_type == "cpu" and tiles.interpreted()):
        return f"it needs a CUDA device, and the tensors are on {shape.device_type!r}"
    if torch.version.hip is not None:
        return "its tiles and tensor cores are those of NVIDIA's GPUs, and PyTorch is built for AMD's"
    if shape.compute_dtype not in DTYPES:
        return f"it computes in bf16, fp16 and fp32, not in {str(shape.compute_dtype).removeprefix('torch.')}"
    if shape.compute_dtype == torch.bfloat16 and tiles.interpreted():
        return "Triton's interpreter misreads bf16 operands"
    if shape.estimated and not tiles.has_fp8_mma(index_of(shape)):
        return "the device has no fp8 tensor cores for Sampled(scan='fp8'); these come with compute capability 8.9"
    if shape.estimated and shape.softcapped and "smooth_logit" in shape.statistics:
        return "under a softcap it smooths labels only with Sampled(scan='input')"
    if shape.hidden % HIDDEN_MULTIPLE:
        return f"the hidden size must be a multiple of {HIDDEN_MULTIPLE} for TMA, got {shape.hidden}"
    return None


def saved_forms(shape: Shape, schedule: Schedule) -> list[TensorForm]:
    """What ``forward`` leaves under a schedule."""
    if schedule.prepared:
        return prepared.saved_forms(shape)
    if schedule.strategy == "sampled":
        return selection.saved_forms(shape)
    return dense.saved_forms(shape, schedule, blocks(shape))


def recomputed(problem: Problem, schedule: Schedule) -> tuple[torch.Tensor, ...]:
    """What a forward pass saves that keeps nothing for the backward pass: the order of the rows."""
    return dense.recomputed(problem, schedule)


def forward(problem: Problem, schedule: Schedule, ahead: AffineCoefficients | None) -> Statistics:
    """Statistics of every row, and what the schedule keeps for the backward pass."""
    if schedule.prepared:
        assert ahead is not None
        return prepared.forward(problem, ahead)
    if schedule.strategy == "sampled":
        return sampled.forward(problem, schedule)
    return dense.forward(problem, schedule)


def backward(problem: Problem, schedule: Schedule, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Gradients from statistics and coefficients."""
    if schedule.strategy == "sampled":
        return sampled.backward(problem, statistics, coefficients)
    return dense.backward(problem, schedule, statistics, coefficients)
