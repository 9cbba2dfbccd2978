"""Weak scaling: steps of `logitless-demo train`, in each of its processes."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import asdict, dataclass

import numpy as np
from over_ranks.problems import Settings
from over_ranks.processes import Member

from logitless_demo.config import ModelConfig, TrainConfig
from logitless_demo.data import Corpus
from logitless_demo.memory import memory_meter
from logitless_demo.parallel import check_sizes, join
from logitless_demo.train import Trainer, resolve_device


@dataclass(frozen=True)
class Training:
    """Sizes of the training runs; the batch is for each GPU."""

    vocabulary: int = 131_072
    hidden: int = 1024
    layers: int = 8
    heads: int = 16
    batch: int = 16
    sequence: int = 1024
    steps: int = 24
    warmup: int = 4  # steps that do not count


TOY_TRAINING = Training(vocabulary=1000, hidden=32, layers=2, heads=4, batch=2, sequence=16, steps=6, warmup=2)


def measure_training(member: Member, port: int, data: int, tensor: int, sizes: Training, settings: Settings) -> None:
    """Steps of the training loop, in each of its processes."""
    names = {"RANK": member.rank, "LOCAL_RANK": member.rank, "WORLD_SIZE": member.ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    config = TrainConfig(
        model=ModelConfig(hidden=sizes.hidden, layers=sizes.layers, heads=sizes.heads),
        batch=sizes.batch * member.ranks,
        sequence=sizes.sequence,
        steps=sizes.steps,
        warmup=sizes.warmup,
        device=settings.kind,  # type: ignore[arg-type]
        seed=settings.seed,
    )
    config = resolve_device(config)
    check_sizes(config, data, tensor)
    member.tell("at", (f"training, data {data}, tensor {tensor}", "", "start"))
    with join(data, tensor, config.device) as world, memory_meter(config.device) as meter:
        trainer = Trainer(config, synthetic_corpus(sizes, config.batch), meter, world=world)
        records = []
        for step in range(sizes.steps):
            if step % 8 == 0:
                member.tell("at", (f"training, data {data}, tensor {tensor}", "", f"step {step} of {sizes.steps}"))
            member.come_together()
            began = time.perf_counter()
            record = trainer.advance()  # it ends by asking the device for the loss
            records.append({**asdict(record), "host_seconds": time.perf_counter() - began})
        everyone = member.gathered(records)
    counted = range(sizes.warmup, sizes.steps)

    def median_of(name: str) -> float:
        return statistics.median(max(mine[step][name] for mine in everyone) for step in counted)

    tokens, step = config.tokens, median_of("seconds")
    member.tell(
        "found",
        {
            "data": data,
            "tensor": tensor,
            "gpus": member.ranks,
            "tokens_a_step": tokens,
            "steps_s": [[mine[step]["seconds"] for mine in everyone] for step in range(sizes.steps)],
            "median_s": step,
            "host_median_s": median_of("host_seconds"),
            "body_s": median_of("body_seconds"),
            "head_s": median_of("head_seconds"),
            "optimizer_s": median_of("optimizer_seconds"),
            "tokens_a_second": tokens / step,
            "tokens_a_second_a_gpu": tokens / step / member.ranks,
            "peak_mib": [max(record["peak_bytes"] for record in mine) / 2**20 for mine in everyone],
            "losses": [record["loss"] for record in everyone[0]],
            "error": None,
        },
    )


def synthetic_corpus(sizes: Training, batch: int) -> Corpus:
    """Token ids of which the n-th most frequent occurs 1 / n as often as the first, anywhere in the vocabulary."""
    random = np.random.default_rng(0)
    places = random.permutation(sizes.vocabulary).astype(np.int32)
    count = 4 * (batch + 1) * sizes.sequence
    ids = places[np.exp(random.random(count) * np.log(sizes.vocabulary)).astype(np.int64) - 1]
    return Corpus("synthetic", sizes.vocabulary, ids, ids[: 2 * sizes.sequence])
