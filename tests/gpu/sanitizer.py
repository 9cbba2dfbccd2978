"""Runs each kernel once on a small problem, for ``compute-sanitizer --tool memcheck python tests/gpu/sanitizer.py``.

Also with ``--tool racecheck``. Sizes are ragged and rows are ignored; each strategy runs without options and with all
of them, which are different kernels.

``--tool initcheck python tests/gpu/sanitizer.py --initcheck`` runs in fp32 and without the strategies that write
through TMA, as cuBLAS's own bf16 products do: that tool takes what TMA wrote for
unwritten. ``test_no_memory_is_read_before_it_is_written`` covers the rest.
"""

from __future__ import annotations

import argparse

import torch

import logitless
from logitless.options import FLOAT_OUTPUTS, TOKEN_OUTPUTS
from logitless.schedules import force_strategy

TOKENS, HIDDEN, VOCABULARY = 200, 64, 1000
LIBRARY_LOGITS = (
    {"strategy": "stored", "prepared": True},
    {"strategy": "chunked", "rows": 120},
)
COPY_ENGINE = (
    {"strategy": "stored"},
    {"strategy": "windowed", "window": 256, "kept": 1},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--initcheck", action="store_true", help="only what initcheck can follow")
    initcheck = parser.parse_args().initcheck
    torch.manual_seed(0)
    dtype = torch.float32 if initcheck else torch.bfloat16
    on_host = torch.randn(TOKENS + VOCABULARY, HIDDEN).to(dtype).cuda()
    hidden, weight = on_host[:TOKENS].clone().requires_grad_(), on_host[TOKENS:].clone().requires_grad_()
    target = torch.arange(TOKENS) * 5
    target[::3] = -100
    target = target.cuda()
    vector = (torch.rand(VOCABULARY) + 0.5).cuda()
    bias = vector.clone().requires_grad_()
    options = {"weight": vector, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 10.0, "logit_scale": 0.5}
    for sizes in LIBRARY_LOGITS if initcheck else LIBRARY_LOGITS + COPY_ENGINE:
        with force_strategy(**sizes):
            for given in ({}, {**options, "linear_bias": bias}):
                logitless.linear_cross_entropy(hidden, weight, target, backend="triton", **given).backward()
    sample(hidden, weight, target, {**options, "linear_bias": bias})
    if not initcheck:
        recompute(hidden, weight, target, bias)
    with torch.no_grad(), force_strategy("loss_only", rows=120):
        logitless.linear_cross_entropy(hidden, weight, target, backend="triton")
        logitless.token_statistics(hidden, weight, target, outputs=TOKEN_OUTPUTS, backend="triton")
    torch.cuda.synchronize()
    print("sanitized")


def sample(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, options: dict) -> None:
    """The sampled gradient; the second time with the hidden states' added up in order."""
    for given, in_order in (({}, False), (options, True)):
        torch.use_deterministic_algorithms(in_order, warn_only=True)
        gradient = logitless.Sampled(1 / 8)
        logitless.linear_cross_entropy(hidden, weight, target, backend="triton", gradient=gradient, **given).backward()
    torch.use_deterministic_algorithms(False)
    if torch.cuda.get_device_capability() >= (8, 9):
        for left_out in ("softcap", "label_smoothing"):  # which that scan does not take together
            given = {name: value for name, value in options.items() if name != left_out}
            gradient = logitless.Sampled(1 / 8, scan="fp8")
            logitless.linear_cross_entropy(hidden, weight, target, gradient=gradient, **given).backward()


def recompute(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor) -> None:
    """Windows alone, into a caller's buffer, twice; and gradients of every output."""
    main_grad = torch.zeros(weight.shape, device=weight.device)
    with force_strategy("windowed", window=256, aliased=0):
        loss = logitless.linear_cross_entropy(hidden, weight, target, backend="triton", main_grad=main_grad)
        loss.backward(retain_graph=True)
        loss.backward()
        statistics = logitless.token_statistics(
            hidden, weight, target, outputs=TOKEN_OUTPUTS, linear_bias=bias, softcap=10.0, backend="triton"
        )
        sum(getattr(statistics, name).sum() for name in FLOAT_OUTPUTS).backward()


if __name__ == "__main__":
    main()
