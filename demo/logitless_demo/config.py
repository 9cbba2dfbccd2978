"""Every setting of a training run, defined once; the command line's flags are derived from it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from logitless_demo.errors import InputError

HeadKind = Literal["two-stage", "exact", "sampled", "compiled"]
Optimizer = Literal["adamw", "sgd"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bfloat16"]
Scan = Literal["input", "fp8"]

SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16"}

HEAD_KINDS: tuple[HeadKind, ...] = ("two-stage", "exact", "sampled")  # that `logitless-demo compare` trains


@dataclass(frozen=True)
class ModelConfig:
    """The size of the decoder. The vocabulary is the tokenizer's, so it is not set here."""

    hidden: Annotated[int, "width D of the hidden states"] = 128
    layers: Annotated[int, "decoder layers"] = 4
    heads: Annotated[int, "attention heads; must divide the width into even parts"] = 4

    def __post_init__(self) -> None:
        _require_positive(self, "hidden", "layers", "heads")
        if self.hidden % (2 * self.heads):
            raise InputError(
                f"--hidden must be a multiple of twice --heads (rotary attention turns pairs of numbers), "
                f"got --hidden {self.hidden} and --heads {self.heads}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Equal settings on the same text and machine give equal losses, bit for bit on a CPU."""

    model: ModelConfig = field(default_factory=ModelConfig)
    text: Annotated[str | None, "file, folder or glob to learn from (default: Python's own standard library)"] = None
    head: Annotated[
        HeadKind,
        "two-stage: with logits; exact: without; sampled: without, sampled gradient; "
        "compiled: two-stage under torch.compile",
    ] = "exact"
    threshold: Annotated[float, "sampled head: softmax mass from which a block of tokens is always kept"] = 1 / 64
    scan: Annotated[Scan, "sampled head: precision of the product that finds that mass; fp8: the loss is estimated"] = (
        "input"
    )
    steps: Annotated[int, "optimiser steps"] = 1000
    batch: Annotated[int, "sequences a step"] = 8
    sequence: Annotated[int, "tokens a sequence"] = 128
    optimizer: Annotated[Optimizer, "adamw, or sgd with momentum"] = "adamw"
    learning_rate: Annotated[float, "highest learning rate"] = 2e-3
    warmup: Annotated[int, "steps of linear warm-up, before a cosine down to a tenth of the highest rate"] = 20
    weight_decay: Annotated[float, "weight decay, on matrices only; decoupled in adamw, coupled in sgd"] = 0.1
    gradient_clip: Annotated[float, "largest norm of the gradient; 0 for no limit"] = 1.0
    seed: Annotated[int, "seed of the weights, of the order of the text and of the sampled gradient"] = 0
    device: Annotated[Device, "auto: a GPU where there is one"] = "auto"
    dtype: Annotated[Precision, "of the products; weights are float32. auto: bfloat16 on a GPU, else float32"] = "auto"
    eval_every: Annotated[int, "steps between measurements of the held-out loss; 0 for only at the end"] = 100
    eval_tokens: Annotated[int, "held-out tokens a measurement reads"] = 8192
    checkpoint_every: Annotated[int, "steps between checkpoints; 0 for only at the end"] = 200

    def __post_init__(self) -> None:
        _require_positive(self, "steps", "batch", "sequence", "learning_rate", "eval_tokens")
        for name in ("warmup", "weight_decay", "gradient_clip", "seed", "eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise InputError(f"{_flag(name)} must not be negative, got {getattr(self, name)}")
        if not 0 < self.threshold <= 1:
            raise InputError(f"--threshold must lie in (0, 1], got {self.threshold}")

    @property
    def tokens(self) -> int:
        """Tokens a step, N."""
        return self.batch * self.sequence

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as plain JSON data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainConfig:
        """Reads what `to_json` wrote.

        Raises:
            InputError: a setting is missing, unknown or out of range.
        """
        try:
            return cls(**{**data, "model": ModelConfig(**data["model"])})
        except (KeyError, TypeError) as error:
            raise InputError(f"these settings were written by another version of logitless ({error})") from error


def add_flags(
    parser: argparse.ArgumentParser, base: TrainConfig, without: Collection[str] = (), show_defaults: bool = True
) -> None:
    """Adds one flag a setting. A flag that is not given leaves no trace in the parsed namespace.

    Args:
        parser: receives the flags.
        base: the defaults the help shows.
        without: names of settings that get no flag.
        show_defaults: whether the help tells them.
    """
    for holder in (base, base.model):
        for name, (hint, text) in _settings(type(holder)).items():
            default = getattr(holder, name)
            if show_defaults and default is not None:
                text = f"{text} (default: {default})"
            if name not in without:
                parser.add_argument(
                    _flag(name), dest=name, default=argparse.SUPPRESS, help=text, **_argument_type(hint)
                )


def given_flags(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings the user gave, by name; a path in them is made absolute."""
    names = {*_settings(TrainConfig), *_settings(ModelConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    if "text" in given:
        given["text"] = os.path.abspath(os.path.expanduser(given["text"]))  # noqa: PTH100, PTH111 - may be a glob
    return given


def with_flags(base: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """Returns `base` with the settings in `given` in place of its own.

    Raises:
        InputError: a setting is out of range.
    """
    sizes = _settings(ModelConfig)
    model = replace(base.model, **{name: value for name, value in given.items() if name in sizes})
    return replace(base, model=model, **{name: value for name, value in given.items() if name not in sizes})


def refuse_conflicts(stored: TrainConfig, given: Mapping[str, Any]) -> None:
    """Checks that no flag asks for something else than the run to be resumed was started with.

    Raises:
        InputError: a flag differs from the stored setting.
    """
    kept = {**stored.to_json(), **stored.to_json()["model"]}
    for name, value in given.items():
        if value not in (kept[name], "auto"):
            raise InputError(
                f"{_flag(name)} {value} conflicts with the run to be resumed, which has {kept[name]}: "
                "leave the flag out, or start a new run without --resume"
            )


def _settings(holder: type) -> dict[str, tuple[Any, str]]:
    """Returns the type and the help of each setting that has a flag, by name."""
    hints = get_type_hints(holder, include_extras=True)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Annotated}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _number(text: str) -> float:
    try:
        return float(Fraction(text))  # takes 1/64 as well as 0.015625
    except (ValueError, ArithmeticError) as error:
        raise argparse.ArgumentTypeError(f"must be a number such as 0.1 or 1/64, got {text!r}") from error


def _argument_type(hint: Any) -> dict[str, Any]:
    if get_origin(hint) is Literal:
        names = {"choices": get_args(hint)}
        return {**names, "type": lambda name: SHORT_NAMES.get(name, name)} if hint == Precision else names
    if hint is int:
        return {"type": int, "metavar": "N"}
    if hint is float:
        return {"type": _number, "metavar": "X"}
    return {"metavar": "PATH"}


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        if getattr(config, name) <= 0:
            raise InputError(f"{_flag(name)} must be positive, got {getattr(config, name)}")
