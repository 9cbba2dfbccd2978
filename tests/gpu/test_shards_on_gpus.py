"""Vocabulary parallelism over NCCL, one GPU a rank: what ``tests/distributed`` says of CPUs and gloo.

``LOGITLESS_TEST_DEVICE=cpu`` runs the same cases in two processes on CPUs, with gloo and Triton's interpreter.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))  # here and in the processes that are started

import test_dtensor
import test_vocabulary_parallel as on_cpus
import workers
from comparison import check, check_drawn_loss, check_integers, check_refusal, check_unbiased, joined
from sharded import SHARES, Call, Draws, Halves, Mistake, Ties, bounds, in_step, world_group
from test_vocabulary_parallel import AUTO, BUSY, SAMPLE, SIMPLE, THRESHOLD, WEIGHTED, check_counts, each, odd
from workers import Member, Outcome

import logitless
from implementations import (
    CHUNKED,
    REFERENCE,
    SAMPLED,
    STORED,
    TRITON_CHUNKED,
    TRITON_KEPT,
    TRITON_LOSS_ONLY,
    TRITON_PREPARED,
    TRITON_SAMPLED,
    TRITON_STORED,
    TRITON_WINDOWED,
    WINDOWED,
)
from logitless.bench.accuracy import Gradients, errors, reference
from logitless.bench.cases import Inputs
from logitless.options import TOKEN_OUTPUTS
from on_gpu import refusing_to_wait
from problems import Case, generator
from test_sampled import DRAWS
from tolerance import FACTOR, Results

KIND = "cpu" if os.environ.get("LOGITLESS_TEST_DEVICE") == "cpu" else "cuda"
GPUS = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(KIND == "cuda" and GPUS < 2, reason="needs two CUDA devices, or LOGITLESS_TEST_DEVICE=cpu"),
]

# Those of which there are no GPUs are left out; where there are too few for any, two stand for the tests skipped.
WORLDS = tuple(size for size in SHARES if size <= GPUS and KIND == "cuda") or (2,)
HERE = torch.device("cuda", 0) if KIND == "cuda" else workers.CPU
# Seconds after which the processes of a world are killed; they compile their kernels in them.
LIMIT = 480 if KIND == "cuda" else 1200
TRAINING_LIMIT = 120
SOON = on_cpus.SOON
# Triton's interpreter misreads bf16.
NARROW = torch.bfloat16 if KIND == "cuda" else torch.float16

KERNELS = (TRITON_STORED, TRITON_WINDOWED, TRITON_KEPT, TRITON_SAMPLED)
LOSS_ONLY = replace(TRITON_LOSS_ONLY, rows=None)  # rows in parts would be kernels compiled again


# --- cases ------------------------------------------------------------------------------------------------------------


def wide(size: int, case: Case = BUSY) -> Case:
    """Several windows in each of as many shards, and more tokens than can are aliased in the weight's gradient.

    No shard of two has a multiple of 16 entries, for which Triton would compile every kernel once more.
    """
    return replace(case, vocabulary=600 * size + 41, leading=(40,))


def losses(size: int) -> dict[str, Call]:
    """Every strategy with every sharding, of the vocabulary and of the tokens, and what needs paths of its own."""
    shares = SHARES[size]
    busy, uneven = wide(size), shares["uneven"]
    plain = wide(size, Case(dtype=NARROW, ignored=True))
    return {
        **{f"{way}, {layout}": Call(busy, shares[layout], way) for layout in shares for way in (*KERNELS, LOSS_ONLY)},
        **{f"{way}, narrow": Call(plain, uneven, way) for way in KERNELS},
        "all aliased": Call(replace(busy, leading=(17,)), uneven, TRITON_WINDOWED),
        "narrow, most options": Call(replace(busy, dtype=NARROW, softcap=None), uneven, TRITON_STORED),
        **{f"{way}, uneven": Call(busy, uneven, way) for way in (AUTO, REFERENCE, STORED, CHUNKED, WINDOWED, SAMPLED)},
        **{
            f"{way}, tokens {layout}": Call(busy, uneven, way, token_shares=shares[layout])
            for layout in shares
            for way in (TRITON_STORED, TRITON_SAMPLED, LOSS_ONLY, CHUNKED)
        },
        "class weights": Call(wide(size, WEIGHTED), uneven, AUTO),
        "each token": Call(replace(busy, reduction="none"), uneven, AUTO),
        "frozen input": Call(replace(busy, frozen=("input",)), uneven, AUTO),
        "frozen weight": Call(replace(busy, frozen=("linear_weight",)), uneven, AUTO),
        "in fp64, which kernels refuse": Call(replace(busy, dtype=torch.float64), uneven, AUTO),
        "shard without mass": Call(wide(size, replace(SIMPLE, bias=True)), uneven, AUTO, masked_shard=1),
        **{f"main_grad, {way}": Call(busy, uneven, way, main_grad=True) for way in (TRITON_WINDOWED, TRITON_SAMPLED)},
        **{f"backward twice, {way}": Call(busy, uneven, way, backwards=2) for way in KERNELS},
    }


def statistics(size: int) -> dict[str, Call]:
    """All per-token outputs at once."""
    uneven, sequence = SHARES[size]["uneven"], SHARES[size]["even"]
    return {
        **{
            str(way): Call(wide(size), uneven, way, "statistics")
            for way in (TRITON_STORED, TRITON_WINDOWED, TRITON_SAMPLED, LOSS_ONLY)
        },
        "empty shards": Call(wide(size), SHARES[size]["empty"], AUTO, "statistics"),
        "sequence parallel": Call(wide(size), uneven, AUTO, "statistics", token_shares=sequence),
    }


def empty_batches(size: int) -> dict[str, Call]:
    shares = SHARES[size]["uneven"]
    return {
        f"{name}, {way}": Call(replace(BUSY, leading=leading), shares, way, all_ignored=True)
        for way in (AUTO, TRITON_SAMPLED)
        for name, leading in (("all ignored", (17,)), ("no tokens", (0,)))
    }


def planned(size: int) -> dict[str, Call]:
    """Within budgets from too little for anything to enough for all logits, with shards whose plans would differ."""
    shares = (1, *[30] * (size - 1))
    return {f"{2**power} bytes": Call(wide(size), shares, AUTO, workspace=2**power) for power in range(12, 23, 2)}


TIES = (TRITON_STORED, LOSS_ONLY)

COUNTS: dict[str, on_cpus.Count] = {
    **{str(way): (1, ["all-reduce"], Call(SIMPLE, (), way), ("nll",)) for way in KERNELS},
    "no gradient": (1, [], Call(SIMPLE, (), LOSS_ONLY), ("nll",)),
    "class weights": (2, ["all-reduce"], Call(WEIGHTED, (), AUTO), ("nll",)),
    "statistics": (1, ["all-reduce"], Call(SIMPLE, (), AUTO, "statistics"), ("nll", "entropy", "prediction")),
    "target rank": (2, ["all-reduce"], Call(SIMPLE, (), AUTO, "statistics"), TOKEN_OUTPUTS),
    "sequence parallel": (2, ["reduce-scatter"], Call(SIMPLE, (), AUTO), ("nll",)),
    "sequence parallel, sampled": (2, ["reduce-scatter"], Call(SIMPLE, (), TRITON_SAMPLED), ("nll",)),
    **{name: on_cpus.COUNTS[name] for name in ("four chunks", "four chunks, class weights")},
}


def drawn(size: int) -> dict[str, Draws]:
    """By kernels; on CPUs, where the interpreter would take minutes, by torch operations."""
    shares, seeds = SHARES[size]["uneven"], tuple(range(1, size + 1))
    busy = replace(SAMPLE, vocabulary=SAMPLE.vocabulary * size // 2, bias=True, label_smoothing=0.25, softcap=3.0)
    calls = {
        "all options": Call(busy, shares, AUTO),
        "sequence parallel": Call(replace(SAMPLE, data="mixed"), shares, AUTO, token_shares=SHARES[size]["even"]),
    }
    return {name: Draws(call, THRESHOLD, DRAWS, seeds) for name, call in calls.items()}


# What only a CPU is asked: whether targets are in range, and the same on all ranks.
OF_TARGETS = ("target", "target beyond all shards", "target negative")


def mistakes(size: int) -> dict[str, tuple[Mistake | Call, list[str]]]:
    """Those of CPUs, and strategies that form a gradient before statistics are merged."""
    known = {
        name: mistake
        for name, mistake in on_cpus.mistakes(size).items()
        if name not in OF_TARGETS and not name.startswith(("target too", "target far"))
    }
    ahead = {
        f"{way}": (Call(BUSY, SHARES[size]["uneven"], way), [str(way.strategy), "cannot serve"])
        for way in (TRITON_CHUNKED, TRITON_PREPARED)
    }
    return {**known, **ahead}


LOSSES = {size: losses(size) for size in WORLDS}
STATISTICS = {size: statistics(size) for size in WORLDS}
EMPTY = {size: empty_batches(size) for size in WORLDS}
PLANNED = {size: planned(size) for size in WORLDS}
DRAWN = {size: drawn(size) for size in WORLDS}
MISTAKES = {size: mistakes(size) for size in WORLDS}
UNLIKE = dict.fromkeys(WORLDS, on_cpus.UNLIKE)
MESHES = {size: test_dtensor.cases_of(size) for size in (2, 4) if size in WORLDS}


@dataclass(frozen=True)
class Large:
    """So large that a rank which did not wait for what another sends would read what is not there yet.

    Each rank's errors against fp32, of loss, hidden gradient and its shard's gradient, in shards and in one piece.
    """

    strategy: str | None = None
    sizes: tuple[int, int, int] = (4096, 1024, 32768)
    gradient: str | logitless.Sampled = "exact"

    def __call__(self, member: Member) -> dict[str, dict[str, float]]:
        inputs = self.inputs(member.device)
        ends = bounds(len(inputs.weight), SHARES[member.size]["uneven"])
        rows = slice(ends[member.rank], ends[member.rank + 1])
        own, right = replace(inputs, weight=inputs.weight[rows]), reference(inputs)
        right = replace(right, weight=right.weight[rows])
        found = {}
        for _ in range(3):  # a second and a third call meet memory that the first has used
            found["shards"] = self.results(own, member)
        found["whole"] = self.results(inputs)
        found["whole"] = replace(found["whole"], weight=found["whole"].weight[rows])
        return {name: vars(errors(result, right)) for name, result in found.items()}

    def inputs(self, device: torch.device) -> Inputs:
        tokens, hidden, vocabulary = self.sizes if device.type == "cuda" else (96, 64, 1100)
        random = generator(11)
        return Inputs(
            torch.randn(tokens, hidden, generator=random).to(device, NARROW),
            (torch.randn(vocabulary, hidden, generator=random) * (2 / hidden**0.5)).to(device, NARROW),
            torch.randint(vocabulary, (tokens,), generator=random).to(device),
        )

    def results(self, inputs: Inputs, member: Member | None = None) -> Gradients:
        hidden, weight = (tensor.detach().requires_grad_() for tensor in (inputs.hidden, inputs.weight))
        forced = contextlib.nullcontext()
        if self.strategy is not None:
            forced = logitless.schedules.force_strategy(self.strategy, window=4096)
        with forced:
            loss = logitless.linear_cross_entropy(
                hidden, weight, inputs.target, gradient=self.gradient, group=None if member is None else member.group
            )
        loss.backward()
        return Gradients(loss.detach(), hidden.grad, weight.grad)


LARGE = {
    "as planned": Large(),
    "stored": Large("stored"),
    "windowed": Large("windowed"),
    "all pairs kept": Large(sizes=(2048, 512, 8192), gradient=TRITON_SAMPLED.gradient),
}


@dataclass(frozen=True)
class Unwaited:
    """Calls in which the host waits for no device, after a first one in which kernels are compiled and groups made."""

    gradient: str | logitless.Sampled = "exact"

    def __call__(self, member: Member) -> None:
        tokens, width, entries = 64, 32, 700
        random = generator(12)
        hidden = torch.randn(tokens, width, generator=random).to(member.device).requires_grad_()
        weight = torch.randn(entries, width, generator=random).to(member.device).requires_grad_()
        class_weight = torch.ones(entries, device=member.device)
        target = torch.randint(entries * member.size, (tokens,), generator=random).to(member.device)
        options = {"group": member.group, "gradient": self.gradient}
        waiting = refusing_to_wait if member.device.type == "cuda" else contextlib.nullcontext
        for context in (contextlib.nullcontext, contextlib.nullcontext, waiting):
            with context():
                logitless.linear_cross_entropy(hidden, weight, target, weight=class_weight, **options).backward()
                found = logitless.token_statistics(hidden, weight, target, outputs=TOKEN_OUTPUTS, **options)
                (found.nll.sum() + found.entropy.sum()).backward()
        own = slice(member.rank * tokens // member.size, (member.rank + 1) * tokens // member.size)
        sequence = {**options, "sequence_parallel": True}
        for context in (contextlib.nullcontext, waiting):
            with context():
                logitless.linear_cross_entropy(hidden[own], weight, target, **sequence).backward()


UNWAITED = {"exact": Unwaited(), "sampled": Unwaited(logitless.Sampled())}
HALVES = Halves(tuple(Call(replace(BUSY, data=data), SHARES[2]["uneven"], AUTO) for data in ("random", "peaked")))


def cases_of(size: int) -> dict[str, workers.Case]:
    """All that the processes of one world run, the most trusted first."""
    return {
        "in step": in_step,
        "world group": world_group,
        **({"halves": HALVES} if size == 4 else {}),
        **{f"loss {name}": call for name, call in LOSSES[size].items()},
        **{f"large {name}": case for name, case in LARGE.items()},
        **{f"statistics {name}": call for name, call in STATISTICS[size].items()},
        **{f"empty {name}": call for name, call in EMPTY[size].items()},
        **{f"ties {way}": Ties(way, size) for way in TIES},
        **{f"workspace {name}": call for name, call in PLANNED[size].items()},
        **{f"count {name}": case for name, case in on_cpus.counted(size, COUNTS).items()},
        **{f"draws {name}": case for name, case in DRAWN[size].items()},
        **{f"unwaited {name}": case for name, case in UNWAITED.items()},
        **{f"mistake {name}": mistake for name, (mistake, _) in MISTAKES[size].items()},
        **{f"unlike {name}": odd(size, size - 1, arguments) for name, arguments in UNLIKE[size].items()},
        **{f"mesh {name}": case for name, case in MESHES.get(size, {}).items()},
        "in step at the end": in_step,
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[Outcome]]]:
    """The outcomes of one world's cases by name and rank; its processes run at the first call."""

    @lru_cache
    def run(size: int) -> dict[str, list[Outcome]]:
        return workers.run(cases_of(size), size, tmp_path_factory.mktemp(f"world{size}"), LIMIT, KIND)

    return run


