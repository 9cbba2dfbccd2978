"""Named problems: the shapes of real models, with random inputs or with those of a trained model.

N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from logitless.bench.trained import grow, load_trained_head, widen
from logitless.errors import InputError


@dataclass(frozen=True)
class Case:
    """A problem by name.

    Attributes:
        name: how the command line and the reports call it.
        tokens: N.
        hidden: D.
        vocabulary: V. A trained head that has fewer entries is grown to it; one that has more is taken as it is.
        trained: whether inputs come from a trained model, so that the softmax is a real one. Its rows of hidden states
            are repeated where they are too few.
        description: what it stands for.
        on_device: whether random inputs are drawn where the loss is computed, anew for every round. Meant for a GPU:
            drawing a billion numbers on a CPU takes longer than the benchmark.
    """

    name: str
    tokens: int
    hidden: int
    vocabulary: int
    trained: bool
    description: str
    on_device: bool = False


CASES = {
    case.name: case
    for case in (
        Case("gpt2", 2048, 768, 50304, False, "GPT-2 small's head, random inputs"),
        Case("tekken", 1024, 512, 131072, False, "a small model under a 131,072-token tokenizer, random inputs"),
        Case("smollm2", 2048, 768, 49152, True, "SmolLM2-135M's trained head on real text, widened to D=768"),
        Case("smollm2-narrow", 1024, 576, 49152, True, "SmolLM2-135M's trained head on real text, at its own width"),
        Case("llama3", 8192, 4096, 128256, False, "Llama 3 8B's head, random inputs", on_device=True),
        Case("gemma", 8192, 2304, 262144, False, "Gemma's vocabulary, random inputs", on_device=True),
        Case("gemma-long", 32768, 2304, 262144, False, "the same, four times the tokens", on_device=True),
        Case("llama3-trained", 8192, 4096, 128256, True, "SmolLM2-135M's trained head, grown to the size of llama3"),
        Case("gemma-trained", 8192, 2304, 262144, True, "SmolLM2-135M's trained head, grown to the size of gemma"),
    )
}


@dataclass(frozen=True)
class Inputs:
    """Tensors of one case.

    Attributes:
        hidden: [N, D].
        weight: [V, D].
        target: [N] int64.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    target: torch.Tensor


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int, trained_head: Path | None) -> Inputs:
    """Fresh inputs of a case.

    Raises:
        InputError: the case needs a trained head and none was given, or it is too narrow or has too few rows.
    """
    if case.on_device:
        inputs = Inputs(
            torch.empty(case.tokens, case.hidden, dtype=dtype, device=device),
            torch.empty(case.vocabulary, case.hidden, dtype=dtype, device=device),
            torch.empty(case.tokens, dtype=torch.int64, device=device),
        )
        redraw(inputs, seed)
        return inputs
    if not case.trained:
        generator = torch.Generator("cpu").manual_seed(seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
        hidden = normal(case.tokens, case.hidden)
        weight = normal(case.vocabulary, case.hidden) / case.hidden**0.5
        target = torch.randint(0, case.vocabulary, (case.tokens,), generator=generator, device="cpu")
    else:
        if trained_head is None:
            raise InputError(f"case {case.name!r} needs the file of a trained head: give it with --trained-head FILE")
        head = load_trained_head(trained_head)
        rows = torch.arange(case.tokens, device="cpu") % head.hidden.shape[0]
        hidden, weight = widen(head.hidden[rows].to(device), head.weight.to(device), case.hidden)
        weight, target = grow(weight, case.vocabulary), head.target[rows]
    return Inputs(hidden.to(device, dtype), weight.to(device, dtype), target.to(device))


def redraw(inputs: Inputs, seed: int) -> None:
    """Fill the tensors with fresh random numbers, in place: hidden states N(0, 1), weight N(0, 1) / sqrt(D)."""
    generator = torch.Generator(inputs.hidden.device).manual_seed(seed)
    vocabulary, width = inputs.weight.shape
    inputs.hidden.normal_(generator=generator)
    inputs.weight.normal_(std=width**-0.5, generator=generator)
    inputs.target.random_(vocabulary, generator=generator)
