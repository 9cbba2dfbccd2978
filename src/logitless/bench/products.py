"""The bound: the matrix products that a loss with gradients cannot do without, by the library's own routines."""

from __future__ import annotations

import torch

from logitless.bench.cases import Inputs
from logitless.bench.clock import Runs

NAME = "matrix products"


def products(inputs: Inputs) -> Runs:
    """Forward: logits. Both: logits, gradient of the hidden states, gradient of the weight, at full size.

    The buffers are there before the clock starts. Logits stand in for their gradient: the values do not matter, only
    that they are not constant, on which products run faster.
    """
    hidden, weight = inputs.hidden, inputs.weight
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0])
    hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.empty_like(weight)

    def forward() -> None:
        torch.mm(hidden, weight.T, out=logits)

    def both() -> None:
        forward()
        torch.mm(logits, weight, out=hidden_gradient)
        torch.mm(logits.T, hidden, out=weight_gradient)

    return Runs(forward, both)
