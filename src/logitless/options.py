"""Every option a caller can set, defined once. Other modules pass these objects whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from logitless.arguments import check_choice, check_number

Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "reference", "torch", "triton"]
Scan = Literal["input", "fp8"]
FloatOutput = Literal["nll", "logsumexp", "entropy"]
IntegerOutput = Literal["prediction", "target_rank"]
TokenOutput = Literal[FloatOutput, IntegerOutput]

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)
BACKENDS: tuple[str, ...] = get_args(Backend)
SCANS: tuple[Scan, ...] = get_args(Scan)
FLOAT_OUTPUTS: tuple[str, ...] = get_args(FloatOutput)
INTEGER_OUTPUTS: tuple[str, ...] = get_args(IntegerOutput)
TOKEN_OUTPUTS: tuple[str, ...] = FLOAT_OUTPUTS + INTEGER_OUTPUTS
# What a scan in fewer bits can be corrected for. A mean of logits could be estimated in the same way, but with an error
# of the logits' size, and an index not at all.
ESTIMATED_OUTPUTS: tuple[str, ...] = ("nll", "logsumexp")

# Vocabulary entries in one block of the sampled gradient. A block is what is kept or left out as a whole: wide enough
# for a matrix product to be worth its start, narrow enough for the softmax mass to sit in few blocks.
BLOCK = 128


@dataclass(frozen=True)
class Sampled:
    """The sampled gradient: exact loss, unbiased gradient, a backward pass that does not grow with the vocabulary.

    Per token, a block of 128 vocabulary entries that holds softmax mass ``m`` is kept with probability
    ``min(1, m / threshold)`` and, if kept, weighted by the inverse of that probability. At most ``1 / threshold + 1``
    blocks a token are kept, whatever the distribution, besides the target's own.

    Attributes:
        threshold: softmax mass from which a block is always kept, in (0, 1]. Smaller is more exact and slower.
        scan: precision of the product that finds the mass. ``"input"``: that of the inputs, and the loss is exact.
            ``"fp8"``: operands in eight bits, in 0.6 of the time on devices with tensor cores for them, and the weight
            in eight bits beside it during the forward pass; what the blocks that are kept say in full precision
            corrects the log-sum-exp, so that the loss becomes an estimate, with an error below that of bf16 logits.
            Not with entropy, prediction or target rank.
        generator: source of the random uniforms, on the CPU or on the device of the input; None for PyTorch's default
            generator of the input's device. The same seed gives the same gradient.
    """

    threshold: float = 1 / 64
    scan: Scan = "input"
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        threshold = check_number("Sampled(threshold=...)", self.threshold)
        if not 0 < threshold <= 1:
            raise ValueError(f"Sampled(threshold=...) must lie in (0, 1], got {self.threshold}")
        check_number("Sampled(threshold=...)", threshold, underflows=False)
        object.__setattr__(self, "threshold", threshold)
        object.__setattr__(self, "scan", check_choice("Sampled(scan=...)", self.scan, SCANS))
        if self.generator is not None and not isinstance(self.generator, torch.Generator):
            raise TypeError(
                f"Sampled(generator=...) must be a torch.Generator or None, got {type(self.generator).__name__}"
            )


@dataclass(frozen=True)
class HeadOptions:
    """What stands between the projection and the softmax: ``z = cap(logit_scale * <x, w_v> + bias_v)``."""

    logit_scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class LossOptions:
    """What turns a token's statistics into its loss, and the losses of all tokens into one number."""

    reduction: Reduction = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
