"""The training loop: one step, what it took, and the state to go on from."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from logitless.demo.config import TrainConfig
from logitless.demo.data import WEIGHT_STREAM, Corpus, derived_seed, held_out_batches, training_batch
from logitless.demo.errors import InputError
from logitless.demo.heads import head_loss
from logitless.demo.memory import MemoryMeter
from logitless.demo.model import Decoder

LOWEST_RATE = 0.1  # of the highest, at the end of the cosine
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class StepRecord:
    """One step in numbers; a line of the log.

    Attributes:
        step: steps done, this one included.
        loss: mean over the step's tokens, before the update.
        learning_rate: of this update.
        gradient_norm: before clipping.
        seconds: the whole step, from making the batch to the updated weights.
        body_seconds: forward and backward of the decoder, without the head.
        head_seconds: forward and backward of the head.
        optimizer_seconds: clipping and update.
        peak_bytes: highest memory during the step, above the level before the model was made.
        head_bytes: highest memory during the head, above the level just before it; holds the gradient of the weight.
        held_out_loss: after the update, where it was measured.
    """

    step: int
    loss: float
    learning_rate: float
    gradient_norm: float
    seconds: float
    body_seconds: float
    head_seconds: float
    optimizer_seconds: float
    peak_bytes: int
    head_bytes: int
    held_out_loss: float | None = None


def resolve_device(config: TrainConfig) -> TrainConfig:
    """Returns `config` with `auto` replaced by what this machine has.

    Raises:
        InputError: a GPU was asked for and there is none.
    """
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here: use --device cpu")
    dtype = config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    return replace(config, device=device, dtype=dtype)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the rate of a step, counted from 0: linear warm-up, then a cosine down to a tenth."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (LOWEST_RATE + (1 - LOWEST_RATE) * (1 + math.cos(math.pi * progress)) / 2)


class Trainer:
    """A model in training.

    Args:
        config: the settings, with device and dtype resolved.
        corpus: the tokens.
        meter: a started memory meter.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, meter: MemoryMeter) -> None:
        self.config = config
        self.corpus = corpus
        self.meter = meter
        self.step = 0
        self._base_bytes = meter.level()
        seed = derived_seed(config.seed, WEIGHT_STREAM, 0)
        self.model = Decoder(config.model, corpus.vocabulary, seed).to(config.device)
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in self.model.parameters() if parameter.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            fused=True,
        )

    def advance(self) -> StepRecord:
        """Does one step.

        Raises:
            InputError: the loss is not a number; the weights are as before the step.
        """
        config, meter = self.config, self.meter
        meter.reset()
        began = self._now()
        inputs, target = training_batch(
            self.corpus.train, config.seed, self.step, config.batch, config.sequence
        )  # fmt: skip
        inputs, target = inputs.to(config.device), target.to(config.device)

        body_began = self._now()
        hidden = self._hidden(inputs)
        head_began = self._now()
        body_peak, head_level = meter.peak(), meter.level()
        meter.reset()

        # The graph is cut between body and head, so that each backward pass can be timed by itself.
        features = hidden.detach().requires_grad_()
        loss = head_loss(features, self._head_weight(), target.flatten(), self.step, config)
        loss.backward()
        head_ended = self._now()
        head_peak = meter.peak()
        meter.reset()

        hidden.backward(features.grad)
        body_ended = self._now()
        if not math.isfinite(loss.item()):
            raise InputError(
                f"the loss of step {self.step + 1} is {loss.item()}: lower --learning-rate or set --gradient-clip"
            )

        rate = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        limit = config.gradient_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        ended = self._now()

        self.step += 1
        return StepRecord(
            step=self.step,
            loss=loss.item(),
            learning_rate=rate,
            gradient_norm=norm.item(),
            seconds=ended - began,
            body_seconds=(head_began - body_began) + (body_ended - head_ended),
            head_seconds=head_ended - head_began,
            optimizer_seconds=ended - body_ended,
            peak_bytes=max(body_peak, head_peak, meter.peak()) - self._base_bytes,
            head_bytes=head_peak - head_level,
        )

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Returns the mean loss over the held-out text, by the run's own head."""
        config = self.config
        total, count = 0.0, 0
        for inputs, target in held_out_batches(
            self.corpus.held_out, config.eval_tokens, config.batch, config.sequence
        ):  # fmt: skip
            hidden = self._hidden(inputs.to(config.device))
            target = target.flatten().to(config.device)
            total += len(target) * head_loss(hidden, self._head_weight(), target, self.step, config).item()
            count += len(target)
        return total / count

    def state_dict(self) -> dict[str, Any]:
        """Returns all that the next step depends on, besides the settings and the text."""
        return {"step": self.step, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` returned.

        Raises:
            InputError: the state is that of another model.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"the checkpoint does not fit this model ({str(error).splitlines()[0]})") from error

    def _hidden(self, inputs: Tensor) -> Tensor:
        """Maps token ids `[B, T]` to hidden states `[B * T, D]` in the type of the products."""
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.config.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self.model(inputs).flatten(0, 1).to(dtype)

    def _head_weight(self) -> Tensor:
        return self.model.head_weight.to(DTYPES[self.config.dtype])

    def _now(self) -> float:
        if self.config.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
