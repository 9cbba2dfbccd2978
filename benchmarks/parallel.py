"""Vocabulary parallelism and the training loop, measured over the GPUs of one machine, one process each.

    python benchmarks/parallel.py --output benchmarks/results/parallel
    python benchmarks/parallel.py --output parallel --device cpu --quick --no-compile

Strong scaling: one loss with both gradients, its vocabulary over 1, 2, 4, 8 ranks. Every contender's loss and gradients
are compared with an fp32 reference and its memory taken; then in every round each runs once, in turn, the first round
not counted. A time is between two events on a rank's stream, after an all-reduce that brings the ranks together and
behind a spin in which the hosts run ahead; the largest over ranks, the median over rounds. Weak scaling: steps of
``logitless train`` on a batch in proportion to the ranks. What is done so far is in the files at any moment.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import shlex
import socket
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from scaling import Head, cost
from torch import Tensor, multiprocessing
from torch.cuda import nccl

import logitless
from logitless.bench import clock, environment
from logitless.bench.accuracy import Errors, Gradients, compute, errors, reference
from logitless.bench.cases import Inputs
from logitless.bench.memory import peak_bytes
from logitless.bench.peers import PEERS, Loss, two_stage
from logitless.options import BLOCK
from logitless.sampling import block_sums

RANKS = (1, 2, 4, 8)
# What collectives wait for a rank that compiles, and the parent for a word, in seconds.
COLLECTIVE_LIMIT, PATIENCE = 80, 100
THRESHOLD = logitless.Sampled().threshold
# Blocks that a peaked head is to keep a token, as trained models' do, and tokens that are looked at for it.
KEPT, LOOKED_AT = 17, 512
LONGEST_MESSAGE = 1000


@dataclass(frozen=True)
class Problem:
    """A head by its sizes: tokens N, hidden D, vocabulary V."""

    name: str
    tokens: int
    hidden: int
    vocabulary: int


PROBLEMS = (Problem("llama3", 8192, 4096, 128_256), Problem("gemma-long", 32_768, 2304, 262_144))
TOYS = (Problem("toy", 96, 64, 2048), Problem("toy-wide", 192, 32, 4096))


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


@dataclass(frozen=True)
class Settings:
    """What is the same for all measurements."""

    kind: str  # of device: cpu or cuda
    rounds: int
    compile: bool
    seed: int = 0


# --- processes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One process of several."""

    rank: int
    ranks: int
    device: torch.device
    pipe: Connection

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of all processes; None where there is one."""
        return dist.group.WORLD if self.ranks > 1 else None

    def tell(self, kind: str, content: object) -> None:
        """The parent, what rank 0 says."""
        if self.rank == 0:
            self.pipe.send((kind, content))

    def gathered(self, value: Any) -> list[Any]:
        """What every rank says, by rank."""
        if self.ranks == 1:
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's, on every rank."""
        if self.ranks > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def come_together(self) -> None:
        if self.ranks > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))


Work = Callable[..., None]
"""Called in each process with its member and what it was given."""

At = tuple[str, str, str]
"""A problem, a contender and a stage."""


class LostError(Exception):
    """Processes that left nothing to go on with.

    Attributes:
        at: what they were at.
        reason: what happened.
    """

    def __init__(self, at: At, reason: str) -> None:
        super().__init__(at, reason)
        self.at = at
        self.reason = reason


def enter(rank: int, ranks: int, kind: str, port: int, pipe: Connection, work: Work, given: tuple[Any, ...]) -> None:
    """What each process does."""
    try:
        device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        work(Member(rank, ranks, device, pipe), port, *given)
        pipe.send(("done", None))
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))
        raise


def run_ranks(work: Work, ranks: int, kind: str, given: tuple[Any, ...], hear: Callable[[Any], None]) -> None:
    """Runs the work in so many processes, and hears what rank 0 has found.

    Raises:
        LostError: one of them raised, died or said nothing for too long; all are ended then.
    """
    context = multiprocessing.get_context("spawn")
    port, pipes, processes = free_port(), [], []
    at: At = ("", "", "start")
    try:
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=enter, args=(rank, ranks, kind, port, there, work, given), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        working = list(pipes)
        while working:
            ready = wait(working, PATIENCE)
            if not ready:
                raise LostError(at, f"no word for {PATIENCE} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    what, content = pipe.recv()
                except EOFError:
                    process = processes[pipes.index(pipe)]
                    process.join(5)
                    reason = f"rank {pipes.index(pipe)} died with exit code {process.exitcode}"
                    raise LostError(at, reason) from None
                if what == "raised":
                    raise LostError(at, f"rank {pipes.index(pipe)}: {content.strip().splitlines()[-1]}\n{content}")
                if what == "done":
                    working.remove(pipe)
                elif what == "at":
                    if content[2:] != at[2:] or not content[2].startswith("round"):
                        say(" ".join(filter(None, content)))
                    at = content
                else:
                    hear(content)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def join_group(member: Member, port: int) -> None:
    if member.ranks == 1:
        return
    cuda = member.device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=member.rank,
        world_size=member.ranks,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT),
        device_id=member.device if cuda else None,
    )


