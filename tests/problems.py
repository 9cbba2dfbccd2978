"""Makes the inputs of the tests: hidden states, head and targets of every kind, and sets of options in pairs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

# Exact in every dtype, so that an upstream gradient adds no rounding of its own.
UPSTREAM = 0.3125

DATA = ("random", "peaked", "flat", "mixed", "offset")


@dataclass(frozen=True)
class Problem:
    """The arguments of one call. What is differentiated is what requires a gradient."""

    input: Tensor  # [..., hidden]
    linear_weight: Tensor  # [vocabulary, hidden]
    target: Tensor  # [...]
    options: dict[str, object]

    def leaves(self) -> dict[str, Tensor]:
        """The differentiable tensors that require a gradient, by argument name."""
        tensors = {
            "input": self.input,
            "linear_weight": self.linear_weight,
            "linear_bias": self.options.get("linear_bias"),
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None and tensor.requires_grad}

    def map(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """The same problem with every floating-point tensor changed, its need of a gradient kept."""

        def changed(value):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return change(value.detach()).requires_grad_(value.requires_grad)

        options = {name: changed(value) for name, value in self.options.items()}
        return replace(self, input=changed(self.input), linear_weight=changed(self.linear_weight), options=options)

    def to(self, dtype: torch.dtype) -> Problem:
        return self.map(lambda tensor: tensor.to(dtype, copy=True))

    def with_options(self, **options) -> Problem:
        return replace(self, options={**self.options, **options})

    def freeze(self, *names: str) -> Problem:
        """The same problem without gradients for the arguments named."""
        copy = self.map(torch.clone)
        for name, tensor in copy.leaves().items():
            tensor.requires_grad_(name not in names)
        return copy

    def call(self, function: Callable, **overrides):
        return function(self.input, self.linear_weight, self.target, **{**self.options, **overrides})


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_problem(tokens: int, hidden: int, vocabulary: int, seed: int = 0) -> Problem:
    """Normal logits with a standard deviation of two."""
    random = generator(seed)
    return Problem(
        input=torch.randn(tokens, hidden, generator=random, dtype=torch.float64).requires_grad_(),
        linear_weight=(
            torch.randn(vocabulary, hidden, generator=random, dtype=torch.float64) * 2 / hidden**0.5
        ).requires_grad_(),
        target=torch.randint(vocabulary, (tokens,), generator=random),
        options={},
    )


def peaked_problem(tokens: int, hidden: int, vocabulary: int, seed: int = 0) -> Problem:
    """Almost all mass on one entry: three tokens of four are sure of their target, the fourth of something else."""
    problem = random_problem(tokens, hidden, vocabulary, seed)
    favourite = torch.randint(vocabulary, (tokens,), generator=generator(seed + 1))
    direction = problem.linear_weight.detach()[favourite]
    hidden_states = 16 * direction / direction.square().sum(1, keepdim=True)
    sure = torch.arange(tokens) % 4 != 3
    return replace(problem, input=hidden_states.requires_grad_(), target=torch.where(sure, favourite, problem.target))


def flat_problem(tokens: int, hidden: int, vocabulary: int, seed: int = 0) -> Problem:
    """Almost equal logits: as at the start of training."""
    problem = random_problem(tokens, hidden, vocabulary, seed)
    return replace(problem, input=(problem.input.detach() / 64).requires_grad_())


def mixed_problem(tokens: int, hidden: int, vocabulary: int, seed: int = 0) -> Problem:
    """Random, peaked and flat tokens in turn."""
    kinds = [make(tokens, hidden, vocabulary, seed) for make in (random_problem, peaked_problem, flat_problem)]
    turn = torch.arange(tokens) % 3
    return replace(
        kinds[0],
        input=torch.stack([kind.input.detach() for kind in kinds])[turn, torch.arange(tokens)].requires_grad_(),
        target=torch.stack([kind.target for kind in kinds])[turn, torch.arange(tokens)],
    )


def offset_problem(tokens: int, hidden: int, vocabulary: int, seed: int = 0) -> Problem:
    """Such tokens again, with 48 added to all logits, as a last channel that all rows of the head share does."""
    problem = mixed_problem(tokens, hidden, vocabulary, seed)
    input, weight = problem.input.detach().clone(), problem.linear_weight.detach().clone()
    input[:, -1], weight[:, -1] = 48.0, 1.0
    return replace(problem, input=input.requires_grad_(), linear_weight=weight.requires_grad_())


def make_problem(data: str, tokens: int, hidden: int, vocabulary: int, seed: int = 0) -> Problem:
    makers = {
        "random": random_problem,
        "peaked": peaked_problem,
        "flat": flat_problem,
        "mixed": mixed_problem,
        "offset": offset_problem,
    }
    return makers[data](tokens, hidden, vocabulary, seed)


# A file of a trained head, hidden states and labels of real text: see CONTRIBUTING.md.
TRAINED_HEAD = os.environ.get("LOGITLESS_TRAINED_HEAD", "")


def dequantize_q8(packed: Tensor) -> Tensor:
    """Unpack rows of 34-byte groups, each an fp16 scale and 32 signed bytes, to fp32."""
    groups = packed.unflatten(1, (-1, 34))
    scales = groups[..., :2].clone().view(torch.float16)
    return groups[..., 2:].clone().view(torch.int8).mul(scales.float()).flatten(1)


@lru_cache(maxsize=1)
def _trained_head() -> tuple[Tensor, Tensor, Tensor]:
    stored = torch.load(TRAINED_HEAD)
    return stored["hidden"].float(), dequantize_q8(stored["q8"]), stored["labels"]


def smollm2_problem(tokens: int, vocabulary: int | None = None) -> Problem:
    """A trained language model's head on its own hidden states, cut to the first ``vocabulary`` entries.

    Takes the first tokens whose label is left after the cut. Skips the test where no file is named.
    """
    if not TRAINED_HEAD:
        pytest.skip("no trained head; set LOGITLESS_TRAINED_HEAD")
    hidden, weight, labels = _trained_head()
    weight = weight[:vocabulary]
    rows = (labels < weight.shape[0]).nonzero().squeeze(1)[:tokens]
    return Problem(hidden[rows].requires_grad_(), weight.clone().requires_grad_(), labels[rows], {})


def widen(problem: Problem, hidden: int) -> Problem:
    """The same logits at a larger hidden size: input and weight turned by one matrix with orthonormal rows."""
    narrow = problem.input.shape[-1]
    square = torch.randn(hidden, hidden, generator=generator(0), dtype=torch.float64)
    turn = torch.linalg.qr(square).Q[:narrow].to(problem.input.dtype)
    return replace(
        problem,
        input=(problem.input.detach() @ turn).requires_grad_(),
        linear_weight=(problem.linear_weight.detach() @ turn).requires_grad_(),
    )


def coarse(*shape: int, low: float, high: float, seed: int) -> Tensor:
    """Random multiples of 1/16, which every dtype holds exactly."""
    steps = torch.randint(round(low * 16), round(high * 16) + 1, shape, generator=generator(seed), device="cpu")
    return steps.double() / 16


@dataclass(frozen=True)
class Case:
    """One choice of everything a call can vary in."""

    dtype: torch.dtype = torch.float64
    data: str = "random"
    vocabulary: int = 203
    leading: tuple[int, ...] = (17,)
    reduction: str = "mean"
    normalizer: float | None = None
    bias: bool = False
    class_weight: bool = False
    token_weight: bool = False
    ignored: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0
    frozen: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What differs from the default, short enough for a test's name."""
        changed = [
            f"{name}={str(value).removeprefix('torch.')}"
            for name, value in vars(self).items()
            if value != type(self).__dataclass_fields__[name].default
        ]
        return ",".join(changed).replace(" ", "") or "default"

    def problem(self) -> Problem:
        tokens = torch.Size(self.leading).numel()
        problem = make_problem(self.data, tokens, 24, self.vocabulary)
        if self.data == "offset" and self.softcap is not None:  # far beyond the cap all that is left is rounding
            problem.input.detach()[:, -1] = self.softcap
        options: dict[str, object] = {
            "reduction": self.reduction,
            "label_smoothing": self.label_smoothing,
            "z_loss": self.z_loss,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
        }
        if self.normalizer is not None:
            options["normalizer"] = self.normalizer
        if self.bias:
            options["linear_bias"] = torch.randn(
                self.vocabulary, generator=generator(2), dtype=torch.float64
            ).requires_grad_()
        if self.class_weight:
            options["weight"] = coarse(self.vocabulary, low=0.5, high=2, seed=3)
        if self.token_weight:
            options["token_weight"] = coarse(*self.leading, low=-1, high=2, seed=4)
        target = problem.target
        if self.ignored:
            target = target.masked_fill(torch.arange(tokens) % 3 == 1, -100)
        problem = replace(
            problem,
            input=problem.input.detach().view(*self.leading, problem.input.shape[-1]).requires_grad_(),
            target=target.view(self.leading),
            options=options,
        )
        return problem.freeze(*self.frozen).to(self.dtype)

    def head_problem(self) -> Problem:
        """The problem with only the options of the head, which are those token statistics have."""
        problem = self.problem()
        options = {k: v for k, v in problem.options.items() if k in ("linear_bias", "softcap", "logit_scale")}
        return replace(problem, options=options)


