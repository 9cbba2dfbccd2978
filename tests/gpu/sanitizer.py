"""Runs each kernel once on a small problem, for ``compute-sanitizer --tool memcheck python tests/gpu/sanitizer.py``.

Also with ``--tool racecheck`` and ``--tool initcheck``. Sizes are ragged and rows are ignored; each strategy runs
without options and with all of them, which are different kernels.
"""

from __future__ import annotations

import torch

import logitless
from logitless.options import FLOAT_OUTPUTS, TOKEN_OUTPUTS
from logitless.schedules import force_strategy

TOKENS, HIDDEN, VOCABULARY = 200, 64, 1000
STRATEGIES = (
    {"strategy": "stored", "prepared": True},
    {"strategy": "stored"},
    {"strategy": "chunked", "rows": 120},
    {"strategy": "windowed", "window": 256, "kept": 1},
)


def main() -> None:
    torch.manual_seed(0)
    on_host = torch.randn(TOKENS + VOCABULARY, HIDDEN).bfloat16().cuda()
    hidden, weight = on_host[:TOKENS].clone().requires_grad_(), on_host[TOKENS:].clone().requires_grad_()
    target = torch.arange(TOKENS) * 5
    target[::3] = -100
    target = target.cuda()
    vector = (torch.rand(VOCABULARY) + 0.5).cuda()
    bias = vector.clone().requires_grad_()
    main_grad = torch.zeros(VOCABULARY, HIDDEN).cuda()
    options = {"weight": vector, "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 10.0, "logit_scale": 0.5}
    for sizes in STRATEGIES:
        with force_strategy(**sizes):
            for given in ({}, {**options, "linear_bias": bias}):
                logitless.linear_cross_entropy(hidden, weight, target, backend="triton", **given).backward()
    with force_strategy("windowed", window=256, lodged=0):
        loss = logitless.linear_cross_entropy(hidden, weight, target, backend="triton", main_grad=main_grad)
        loss.backward(retain_graph=True)
        loss.backward()
        statistics = logitless.token_statistics(
            hidden, weight, target, outputs=TOKEN_OUTPUTS, linear_bias=bias, softcap=10.0, backend="triton"
        )
        sum(getattr(statistics, name).sum() for name in FLOAT_OUTPUTS).backward()
    with torch.no_grad(), force_strategy("loss_only", rows=120):
        logitless.linear_cross_entropy(hidden, weight, target, backend="triton")
    torch.cuda.synchronize()
    print("sanitized")


if __name__ == "__main__":
    main()
