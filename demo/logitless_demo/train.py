"""The training loop: one step, what it took, and the state to go on from."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import logitless
from logitless_demo.config import TrainConfig
from logitless_demo.data import WEIGHT_STREAM, Corpus, derived_seed, held_out_batches, training_batch
from logitless_demo.errors import InputError
from logitless_demo.heads import head_loss
from logitless_demo.memory import MemoryMeter
from logitless_demo.model import Decoder

if TYPE_CHECKING:
    from logitless_demo.parallel import World

LOWEST_RATE = 0.1  # of the highest, at the end of the cosine
MOMENTUM = 0.9  # of SGD
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
        compile_body: whether the decoder runs through torch.compile; the head is left as it is.
        world: the processes that share the work, if there are several.
    """

    def __init__(
        self,
        config: TrainConfig,
        corpus: Corpus,
        meter: MemoryMeter,
        compile_body: bool = False,
        world: World | None = None,
    ) -> None:
        self.config = config
        self.corpus = corpus
        self.meter = meter
        self.world = world
        self.step = 0
        self._base_bytes = meter.level()
        seed = derived_seed(config.seed, WEIGHT_STREAM, 0)
        self.model = Decoder(config.model, corpus.vocabulary, config.sequence, seed).to(config.device)
        if world is not None:
            from logitless_demo.parallel import shard

            shard(self.model, world)
        self._body = torch.compile(self.model, dynamic=False) if compile_body else self.model
        self.optimizer = _make_optimizer(config, self.model)
        self._batch = self._make_batch(0)

    def advance(self) -> StepRecord:
        """Does one step.

        Raises:
            InputError: the loss is not a number; the weights are as before the step.
        """
        config, meter = self.config, self.meter
        meter.reset()
        inputs, target = self._batch
        clock = _Clock(config.device)
        hidden = self._hidden(inputs)
        clock.mark()
        body_peak, head_level = meter.peak(), meter.level()
        meter.reset()

        # The graph is cut between body and head, so that each backward pass can be timed by itself.
        features = hidden.detach().requires_grad_()
        loss = self._loss(features, target)
        loss.backward()
        clock.mark()
        head_peak = meter.peak()
        meter.reset()

        hidden.backward(features.grad)
        clock.mark()
        if self.world is not None:
            loss = self.world.mean(loss)
        if not math.isfinite(loss.item()):
            raise InputError(
                f"the loss of step {self.step + 1} is {loss.item()}: lower --learning-rate or set --gradient-clip"
            )

        rate = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        limit = config.gradient_clip or math.inf
        if self.world is None:
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        else:
            from logitless_demo.parallel import clip_gradients

            norm = clip_gradients(self.model, limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.mark()

        self.step += 1
        self._batch = self._make_batch(self.step)  # while a GPU is still busy with this step
        clock.mark()
        forward, head, backward, optimizer, batch = clock.seconds()
        return StepRecord(
            step=self.step,
            loss=loss.item(),
            learning_rate=rate,
            gradient_norm=norm.item(),
            seconds=forward + head + backward + optimizer + batch,
            body_seconds=forward + backward,
            head_seconds=head,
            optimizer_seconds=optimizer,
            peak_bytes=max(body_peak, head_peak, meter.peak()) - self._base_bytes,
            head_bytes=head_peak - head_level,
        )

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Returns the mean loss over the held-out text, by the run's own head."""
        total, count = 0.0, 0
        for hidden, target in self._held_out():
            total += len(target) * self._loss(hidden, target).item()
            count += len(target)
        return total / count

    def _loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Returns the mean loss of hidden states `[N, D]` and targets `[N]` by the run's head."""
        group, part = (None, 0) if self.world is None else (self.world.tensor_group, self.world.part)
        return head_loss(hidden, self._head_weight(), target, self.step, self.config, group, part)

    @torch.no_grad()
    def held_out_nll(self) -> Tensor:
        """Returns the loss of each held-out token `[tokens]`, float32 on the CPU, exact whatever the run's head."""
        weight = self._head_weight()
        return torch.cat(
            [
                logitless.linear_cross_entropy(hidden, weight, target, reduction="none").cpu()
                for hidden, target in self._held_out()
            ]
        )

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
            self.go_on_from(int(state["step"]))
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(f"the checkpoint does not fit this model ({str(error).splitlines()[0]})") from error

    def go_on_from(self, step: int) -> None:
        """Takes up the text after some step."""
        self.step = step
        self._batch = self._make_batch(step)

    def _make_batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Returns the inputs `[B, T]` and the targets `[N]` of a step, on the device."""
        config = self.config
        inputs, target = training_batch(self.corpus.train, config.seed, step, config.batch, config.sequence)
        if self.world is not None:
            inputs, target = self.world.own(inputs), self.world.own(target)
        if config.device == "cuda":  # from pinned memory, so that the copy does not wait for the device
            inputs, target = inputs.pin_memory(), target.pin_memory()
        return inputs.to(config.device, non_blocking=True), target.flatten().to(config.device, non_blocking=True)

    def _hidden(self, inputs: Tensor) -> Tensor:
        """Maps token ids `[B, T]` to hidden states `[B * T, D]` in the type of the products."""
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.config.device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return self._body(inputs).flatten(0, 1).to(dtype)

    def _held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields hidden states `[N, D]` and targets `[N]` of each batch of the held-out text."""
        config = self.config
        for inputs, target in held_out_batches(
            self.corpus.held_out, config.eval_tokens, config.batch, config.sequence
        ):  # fmt: skip
            yield self._hidden(inputs.to(config.device)), target.flatten().to(config.device)

    def _head_weight(self) -> Tensor:
        return self.model.head_weight.to(DTYPES[self.config.dtype])


class _Clock:
    """Moments of a step, the first when it is made. On a GPU they are events, so that the host can run ahead."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._moments: list[Any] = []
        self.mark()

    def mark(self) -> None:
        """Notes the end of a section."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Returns how long each section took; waits for the last to end."""
        if self._on_gpu:
            self._moments[-1].synchronize()
            return [began.elapsed_time(ended) / 1e3 for began, ended in pairwise(self._moments)]
        return [ended - began for began, ended in pairwise(self._moments)]


def _make_optimizer(config: TrainConfig, model: Decoder) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, momentum=MOMENTUM, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