# --- inputs -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """Inputs of one kind, with the whole weight; how far the hidden states were scaled, and blocks kept a token."""

    inputs: Inputs
    scale: float
    kept: float


def bounds(vocabulary: int, ranks: int) -> list[int]:
    """Where each rank's rows of the weight begin, and the end."""
    return [vocabulary * rank // ranks for rank in range(ranks + 1)]


def flat(problem: Problem, member: Member, seed: int) -> Drawn:
    """Standard normal hidden states, weight scaled by 1 / sqrt(D): logits of standard deviation 1."""
    device, dtype = member.device, torch.bfloat16
    random = torch.Generator(device).manual_seed(seed)
    inputs = Inputs(
        torch.empty(problem.tokens, problem.hidden, dtype=dtype, device=device).normal_(generator=random),
        torch.empty(problem.vocabulary, problem.hidden, dtype=dtype, device=device).normal_(
            std=problem.hidden**-0.5, generator=random
        ),
        torch.randint(problem.vocabulary, (problem.tokens,), generator=random, device=device),
    )
    for tensor in (inputs.hidden, inputs.weight, inputs.target):
        member.broadcast(tensor)
    return Drawn(inputs, 1.0, kept_blocks(logits_of(inputs, slice(0, LOOKED_AT)), inputs.target))


def peaked(of: Inputs, member: Member, seed: int) -> Drawn:
    """The same with hidden states so large that a token keeps as many blocks as a trained model's; likely targets."""
    logits = logits_of(of, slice(0, LOOKED_AT))
    wanted = min(KEPT, logits.shape[1] // BLOCK / 2)
    low, high, scale = 1.0, 64.0, 8.0
    for _ in range(20):
        probability = (block_sums((logits * scale).softmax(1)) / THRESHOLD).clamp_(max=1)
        low, high = (scale, high) if float(probability.sum(1).mean()) > wanted else (low, scale)
        scale = (low * high) ** 0.5
    del logits
    scale = float(member.broadcast(torch.tensor(scale, dtype=torch.float64, device=member.device)))
    inputs = replace(of, hidden=of.hidden * scale, target=torch.empty_like(of.target))
    random = torch.Generator(member.device).manual_seed(seed)
    for first in range(0, len(inputs.target), LOOKED_AT):
        rows = slice(first, first + LOOKED_AT)
        inputs.target[rows] = logits_of(inputs, rows).softmax(1).multinomial(1, generator=random)[:, 0]
    member.broadcast(inputs.target)
    return Drawn(inputs, scale, kept_blocks(logits_of(inputs, slice(0, LOOKED_AT)), inputs.target))


def logits_of(inputs: Inputs, rows: slice) -> Tensor:
    """[rows, V] in fp32."""
    return (inputs.hidden[rows] @ inputs.weight.T).float()


def kept_blocks(logits: Tensor, target: Tensor) -> float:
    """Blocks that a token lists on one rank, expected: its sample, and its target's where that is not in it."""
    probability = (block_sums(logits.softmax(1)) / THRESHOLD).clamp_(max=1)
    own = probability.gather(1, target[: len(logits), None] // BLOCK)[:, 0]
    return float((probability.sum(1) + 1 - own).mean())


# --- contenders -------------------------------------------------------------------------------------------------------


class TwoStageInShards(torch.autograd.Function):
    """Logits of this rank's shard by torch; row statistics merged by all-reduces, as frameworks for training do it.

    The hidden gradient is all-reduced in its own dtype while the weight's is multiplied.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor, parts: Parts) -> Tensor:
        logits, shares, at_target = parts.statistics(hidden, weight, target, parts.first)
        peak = shares.clone()
        parts.all_reduce(peak, dist.ReduceOp.MAX)()
        sums = torch.stack(((shares - peak).exp(), at_target))
        parts.all_reduce(sums)()
        logsumexp = peak + sums[0].log()
        ctx.parts = parts
        ctx.save_for_backward(hidden, weight, target, logits, logsumexp)
        return (logsumexp - sums[1]).mean()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, target, logits, logsumexp = ctx.saved_tensors
        parts: Parts = ctx.parts
        gradient = parts.gradient(logits, logsumexp, target, upstream[0] / len(target), parts.first)
        hidden_gradient = gradient @ weight
        arrive = parts.all_reduce(hidden_gradient)
        weight_gradient = gradient.T @ hidden
        arrive()
        return hidden_gradient, weight_gradient, None, None


def shard_statistics(hidden: Tensor, weight: Tensor, target: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """[N, V / t] logits, [N] their log-sum-exp, [N] the target's logit, 0 where it lies elsewhere."""
    logits = F.linear(hidden, weight)
    index = target - first
    inside = (index >= 0) & (index < weight.shape[0])
    at_target = logits.gather(1, torch.where(inside, index, 0)[:, None])[:, 0].float()
    return logits, logits.float().logsumexp(1), torch.where(inside, at_target, 0.0)


def shard_gradient(logits: Tensor, logsumexp: Tensor, target: Tensor, scale: Tensor, first: int) -> Tensor:
    """[N, V / t] the gradient of the logits, in their place."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    softmax = (logits.float() - logsumexp[:, None]).exp()
    one_hot = columns[None, :] == (target - first)[:, None]
    return logits.copy_((softmax - one_hot.float()) * scale)


@dataclass(frozen=True)
class Parts:
    """What a rank does by itself in `TwoStageInShards`, compiled or not, and where its shard begins."""

    statistics: Callable[..., tuple[Tensor, Tensor, Tensor]]
    gradient: Callable[..., Tensor]
    first: int
    group: dist.ProcessGroup | None

    def all_reduce(self, tensor: Tensor, kind: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Callable[[], object]:
        """Begins one; what it returns waits for it."""
        if self.group is None:
            return lambda: None
        work = dist.all_reduce(tensor, kind, group=self.group, async_op=True)
        assert work is not None
        return work.wait


def load_two_stage_in_shards(problem: Problem, member: Member, compiled: bool) -> Loss:
    torch.compiler.reset()  # shapes of earlier problems count against the limit of recompilations
    wrap = functools.partial(torch.compile, dynamic=False) if compiled else lambda function: function
    first = bounds(problem.vocabulary, member.ranks)[member.rank]
    parts = Parts(wrap(shard_statistics), wrap(shard_gradient), first, member.group)
    return lambda hidden, weight, target: TwoStageInShards.apply(hidden, weight, target, parts)  # type: ignore


def load_two_stage(problem: Problem, member: Member, compiled: bool) -> Loss:
    return PEERS["torch.compile"].load() if compiled else two_stage


def load_exact(problem: Problem, member: Member, compiled: bool) -> Loss:
    return functools.partial(logitless.linear_cross_entropy, group=member.group)


def load_fastest(problem: Problem, member: Member, compiled: bool) -> Loss:
    """With room for this rank's logits once, and what goes with them."""
    logits = 2 * problem.tokens * -(-problem.vocabulary // member.ranks)
    room = logits * 11 // 10 + (256 << 20)
    return functools.partial(logitless.linear_cross_entropy, group=member.group, workspace=room)


def load_sampled(problem: Problem, member: Member, compiled: bool) -> Loss:
    return functools.partial(logitless.linear_cross_entropy, group=member.group, gradient=logitless.Sampled())


@dataclass(frozen=True)
class Contender:
    """A way to compute the loss.

    Attributes:
        name: how the reports call it.
        load: makes it, for a problem, a rank, and compiled or not.
        peaked: whether on the peaked inputs.
        alone: whether it serves one rank only.
        model: under which name `scaling.py` knows its gradient, if it does.
        look: its colour and marker.
    """

    name: str
    load: Callable[[Problem, Member, bool], Loss]
    look: tuple[str, str]
    peaked: bool = False
    alone: bool = False
    model: str | None = None


# Colours from Okabe and Ito's palette, as in the other figures.
CONTENDERS = (
    Contender("two-stage", load_two_stage, ("#8a919a", "D"), alone=True),
    Contender("two-stage in shards", load_two_stage_in_shards, ("#8a919a", "s")),
    Contender("logitless exact", load_exact, ("#0072b2", "o"), model="exact"),
    Contender("logitless exact fastest", load_fastest, ("#56b4e9", "o"), model="exact"),
    Contender("logitless sampled, flat", load_sampled, ("#e69f00", "o"), model="sampled"),
    Contender("logitless sampled, peaked", load_sampled, ("#d55e00", "o"), peaked=True, model="sampled"),
)
AGAINST = "two-stage in shards"


# --- strong scaling ---------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """What is known of one contender so far; lists are by rank, or by round and rank.

    Attributes:
        contender: which.
        drawn: its inputs, with this rank's shard of the weight.
        failure: why it takes no further part.
        loss: what it computes, once loaded.
    """

    contender: Contender
    drawn: Drawn
    failure: str | None = None
    loss: Loss | None = None
    errors: list[Errors] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    times: list[list[float]] = field(default_factory=list)
    shares: list[Shares] = field(default_factory=list)
    listed: list[float | None] = field(default_factory=list)

    def call(self) -> Gradients:
        """One forward and backward pass."""
        assert self.loss is not None
        return compute(self.loss, self.drawn.inputs)

    def row(self, others: Iterable[Found]) -> dict[str, Any]:
        """As it is written; times of a round are the largest over ranks."""
        rounds = [max(times) for times in self.times]
        against = next(found for found in others if found.contender.name == AGAINST)
        slowest = [max(times) for times in against.times]
        ratio = None
        if rounds and len(rounds) == len(slowest):
            ratio = statistics.median(a / b for a, b in zip(rounds, slowest, strict=True))
        return {
            "contender": self.contender.name,
            "inputs": "peaked" if self.contender.peaked else "flat",
            "hidden_scale": self.drawn.scale,
            "expected_blocks_a_token": self.drawn.kept if self.contender.model == "sampled" else None,
            "listed_blocks_a_token": self.listed or None,
            "median_s": statistics.median(rounds) if rounds else None,
            "ratio": ratio,
            "rounds_s": self.times,
            "loss_error": max((e.loss for e in self.errors), default=None),
            "hidden_error": max((e.hidden for e in self.errors), default=None),
            "weight_error": max((e.weight for e in self.errors), default=None),
            "peak_mib": [peak / 2**20 for peak in self.peaks],
            "collectives": [asdict(share) for share in self.shares],
            "error": self.failure,
        }


def measure_strong(
    member: Member, port: int, problems: list[Problem], barred: Mapping[tuple[str, str], str], settings: Settings
) -> None:
    """What each of the ranks does."""
    join_group(member, port)
    for problem in problems:
        measure_problem(member, problem, barred, settings)
        gc.collect()
    if member.ranks > 1:
        dist.destroy_process_group()


def measure_problem(
    member: Member, problem: Problem, barred: Mapping[tuple[str, str], str], settings: Settings
) -> None:
    def at(contender: str, stage: str) -> None:
        member.tell("at", (problem.name, contender, f"{stage}, ranks {member.ranks}"))

    def report(**content: Any) -> None:
        member.tell("found", {"problem": problem, "ranks": member.ranks, **content})

    def report_rows(complete: bool = False) -> None:
        report(rows=[found.row(everyone) for found in everyone], complete=complete)

    at("", "inputs")
    whole = {False: flat(problem, member, settings.seed)}
    whole[True] = peaked(whole[False].inputs, member, settings.seed)
    rows = slice(*bounds(problem.vocabulary, member.ranks)[member.rank :][:2])
    weight = whole[False].inputs.weight[rows].clone()
    everyone = [
        Found(
            contender,
            replace(drawn, inputs=replace(drawn.inputs, weight=weight)),
            barred.get((problem.name, contender.name)),
        )
        for contender in CONTENDERS
        if member.ranks == 1 or not contender.alone
        for drawn in [whole[contender.peaked]]
    ]
    for kind in (False, True):
        at("", "reference")
        right = reference(whole.pop(kind).inputs)
        right = replace(right, weight=right.weight[rows].clone())
        for found in everyone:
            if found.contender.peaked == kind and found.failure is None:
                at(found.contender.name, "errors and memory")
                look(found, problem, right, member, settings)
                report_rows()
        del right
    for number in range(settings.rounds + 1):
        for found in everyone:
            if found.failure is None:
                at(found.contender.name, f"round {number} of {settings.rounds}")
                gc.collect()
                times = attempt(found, member, lambda found=found: timed(found.call, member))
                if number and times:
                    found.times.append(times)
        report_rows()
    for found in everyone:
        if found.failure is None:
            at(found.contender.name, "share of collectives")
            found.shares = attempt(found, member, lambda found=found: share_of_collectives(found.call, member))
            if found.contender.model == "sampled":
                found.listed = attempt(found, member, lambda found=found: listed_blocks(found))
    if member.ranks > 1:
        at("", "collectives alone")
        report(alone=collectives_alone(problem, member, settings))
    report_rows(complete=True)


def attempt(found: Found, member: Member, act: Callable[[], Any]) -> list[Any]:
    """What every rank gets by it; if one fails, none takes further part."""
    value = failure = None
    try:
        value = act()
    except Exception as error:  # a contender's code may raise anything
        failure = f"{type(error).__name__}: {str(error).strip()}"[:LONGEST_MESSAGE]
    if failure is not None:
        gc.collect()
        if member.device.type == "cuda":
            torch.cuda.empty_cache()
    failures = member.gathered(failure)
    for rank, said in enumerate(failures):
        if said is not None:
            found.failure = f"rank {rank}: {said}"
    return [] if found.failure is not None else member.gathered(value)


def look(found: Found, problem: Problem, right: Gradients, member: Member, settings: Settings) -> None:
    """Errors and memory; compiles what is compiled at a first call."""

    def errors_of() -> Errors:
        found.loss = found.contender.load(problem, member, settings.compile)
        absolute = errors(found.call(), right)
        return replace(absolute, loss=absolute.loss / float(right.loss.abs()))

    found.errors = attempt(found, member, errors_of)
    if found.failure is None:
        found.peaks = attempt(found, member, lambda: peak_bytes(found.call, member.device))


def listed_blocks(found: Found) -> float | None:
    """Blocks that this rank has listed a token, as the kernels left them for the backward pass."""
    assert found.loss is not None
    inputs = found.drawn.inputs
    value = found.loss(inputs.hidden.detach().requires_grad_(), inputs.weight.detach().requires_grad_(), inputs.target)
    left = value.grad_fn.statistics.residuals  # type: ignore[union-attr]
    if len(left) < 2 or left[1].dtype != torch.int32 or left[1].ndim != 1:
        return None  # not the kernels
    return int(left[1][-1]) / len(inputs.target)


def timed(run: Callable[[], Any], member: Member) -> float:
    """Seconds on this rank's stream, from an all-reduce behind the spin on: all ranks' clocks start together."""
    member.come_together()
    if member.device.type == "cpu":
        return clock.seconds(run, member.device)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(clock.BUSY_CYCLES)
    member.come_together()
    first.record()
    result = run()
    last.record()
    last.synchronize()
    del result
    return first.elapsed_time(last) / 1e3


@dataclass(frozen=True)
class Shares:
    """Of one call's time on a rank: in kernels of collectives, in these alone; and that time, under the profiler."""

    collectives: float
    exposed: float
    seconds: float


def share_of_collectives(run: Callable[[], Any], member: Member) -> Shares:
    """From the profiler's timeline of one call. Kernels of collectives wait for the slowest rank in them."""
    cuda = member.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        member.come_together()
        with torch.profiler.record_function("call"):
            if cuda:
                torch.cuda._sleep(clock.BUSY_CYCLES)
                member.come_together()
            result = run()
        if cuda:
            torch.cuda.synchronize()
    del result
    events = list(profiler.events() or ())
    if cuda:
        on_device = [e for e in events if e.device_type.name == "CUDA" and not is_annotation(e)]
        spin_end = max(e.time_range.end for e in on_device if "spin" in e.name)
        after = sorted(
            (e.time_range.start, e.time_range.end, e.name) for e in on_device if e.time_range.start >= spin_end
        )
        if member.ranks > 1:  # all up to the all-reduce that all ranks start from
            after = after[1 + next(place for place, (*_, name) in enumerate(after) if "nccl" in name.lower()) :]
        spans = [(name, start, end) for start, end, name in after]
    else:
        call = next(e for e in events if e.name == "call").time_range
        inside = [e for e in events if call.start <= e.time_range.start < call.end and e.name.startswith("gloo:")]
        spans = [(e.name, e.time_range.start, e.time_range.end) for e in inside]
        spans += [("call", call.start, call.start), ("call", call.end, call.end)]
    start, end = min(s for _, s, _ in spans), max(e for _, _, e in spans)
    collective = {name for name, *_ in spans if "nccl" in name.lower() or name.startswith("gloo:")}
    waiting = covered((s, e) for name, s, e in spans if name in collective)
    working = covered((s, e) for name, s, e in spans if name not in collective)
    either = covered((s, e) for _, s, e in spans)
    return Shares(waiting / (end - start), (either - working) / (end - start), (end - start) / 1e6)


def is_annotation(event: Any) -> bool:
    """Whether it marks a stretch of the device's timeline, and is no kernel."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith("nccl:")


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, reached = 0.0, -1.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def collectives_alone(problem: Problem, member: Member, settings: Settings) -> list[dict[str, Any]]:
    """Each collective of a call by itself, at its size."""
    tokens, width, ranks = problem.tokens, problem.hidden, member.ranks

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=member.device)

    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    statistics_of_all, own = empty(2 * ranks, tokens), empty(2, tokens)
    wide, narrow, row = empty(tokens, width), empty(tokens, width, dtype=torch.bfloat16), empty(tokens)
    runs = {
        "all-gather of statistics": (statistics_of_all, lambda: gather(statistics_of_all, own)),
        "all-reduce of the hidden gradient, fp32": (wide, lambda: dist.all_reduce(wide)),
        "all-reduce of the hidden gradient, bf16": (narrow, lambda: dist.all_reduce(narrow)),
        "all-reduce of a maximum a row": (row, lambda: dist.all_reduce(row, dist.ReduceOp.MAX)),
        "all-reduce of two sums a row": (own, lambda: dist.all_reduce(own)),
    }
    rows = []
    for name, (tensor, run) in runs.items():
        rounds = [max(member.gathered(timed(run, member))) for _ in range(settings.rounds + 1)][1:]
        passes = 1 if name.startswith("all-gather") else 2
        median = statistics.median(rounds)
        moved = passes * (ranks - 1) / ranks * tensor.nbytes
        rows.append({"collective": name, "bytes": tensor.nbytes, "median_s": median, "bus_gb_s": moved / median / 1e9})
    return rows


# --- weak scaling -----------------------------------------------------------------------------------------------------


def measure_training(member: Member, port: int, data: int, tensor: int, sizes: Training, settings: Settings) -> None:
    """Steps of the training loop, in each of its processes."""
    from logitless.demo.config import ModelConfig, TrainConfig
    from logitless.demo.memory import memory_meter
    from logitless.demo.parallel import check_sizes, join
    from logitless.demo.train import Trainer, resolve_device

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


def synthetic_corpus(sizes: Training, batch: int) -> Any:
    """Token ids of which the n-th most frequent occurs 1 / n as often as the first, anywhere in the vocabulary."""
    import numpy as np

    from logitless.demo.data import Corpus

    random = np.random.default_rng(0)
    places = random.permutation(sizes.vocabulary).astype(np.int32)
    count = 4 * (batch + 1) * sizes.sequence
    ids = places[np.exp(random.random(count) * np.log(sizes.vocabulary)).astype(np.int64) - 1]
    return Corpus("synthetic", sizes.vocabulary, ids, ids[: 2 * sizes.sequence])


# --- results ----------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """A file of results, written anew with everything that is found."""

    path: Path
    content: dict[str, Any]

    def write(self) -> None:
        """In one step, so that a run that is stopped leaves the file whole."""
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.path)


def header(settings: Settings, command: str) -> dict[str, Any]:
    device = torch.device(settings.kind)
    hardware = environment.hardware(device)
    if settings.kind == "cuda":
        hardware["GPUs"] = str(torch.cuda.device_count())
        hardware["NCCL"] = ".".join(map(str, nccl.version()))
    return {
        "command": command,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "hardware": hardware,
        "software": environment.software(),
        "NCCL_environment": {name: value for name, value in os.environ.items() if name.startswith("NCCL_")},
        "rounds": settings.rounds,
        "compiled": settings.compile,
        "seed": settings.seed,
    }


def run_strong(report: Report, ranks: int, problems: tuple[Problem, ...], settings: Settings) -> None:
    """All problems on so many ranks; again without a contender that ended the processes."""
    pending, barred = list(problems), {}
    results: list[dict[str, Any]] = report.content.setdefault("results", [])
    alone: list[dict[str, Any]] = report.content.setdefault("collectives", [])

    def hear(found: dict[str, Any]) -> None:
        where = {"problem": asdict(found["problem"]), "ranks": found["ranks"]}
        if "alone" in found:
            alone.append({**where, "rows": found["alone"]})
        else:
            results[:] = [r for r in results if (r["problem"], r["ranks"]) != tuple(where.values())]
            results.append({**where, "rows": found["rows"], "complete": found["complete"]})
            if found["complete"]:
                pending.remove(found["problem"])
        report.content["model"] = predictions(results)
        report.write()

    while pending:
        try:
            run_ranks(measure_strong, ranks, settings.kind, (pending, barred, settings), hear)
        except LostError as lost:
            say(f"lost at {' '.join(lost.at)}: {lost.reason}")
            problem, who, _ = lost.at
            if who in {contender.name for contender in CONTENDERS} and (problem, who) not in barred:
                barred[problem, who] = lost.reason[:LONGEST_MESSAGE]
                continue
            failed = next((p for p in pending if p.name == problem), pending[0])
            where = {"problem": asdict(failed), "ranks": ranks}
            results.append({**where, "rows": [], "complete": False, "error": lost.reason[:LONGEST_MESSAGE]})
            report.write()
            pending.remove(failed)


def predictions(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each contender that `scaling.py` knows: its time on one rank over t, and what the model makes of that."""
    rows = []
    medians = {
        (r["problem"]["name"], r["ranks"], row["contender"]): row["median_s"] for r in results for row in r["rows"]
    }
    for result in results:
        problem = Problem(**result["problem"])
        for contender in CONTENDERS:
            one = medians.get((problem.name, 1, contender.name))
            if contender.model is None or one is None:
                continue
            head = Head(problem.hidden, problem.vocabulary, problem.tokens, {contender.model: one})
            known = cost(contender.model, problem.tokens, result["ranks"], head)
            rows.append(
                {
                    "problem": problem.name,
                    "contender": contender.name,
                    "ranks": result["ranks"],
                    "ideal_s": known.compute,
                    "predicted_s": known.seconds,
                    "predicted_gather_s": known.gather,
                    "predicted_reduce_s": known.reduce,
                    "measured_s": medians.get((problem.name, result["ranks"], contender.name)),
                }
            )
    return rows


def run_training(report: Report, divisions: list[tuple[int, int]], sizes: Training, settings: Settings) -> None:
    report.content["training"] = asdict(sizes)
    results: list[dict[str, Any]] = report.content.setdefault("results", [])

    def hear(found: dict[str, Any]) -> None:
        results.append(found)
        one = next((r for r in results if r["gpus"] == 1 and r["error"] is None), None)
        if one is not None:
            found["efficiency"] = found["tokens_a_second_a_gpu"] / one["tokens_a_second_a_gpu"]
        report.write()

    for data, tensor in divisions:
        try:
            run_ranks(measure_training, data * tensor, settings.kind, (data, tensor, sizes, settings), hear)
        except LostError as lost:
            say(f"lost at {' '.join(lost.at)}: {lost.reason}")
            reason = lost.reason[:LONGEST_MESSAGE]
            results.append({"data": data, "tensor": tensor, "gpus": data * tensor, "error": reason})
            report.write()


def strong_table(content: dict[str, Any]) -> str:
    """In Markdown."""
    model = {(m["problem"], m["contender"], m["ranks"]): m for m in content.get("model", ())}
    columns = (
        *("problem", "ranks", "contender", "ms", "speed-up", "ideal, ms", "predicted, ms", "collectives", "exposed"),
        *(f"x {AGAINST}", "peak, MiB", "error: loss", "dX", "dW"),
    )
    rows: list[tuple[str, ...]] = [columns]
    for result in content.get("results", ()):
        name, ranks = result["problem"]["name"], result["ranks"]
        if "error" in result:
            rows.append((name, str(ranks), "", result["error"].splitlines()[0], *[""] * (len(columns) - 4)))
        for row in result["rows"]:
            who, median, shares = row["contender"], row["median_s"], row["collectives"]
            start = (name, str(ranks), who)
            if median is None:
                rows.append((*start, (row["error"] or "not measured").splitlines()[0], *[""] * (len(columns) - 4)))
                continue
            one, known = time_on_one(content, name, who), model.get((name, who, ranks), {})
            rows.append(
                (
                    *start,
                    milliseconds(median),
                    number(one and one / median),
                    milliseconds(known.get("ideal_s")),
                    milliseconds(known.get("predicted_s")),
                    percent(share["collectives"] for share in shares),
                    percent(share["exposed"] for share in shares),
                    number(row["ratio"]),
                    number(max(row["peak_mib"]), 0),
                    *(f"{row[error]:.1e}" for error in ("loss_error", "hidden_error", "weight_error")),
                )
            )
    alone: list[tuple[str, ...]] = [("problem", "ranks", "collective", "MiB", "ms", "bus GB/s")]
    for group in content.get("collectives", ()):
        where = (group["problem"]["name"], str(group["ranks"]))
        for row in group["rows"]:
            size, time_of = number(row["bytes"] / 2**20), milliseconds(row["median_s"], 3)
            alone.append((*where, row["collective"], size, time_of, number(row["bus_gb_s"], 0)))
    return markdown(rows) + "\n\n" + markdown(alone)


def training_table(content: dict[str, Any]) -> str:
    """In Markdown."""
    columns = ("GPUs", "data", "tensor", "tokens a step", "ms a step", "body", "head", "optimiser")
    rows: list[tuple[str, ...]] = [(*columns, "tokens/s a GPU", "of one GPU's", "peak, MiB")]
    for r in content.get("results", ()):
        start = tuple(str(r[name]) for name in ("gpus", "data", "tensor"))
        if r["error"] is not None:
            rows.append((*start, r["error"].splitlines()[0], *[""] * 7))
            continue
        parts = (milliseconds(r[name], 1) for name in ("median_s", "body_s", "head_s", "optimizer_s"))
        speed, share = number(r["tokens_a_second_a_gpu"], 0), percent([r["efficiency"]] if "efficiency" in r else [])
        rows.append((*start, f"{r['tokens_a_step']:,}", *parts, speed, share, number(max(r["peak_mib"]), 0)))
    return markdown(rows)


def markdown(rows: list[tuple[str, ...]]) -> str:
    """The first row is the head of the table."""
    head, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others])


def number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def milliseconds(seconds: float | None, digits: int = 2) -> str:
    return number(None if seconds is None else seconds * 1e3, digits)


def percent(shares: Iterable[float]) -> str:
    """Least and most over ranks."""
    known = sorted(shares)
    if not known:
        return ""
    return f"{known[0]:.1%}" + (f" to {known[-1]:.1%}" if len(known) > 1 else "")


def time_on_one(content: dict[str, Any], problem: str, contender: str) -> float | None:
    """A contender's time on one rank, if it has been measured."""
    here = [r for r in content["results"] if (r["problem"]["name"], r["ranks"]) == (problem, 1)]
    return next((row["median_s"] for r in here for row in r["rows"] if row["contender"] == contender), None)


def draw_strong(content: dict[str, Any], path: Path) -> None:
    """Time of a call by ranks: measured, ideal, and as the model has it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = list(dict.fromkeys(r["problem"]["name"] for r in content.get("results", ())))
    if not names:
        return
    figure = Figure(figsize=(6 * len(names), 4.8), layout="constrained")
    for place, name in enumerate(names, 1):
        axes = figure.add_subplot(1, len(names), place)
        here = [r for r in content["results"] if r["problem"]["name"] == name]
        counts = sorted({r["ranks"] for r in here})
        for contender in CONTENDERS:
            colour, marker = contender.look
            points = sorted(
                (r["ranks"], row["median_s"] * 1e3)
                for r in here
                for row in r["rows"]
                if row["contender"] == contender.name and row["median_s"] is not None
            )
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=contender.name)
            model = sorted(
                (m["ranks"], m["ideal_s"] * 1e3, m["predicted_s"] * 1e3)
                for m in content.get("model", ())
                if (m["problem"], m["contender"]) == (name, contender.name)
            )
            if len(model) > 1:
                x, ideal, predicted = zip(*model, strict=True)
                axes.plot(x, ideal, color=colour, linestyle="dotted", linewidth=1)
                axes.plot(x, predicted, color=colour, marker="_", markersize=9, linestyle="none")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        sizes = here[0]["problem"]
        axes.set_title(f"N={sizes['tokens']:,}  D={sizes['hidden']:,}  V={sizes['vocabulary']:,}", fontsize=10)
        axes.set_xlabel("ranks; dotted: one rank's time over ranks, dashes: the model")
        axes.set_ylabel("ms a call, forward and backward" if place == 1 else "")
        axes.grid(color="#e3e6e9", linewidth=0.6)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=160)


def draw_training(content: dict[str, Any], path: Path) -> None:
    """Tokens a second and GPU by GPUs."""
    from matplotlib.figure import Figure

    done = [r for r in content.get("results", ()) if r["error"] is None]
    if not done:
        return
    figure = Figure(figsize=(6, 4.2), layout="constrained")
    axes = figure.add_subplot()
    kinds = {
        "FSDP2": ([r for r in done if r["tensor"] == 1], "#0072b2", "o"),
        "with tensor parallelism over 2": ([r for r in done if r["tensor"] == 2], "#d55e00", "s"),
    }
    for label, (rows, colour, marker) in kinds.items():
        points = sorted((r["gpus"], r["tokens_a_second_a_gpu"]) for r in rows)
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=5, label=label)
    one = next((r for r in done if r["gpus"] == 1), None)
    if one is not None:
        axes.axhline(one["tokens_a_second_a_gpu"], color="#8a919a", linestyle="dotted", linewidth=1)
    counts = sorted({r["gpus"] for r in done})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("tokens a second and GPU")
    axes.grid(color="#e3e6e9", linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=160)


def divisions_of(most: int, only: str | None) -> list[tuple[int, int]]:
    """(data, tensor): one GPU first, then those for weak scaling by FSDP2, then those with tensor parallelism."""
    counts = [count for count in RANKS if 1 < count <= most]
    by_data = [(count, 1) for count in counts] if only != "train" else []
    by_tensor = [(count // 2, 2) for count in counts] if only != "weak" else []
    return [(1, 1), *by_data, *by_tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results and figures")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N", help="instead of each problem's, or one for all")
    parser.add_argument("--rounds", type=int, default=8, help="that count (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, three rounds")
    parser.add_argument(
        "--only",
        choices=("strong", "weak", "train", "plots"),
        help="the loss; training by FSDP2; training with tensor parallelism; or figures and tables of what is there",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ranks", type=int, help="most processes (default: one a GPU, two on a CPU)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    given = parser.parse_args()
    most = given.ranks or (torch.cuda.device_count() if given.device == "cuda" else 2)
    settings = Settings(given.device, 3 if given.quick else given.rounds, not given.no_compile)
    problems = TOYS if given.quick else PROBLEMS
    if given.tokens is not None:
        if len(given.tokens) not in (1, len(problems)):
            parser.error(f"--tokens takes one number or {len(problems)}, got {len(given.tokens)}")
        numbers = given.tokens * len(problems) if len(given.tokens) == 1 else given.tokens
        problems = tuple(replace(p, tokens=tokens) for p, tokens in zip(problems, numbers, strict=True))
    given.output.mkdir(parents=True, exist_ok=True)
    words = [given.output.name if word == str(given.output) else word for word in sys.argv[1:]]
    command = shlex.join(["python", "benchmarks/parallel.py", *words])
    strong = Report(given.output / "strong.json", {})
    weak = Report(given.output / ("train.json" if given.only == "train" else "weak.json"), {})
    if given.only == "plots":
        for report in (strong, weak):
            report.content = json.loads(report.path.read_text()) if report.path.exists() else {}
    if given.only in (None, "strong"):
        strong.content = header(settings, command)
        for ranks in (count for count in RANKS if count <= most):
            run_strong(strong, ranks, problems, settings)
    if given.only in (None, "weak", "train"):
        weak.content = header(settings, command)
        run_training(weak, divisions_of(most, given.only), TOY_TRAINING if given.quick else Training(), settings)
    if strong.content:
        draw_strong(strong.content, strong.path.with_suffix(".png"))
        print(strong_table(strong.content), flush=True)
    if weak.content:
        draw_training(weak.content, weak.path.with_suffix(".png"))
        print(training_table(weak.content), flush=True)
    say("done")


if __name__ == "__main__":
    main()