each_world = pytest.mark.parametrize("size", WORLDS)


# --- values -----------------------------------------------------------------------------------------------------------


@each(LOSSES)
def test_loss_and_gradients(ran, size, name):
    check(LOSSES[size][name], ran(size)[f"loss {name}"], HERE)


@each_world
def test_check_can_fail(ran, size):
    """A bit of one rank's loss, and a hundred-thousandth of one rank's gradient, are found."""
    name = "triton-stored, even"
    call, outcomes = LOSSES[size][name], ran(size)[f"loss {name}"]

    def with_changed(which: str, change: Callable[[Tensor], Tensor]) -> list[Outcome]:
        *others, last = outcomes
        return [*others, replace(last, result={**last.result, which: change(last.result[which])})]

    with pytest.raises(AssertionError, match="loss differs between rank 0"):
        check(call, with_changed("loss", lambda loss: loss.nextafter(torch.tensor(0.0))), HERE)
    with pytest.raises(AssertionError, match="input: error"):
        check(call, with_changed("input", lambda gradient: gradient * (1 + 1e-5)), HERE)


@each_world
@pytest.mark.parametrize("name", LARGE)
def test_large_results(ran, size, name):
    """Errors are those of one GPU with the whole weight; a gradient that came too late would be off by its own size.

    A reduced loss may be right by luck in one of the two: its error may be an ulp of each token's loss, of some 10.
    """
    for found in workers.values(ran(size)[f"large {name}"]):
        for which, alone in found["whole"].items():
            floor = 10 * torch.finfo(torch.float32).eps if which == "loss" else 0.0
            assert found["shards"][which] <= FACTOR * alone + floor, (which, found)