# Every value a conformance case can take. Cases cover each pair of values of two factors at least once.
LOSS_FACTORS: dict[str, tuple] = {
    "dtype": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "data": DATA,
    "reduction": ("mean", "sum", "none", "normalizer"),
    "vocabulary": (203, 515, 128),
    "bias": (False, True),
    "class_weight": (False, True),
    "token_weight": (False, True),
    "ignored": (False, True),
    "label_smoothing": (0.0, 0.125),
    "z_loss": (0.0, 2.0**-7),
    "softcap": (None, 5.0),
    "logit_scale": (1.0, 0.75),
    "frozen": ((), ("input",), ("linear_weight",)),
}

STATISTICS_FACTORS = {
    name: LOSS_FACTORS[name]
    for name in ("dtype", "data", "vocabulary", "bias", "ignored", "softcap", "logit_scale", "frozen")
}


def all_pairs(factors: dict[str, tuple]) -> list[dict[str, object]]:
    """A small list of choices in which every pair of values of two factors occurs.

    Greedy: each choice starts from the first pair still missing, then takes for each other factor the value that covers
    the most missing pairs.
    """
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }

    def pairs(choice: dict[str, int]) -> Iterable[tuple]:
        return itertools.combinations(((name, choice[name]) for name in names if name in choice), 2)

    def gain(choice: dict[str, int]) -> int:
        return sum(pair in missing for pair in pairs(choice))

    chosen = []
    while missing:
        choice = dict(min(missing))
        for name in names:
            if name not in choice:
                choices = [{**choice, name: index} for index in range(len(factors[name]))]
                choice = max(choices, key=gain)
        missing -= set(pairs(choice))
        chosen.append({name: factors[name][choice[name]] for name in names})
    return chosen


def loss_cases() -> list[Case]:
    cases = []
    for choice in all_pairs(LOSS_FACTORS):
        if choice["reduction"] == "normalizer":
            choice = {**choice, "reduction": "mean", "normalizer": 7.5}
        cases.append(Case(**choice))
    return cases


def statistics_cases() -> list[Case]:
    return [Case(**choice) for choice in all_pairs(STATISTICS_FACTORS)]
