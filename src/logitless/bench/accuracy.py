"""What a peer computes, what it should, and how far the two are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from logitless.bench.cases import Inputs
from logitless.bench.peers import Loss

# Of the reference's logits. Products of fewer rows lose speed, and more rows hold memory the measured peers may need.
CHUNK_BYTES = 512 << 20


@dataclass(frozen=True)
class Gradients:
    """Loss and gradients: loss [], hidden [N, D], weight [V, D]."""

    loss: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor


@dataclass(frozen=True)
class Errors:
    """How far loss and gradients are from the reference.

    Attributes:
        loss: absolute.
        hidden: relative, of the gradient of the hidden states in the Frobenius norm.
        weight: that of the weight's.
    """

    loss: float
    hidden: float
    weight: float


def compute(loss: Loss, inputs: Inputs) -> Gradients:
    """One forward and backward pass on leaves of its own, which hold no gradient to add to."""
    hidden, weight = inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_()
    value = loss(hidden, weight, inputs.target)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return Gradients(value.detach(), hidden.grad, weight.grad)


def reference(inputs: Inputs, chunk_bytes: int = CHUNK_BYTES) -> Gradients:
    """The two-stage pipeline in the next wider dtype, without TF32, a few rows' logits at a time; no ignored targets.

    Holds the weight and its gradient in that dtype, and about twice ``chunk_bytes``.
    """
    wider = torch.float64 if inputs.hidden.dtype == torch.float32 else torch.float32
    weight = inputs.weight.to(wider)
    tokens, vocabulary = inputs.hidden.shape[0], weight.shape[0]
    loss = torch.zeros((), dtype=torch.float64, device=weight.device)
    hidden_gradient = torch.empty_like(inputs.hidden, dtype=wider)
    weight_gradient = torch.zeros_like(weight)
    rows = max(1, chunk_bytes // (vocabulary * wider.itemsize))
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        parts = zip(inputs.hidden.split(rows), inputs.target.split(rows), hidden_gradient.split(rows), strict=True)
        for narrow, target, gradient in parts:
            hidden = narrow.to(wider)
            logits, index = hidden @ weight.T, target[:, None]
            logsumexp = logits.logsumexp(1, keepdim=True)
            loss += (logsumexp - logits.gather(1, index)).sum(dtype=torch.float64)
            softmax = logits.sub_(logsumexp).exp_()
            logits_gradient = softmax.scatter_add_(1, index, torch.full_like(logsumexp, -1)).div_(tokens)
            torch.mm(logits_gradient, weight, out=gradient)
            weight_gradient.addmm_(logits_gradient.T, hidden)
    finally:
        torch.set_float32_matmul_precision(precision)
    return Gradients(loss / tokens, hidden_gradient, weight_gradient)


def errors(computed: Gradients, right: Gradients) -> Errors:
    """How far ``computed`` is from the reference."""

    def relative(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.to(b.dtype) - b).norm() / b.norm())

    return Errors(
        float((computed.loss.to(right.loss.dtype) - right.loss).abs()),
        relative(computed.hidden, right.hidden),
        relative(computed.weight, right.weight),
    )