@each(STATISTICS)
def test_statistics_and_gradients(ran, size, name):
    call, outcomes = STATISTICS[size][name], ran(size)[f"statistics {name}"]
    check(call, outcomes, HERE)
    check_integers(call, workers.values(outcomes)[0])


@each(EMPTY)
def test_no_token_counts(ran, size, name):
    call, results = EMPTY[size][name], workers.values(ran(size)[f"empty {name}"])
    whole = call.alone(HERE)
    for rank in range(size):
        result = joined(call, results, rank)
        assert result.keys() == whole.keys()
        for which, value in result.items():
            assert torch.equal(value, torch.zeros_like(whole[which])), which


@each_world
@pytest.mark.parametrize("way", TIES, ids=str)
def test_ties_between_shards(ran, size, way):
    """Of equal logits in different shards the first rank's is predicted, and the rank counts strictly larger ones."""
    case = Ties(way, size)
    scores, target = case.scores(), case.target()
    larger = (scores > scores.gather(1, (target % case.each)[:, None])).sum(1) * size
    for result in workers.values(ran(size)[f"ties {way}"]):
        assert torch.equal(result["prediction"], scores.argmax(1))
        assert torch.equal(result["target_rank"], larger)


@each_world
def test_default_group(ran, size):
    check(Call(on_cpus.ONE, SHARES[size]["uneven"]), ran(size)["world group"], HERE)


