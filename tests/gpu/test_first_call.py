"""The first call of a process, which compiles its kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from on_gpu import NEEDS_GPU

pytestmark = NEEDS_GPU

SCRIPT = """
import time
import torch
import logitless

hidden = torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
weight = torch.randn(32_000, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
target = torch.randint(32_000, (2048,), device="cuda")
torch.mm(hidden, weight.T)
torch.cuda.synchronize()
start = time.perf_counter()
loss = logitless.linear_cross_entropy(hidden, weight, target, reduction="{reduction}")
loss.sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - start)
assert weight.grad.isfinite().all()
"""
# Far above what it takes: a bound on compilation that has run away, and no measurement.
MOST_SECONDS = 60


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_first_call(reduction, tmp_path):
    """With nothing compiled before."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(reduction=reduction)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    seconds = float(run.stdout)
    print(f"first call with reduction={reduction!r}: {seconds:.1f} s")
    assert seconds < MOST_SECONDS
