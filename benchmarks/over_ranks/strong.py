"""Strong scaling of one loss with both gradients: what each rank does."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from over_ranks.contenders import AGAINST, CONTENDERS, Contender
from over_ranks.problems import Drawn, Problem, Settings, bounds, flat, peaked
from over_ranks.processes import LONGEST_MESSAGE, Member, join_group
from over_ranks.timing import Shares, share_of_collectives, timed
from torch import Tensor

from logitless.bench.accuracy import Errors, Gradients, compute, errors, reference
from logitless.bench.memory import peak_bytes
from logitless.bench.peers import Loss


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