@pytest.mark.skipif(4 not in WORLDS, reason="needs four CUDA devices")
def test_groups_side_by_side(ran):
    outcomes = ran(4)["halves"]
    check(HALVES.calls[0], outcomes[:2], HERE)
    check(HALVES.calls[1], outcomes[2:], HERE)


@each(PLANNED)
def test_any_workspace(ran, size, name):
    """Ranks with one entry and with many follow plans that go together, or all refuse the workspace."""
    outcomes = ran(size)[f"workspace {name}"]
    if all("ValueError" in outcome.kinds for outcome in outcomes):
        assert all("workspace" in outcome.message for outcome in outcomes)
    else:
        check(PLANNED[size][name], outcomes, HERE)


@each_world
def test_some_workspace_serves(ran, size):
    workers.values(ran(size)[f"workspace {list(PLANNED[size])[-1]}"])


# --- collectives ------------------------------------------------------------------------------------------------------


@each_world
@pytest.mark.parametrize("name", COUNTS)
def test_collectives(ran, size, name):
    for kind in ("later", "first"):
        check_counts(ran(size)[f"count {kind} call, {name}"], COUNTS[name])


@each_world
@pytest.mark.parametrize("name", UNWAITED)
def test_nothing_waits(ran, size, name):
    workers.values(ran(size)[f"unwaited {name}"])


