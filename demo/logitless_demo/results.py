"""What a comparison of heads found: what its report and its figures tell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from logitless_demo.config import TrainConfig
from logitless_demo.train import StepRecord

# In float32 two ways to the same loss differ by rounding alone, which stays far below this for a hundred steps.
# Training is chaotic, so that in the end any difference grows: later steps are not judged.
LARGEST_DIFFERENCE = 1e-3
JUDGED_STEPS = 100
LAST_STEPS = 10


@dataclass(frozen=True)
class RunResult:
    """One training run of the three.

    Attributes:
        head: which head it used.
        tokens: tokens a step.
        records: its steps.
        held_out_loss: after the last step.
        total_seconds: from making the model to the held-out loss.
    """

    head: str
    tokens: int
    records: tuple[StepRecord, ...]
    held_out_loss: float
    total_seconds: float

    @property
    def losses(self) -> list[float]:
        """The loss of each step."""
        return [record.loss for record in self.records]

    def typical(self, name: str) -> float:
        """Returns the median over the steps of a number in their records."""
        return median(getattr(record, name) for record in self.records)

    def summary(self) -> dict[str, float]:
        """Returns the run in a few numbers; times are medians over the steps, memory is the highest."""
        return {
            "training_loss": fmean(self.losses[-LAST_STEPS:]),
            "held_out_loss": self.held_out_loss,
            "peak_bytes": max(record.peak_bytes for record in self.records),
            "head_bytes": max(record.head_bytes for record in self.records),
            "tokens_per_second": self.tokens / self.typical("seconds"),
            "step_seconds": self.typical("seconds"),
            "head_seconds": self.typical("head_seconds"),
            "body_seconds": self.typical("body_seconds"),
            "optimizer_seconds": self.typical("optimizer_seconds"),
            "total_seconds": self.total_seconds,
        }


@dataclass(frozen=True)
class Comparison:
    """All that the report tells.

    Attributes:
        command: what was typed.
        created: local time at the start.
        config: the settings, but for the head.
        vocabulary: token ids, V.
        parameters: weights of the model, the tied embedding counted once.
        train_tokens: tokens to learn from.
        held_out_tokens: tokens held out.
        memory: what the memory numbers count.
        hardware: parts of the machine.
        software: versions.
        runs: one for each head, two-stage first.
    """

    command: str
    created: str
    config: TrainConfig
    vocabulary: int
    parameters: int
    train_tokens: int
    held_out_tokens: int
    memory: str
    hardware: dict[str, str]
    software: dict[str, str]
    runs: tuple[RunResult, ...]

    def differences(self, run: RunResult) -> list[float]:
        """Returns, for each step, the run's loss minus that of the two-stage pipeline."""
        return [own - other for own, other in zip(run.losses, self.runs[0].losses, strict=True)]

    def largest_difference(self, run: RunResult) -> float:
        """Returns the largest of the differences, without its sign."""
        return max(map(abs, self.differences(run)))

    @property
    def exact_is_exact(self) -> bool | None:
        """Whether the exact head kept to the two-stage losses; None but in float32 on a CPU, where nothing blurs it."""
        if (self.config.device, self.config.dtype) != ("cpu", "float32"):
            return None
        exact = next(run for run in self.runs if run.head == "exact")
        return all(abs(difference) <= LARGEST_DIFFERENCE for difference in self.differences(exact)[:JUDGED_STEPS])

    def to_json(self) -> dict[str, Any]:
        """Returns every number as plain JSON data."""
        data = asdict(self)
        data["exact_is_exact"] = self.exact_is_exact
        for run, entry in zip(self.runs, data["runs"], strict=True):
            entry["summary"] = run.summary() | {"largest_difference": self.largest_difference(run)}
        return data