# --- samples ----------------------------------------------------------------------------------------------------------


def draws_of(ran: Callable, size: int, name: str) -> tuple[Call, list[Results]]:
    return DRAWN[size][name].call, workers.values(ran(size)[f"draws {name}"])


@each(DRAWN)
def test_sampled_gradient_is_unbiased(ran, size, name):
    check_unbiased(*draws_of(ran, size, name), HERE)


@each(DRAWN)
def test_sampled_loss_is_exact(ran, size, name):
    check_drawn_loss(*draws_of(ran, size, name), HERE)


@each_world
def test_ranks_agree_on_the_hidden_gradient(ran, size):
    _, results = draws_of(ran, size, "all options")
    for result in results:
        torch.testing.assert_close(result["input"], results[0]["input"])


# --- mistakes ---------------------------------------------------------------------------------------------------------


@each(MISTAKES)
def test_mistakes(ran, size, name):
    """All ranks raise, long before a collective would give up."""
    check_refusal(ran(size)[f"mistake {name}"], MISTAKES[size][name][1], SOON)


@each(UNLIKE)
def test_nothing_waits_in_vain(ran, size, name):
    """Where one rank is given less or more to do than the others, all serve the call or all refuse it."""
    outcomes = ran(size)[f"unlike {name}"]
    if all("ValueError" in outcome.kinds for outcome in outcomes):
        assert all(outcome.seconds < SOON for outcome in outcomes)
    else:
        workers.values(outcomes)


@each_world
@pytest.mark.parametrize("name", ["in step", "in step at the end"])
def test_ranks_are_in_step(ran, size, name):
    totals = [float(result["total"]) for result in workers.values(ran(size)[name])]
    assert totals == [sum(range(size))] * size


# --- meshes -----------------------------------------------------------------------------------------------------------


@each(MESHES)
def test_meshes(ran, size, name):
    """DTensors, ``parallelize_module`` and FSDP2, on meshes of one dimension and of two."""
    case, results = MESHES[size][name], workers.values(ran(size)[f"mesh {name}"])
    for found in results:
        if isinstance(case, test_dtensor.Placed):
            test_dtensor.check(found, test_dtensor.alone())
        elif isinstance(case, test_dtensor.Trained):
            test_dtensor.check(found, test_dtensor.trained_alone(case.tied))
        elif isinstance(case, test_dtensor.Counting):
            test_dtensor.check(found, test_dtensor.alone(ignored=True))
        elif isinstance(case, test_dtensor.Arriving):
            for each_form in found:
                test_dtensor.check(each_form, case.alone())


# --- training ---------------------------------------------------------------------------------------------------------

DIVISIONS = [(2, 1), (1, 2), *([(2, 2)] if 4 in WORLDS else [])]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], tuple[Path, str]]:
    """Folder and errors of ``logitless-demo train`` by its division, and of one process; all at the same time."""
    training = pytest.importorskip("test_training")
    text = training.write_text(tmp_path_factory.mktemp("text") / "text.txt")
    jobs = {}
    for data, tensor in [(1, 1), *DIVISIONS]:
        folder = tmp_path_factory.mktemp("training") / "run"
        words = training.command(text, folder, "new", data, tensor, device=KIND)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (folder.parent / "output").open("w") as output:
            job = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT)
        jobs[data, tensor] = job, folder
    for job, _ in jobs.values():
        try:
            job.wait(TRAINING_LIMIT)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
    return {division: (folder, (folder.parent / "output").read_text()) for division, (_, folder) in jobs.items()}


@pytest.mark.parametrize(("data", "tensor"), DIVISIONS)
def test_curve_of_one_process(trained, data, tensor):
    """Losses and norms of one GPU, by FSDP2, tensor parallelism and both."""
    training = pytest.importorskip("test_training")
    (folder, said), (alone, said_alone) = trained[data, tensor], trained[1, 1]
    assert "all 6 steps done" in said_alone, said_alone
    assert "all 6 steps done" in said, said
    training.assert_same_curve(folder, alone)
