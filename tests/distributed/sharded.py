"""Calls of the library on the shards of a problem, and mistakes: what the processes of a group run.

Everything here can be pickled and is the same on every rank, which cuts its part out of the whole problem. Tensors are
on the CPU; where a rank works on a GPU, calls take their arguments there and bring results and gradients back.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from workers import CPU, Member

import logitless
from implementations import REFERENCE, Implementation, moved
from logitless.options import FLOAT_OUTPUTS, TOKEN_OUTPUTS
from problems import Case, Problem, generator
from tolerance import Results, loss_and_gradients, statistics_and_gradients, upstream_for

Function = Literal["loss", "statistics"]

# Arguments with one row for each vocabulary entry.
PER_ENTRY = ("linear_bias", "weight")

# Each rank's share of the vocabulary, or of the tokens; of eight ranks only GPUs have them.
SHARES = {
    2: {"even": (1, 1), "uneven": (1, 6), "empty": (0, 1)},
    3: {"even": (1, 1, 1), "uneven": (3, 1, 2), "empty": (1, 0, 2)},
    4: {"even": (1, 1, 1, 1), "uneven": (5, 1, 2, 4), "empty": (0, 3, 0, 1)},
    8: {"even": (1,) * 8, "uneven": (5, 1, 2, 4, 3, 1, 7, 2), "empty": (0, 3, 0, 1, 2, 2, 0, 1)},
}


def on(device: torch.device, function: Callable) -> Callable:
    """A function of tensors, of tensors on the CPU: it takes them to the device, and what it returns back."""
    if device.type == "cpu":
        return function

    def call(*args, **options) -> Tensor | logitless.TokenStatistics:
        there = {name: moved(value, device) for name, value in options.items()}
        found = function(*(moved(value, device) for value in args), **there)
        if isinstance(found, Tensor):
            return found.cpu()
        return replace(found, **{name: moved(value, "cpu") for name, value in vars(found).items()})

    return call


def bounds(count: int, shares: tuple[int, ...]) -> list[int]:
    """Where each rank's part begins, and the end."""
    return [count * sum(shares[:rank]) // sum(shares) for rank in range(len(shares) + 1)]


def part(tensor: Tensor, shares: tuple[int, ...], rank: int) -> Tensor:
    """A rank's consecutive rows, as a leaf of its own."""
    start, end = bounds(len(tensor), shares)[rank : rank + 2]
    return tensor.detach()[start:end].clone().requires_grad_(tensor.requires_grad)


def shard(problem: Problem, shares: tuple[int, ...], token_shares: tuple[int, ...] | None, rank: int) -> Problem:
    """What a rank passes: its rows of all that is per vocabulary entry, and of the tokens where these are sharded."""
    per_entry = {name: part(problem.options[name], shares, rank) for name in PER_ENTRY if name in problem.options}
    return replace(
        problem,
        input=problem.input if token_shares is None else part(problem.input, token_shares, rank),
        linear_weight=part(problem.linear_weight, shares, rank),
        options={**problem.options, **per_entry},
    )


@dataclass(frozen=True)
class Call:
    """One call on every rank, with its gradients."""

    case: Case
    shares: tuple[int, ...]
    implementation: Implementation = REFERENCE
    function: Function = "loss"
    token_shares: tuple[int, ...] | None = None  # sequence parallel
    all_ignored: bool = False
    tensor_normalizer: bool = False
    main_grad: bool = False
    masked_shard: int | None = None  # a rank whose entries a bias of -inf takes out
    backwards: int = 1
    workspace: int | None = None

    def __str__(self) -> str:
        words = [self.function, str(self.implementation), f"{self.case}", "-".join(map(str, self.shares))]
        if self.token_shares:
            words.append("tokens=" + "-".join(map(str, self.token_shares)))
        names = ("all_ignored", "tensor_normalizer", "main_grad")
        words += [name for name in names if getattr(self, name)]
        if self.masked_shard is not None:
            words.append("masked")
        if self.backwards > 1:
            words.append(f"backwards={self.backwards}")
        return ":".join(words)

    def problem(self) -> Problem:
        """The whole problem, as one process would pass it."""
        problem = self.case.problem() if self.function == "loss" else self.case.head_problem()
        if self.all_ignored:
            problem.target.fill_(-100)
        if self.tensor_normalizer:
            problem = problem.with_options(normalizer=torch.tensor(problem.options["normalizer"], dtype=torch.float32))
        if self.masked_shard is not None:
            problem = self.masked(problem)
        return problem

    def masked(self, problem: Problem) -> Problem:
        """The problem with no mass, and no target, in one rank's shard, which must not be the first."""
        start, end = bounds(len(problem.linear_weight), self.shares)[self.masked_shard : self.masked_shard + 2]
        bias = problem.options["linear_bias"].detach().clone()
        bias[start:end] = -torch.inf
        target = torch.where((problem.target >= start) & (problem.target < end), start - 1, problem.target)
        return replace(problem, target=target).with_options(linear_bias=bias.requires_grad_())

    def __call__(self, member: Member) -> Results:
        parallel = {"group": member.group, "sequence_parallel": self.token_shares is not None}
        mine = shard(self.problem(), self.shares, self.token_shares, member.rank)
        return self.results(mine, member.device, **parallel)

    def alone(self, device: torch.device = CPU) -> Results:
        """The same in one process, with the whole weight."""
        return self.results(self.problem(), device)

    def results(self, problem: Problem, device: torch.device, **parallel) -> Results:
        """Outputs and gradients by name, with those in ``main_grad`` under the weight's name."""
        options = {
            "backend": self.implementation.backend,
            "gradient": self.implementation.gradient,
            "workspace": self.workspace,
            **parallel,
        }
        with self.implementation.forced(), self.implementation.grad_mode():
            if self.implementation.strategy == "loss_only":
                return self.without_gradients(problem, device, **options)
            if self.main_grad:
                return self.added(problem, device, **options)
            return self.with_gradients(problem, device, **options)

    def without_gradients(self, problem: Problem, device: torch.device, **options) -> Results:
        if self.function == "loss":
            return {"loss": problem.call(on(device, logitless.linear_cross_entropy), **options)}
        return by_name(problem.call(on(device, logitless.token_statistics), outputs=TOKEN_OUTPUTS, **options))

    def with_gradients(self, problem: Problem, device: torch.device, **options) -> Results:
        if self.function == "statistics":
            return all_statistics(problem, device, **options)
        if self.backwards > 1:
            return self.retained(problem, device, **options)
        return loss_and_gradients(on(device, logitless.linear_cross_entropy), problem, **options)

    def retained(self, problem: Problem, device: torch.device, **options) -> Results:
        """The gradients of the last of several backward passes through one graph."""
        loss = problem.call(on(device, logitless.linear_cross_entropy), **options)
        leaves = problem.leaves()
        for _ in range(self.backwards):
            found = torch.autograd.grad(loss, list(leaves.values()), upstream_for(loss), retain_graph=True)
        return {"loss": loss.detach(), **dict(zip(leaves, found, strict=True))}

    def added(self, problem: Problem, device: torch.device, **options) -> Results:
        """With the weight's gradient added to a buffer, twice, to see that what is there stays."""
        buffer = torch.zeros(problem.linear_weight.shape, device=device)
        others = {name: leaf for name, leaf in problem.leaves().items() if name != "linear_weight"}
        for _ in range(2):
            loss = problem.call(on(device, logitless.linear_cross_entropy), main_grad=buffer, **options)
            loss.backward(upstream_for(loss))
        assert problem.linear_weight.grad is None
        gradients = {name: leaf.grad / 2 for name, leaf in others.items()}
        return {"loss": loss.detach(), "linear_weight": buffer.cpu() / 2, **gradients}


def by_name(statistics: logitless.TokenStatistics) -> Results:
    return {name: getattr(statistics, name) for name in TOKEN_OUTPUTS}


def all_statistics(problem: Problem, device: torch.device, **options) -> Results:
    """All statistics from one call, and the gradients for a different upstream gradient of each float."""
    whole: Results = {}

    def floats(*args, **given) -> Results:
        whole.update(by_name(on(device, logitless.token_statistics)(*args, outputs=TOKEN_OUTPUTS, **given)))
        return {name: whole[name] for name in FLOAT_OUTPUTS}

    results = statistics_and_gradients(floats, problem, **options)
    return {**{name: value.detach() for name, value in whole.items()}, **results}


# --- predictions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ties:
    """Token statistics where every logit of a shard occurs, bit for bit, in every other shard too."""

    implementation: Implementation
    size: int
    each: int = 40  # vocabulary entries a rank
    tokens: int = 24

    def scores(self) -> Tensor:
        """One shard's logits, ``[tokens, each]``: whole numbers, all different in a row."""
        random = generator(21)
        rows = [torch.randperm(self.each, generator=random) for _ in range(self.tokens)]
        return torch.stack(rows).float()

    def target(self) -> Tensor:
        return torch.randint(self.each * self.size, (self.tokens,), generator=generator(22))

    def __call__(self, member: Member) -> Results:
        hidden = torch.eye(self.tokens).requires_grad_()
        weight = self.scores().T.contiguous().requires_grad_()
        with self.implementation.forced(), self.implementation.grad_mode():
            statistics = on(member.device, logitless.token_statistics)(
                hidden,
                weight,
                self.target(),
                outputs=("prediction", "target_rank"),
                backend=self.implementation.backend,
                gradient=self.implementation.gradient,
                group=member.group,
            )
        return {"prediction": statistics.prediction, "target_rank": statistics.target_rank}


# --- collectives ------------------------------------------------------------------------------------------------------


KINDS = {"allgather": "all-gather", "reducescatter": "reduce-scatter", "allreduce": "all-reduce"}


class Collectives(TorchDispatchMode):
    """Lists the collectives called, whichever Python function called them."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if namespace in ("c10d", "_c10d_functional", "c10d_functional") and name != "wait_tensor":
            plain = name.replace("_", "")
            self.kinds.append(next((kind for part, kind in KINDS.items() if part in plain), name))
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Counted:
    """The collectives of a forward and of a backward pass, in the second call of its kind or, ``first``, the first."""

    call: Call
    outputs: tuple[str, ...] = ("nll",)
    first: bool = False

    def __call__(self, member: Member) -> dict[str, list[str]]:
        if not self.first:
            self.once(member, member.group)
            return self.once(member, member.group)
        group = dist.new_group()
        try:
            return self.once(member, group)
        finally:
            dist.destroy_process_group(group)

    def once(self, member: Member, group: dist.ProcessGroup) -> dict[str, list[str]]:
        call = self.call
        problem = shard(call.problem(), call.shares, call.token_shares, member.rank)
        sequence_parallel = call.token_shares is not None
        options = {"backend": call.implementation.backend, "gradient": call.implementation.gradient}
        with call.implementation.forced(), call.implementation.grad_mode():
            with Collectives() as forward:
                loss = self.loss(problem, member.device, group=group, sequence_parallel=sequence_parallel, **options)
            with Collectives() as backward:
                if loss.requires_grad:
                    torch.autograd.grad(loss, list(problem.leaves().values()))
        return {"forward": forward.kinds, "backward": backward.kinds}

    def loss(self, problem: Problem, device: torch.device, **options) -> Tensor:
        if self.call.function == "loss":
            return problem.call(on(device, logitless.linear_cross_entropy), **options)
        return problem.call(on(device, logitless.token_statistics), outputs=self.outputs, **options).nll.sum()


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Draws:
    """Many sampled gradients of one problem."""

    call: Call
    threshold: float
    number: int
    seeds: tuple[int, ...]  # of each rank's generator

    def __call__(self, member: Member) -> Results:
        problem = shard(self.call.problem(), self.call.shares, self.call.token_shares, member.rank)
        sampled = logitless.Sampled(self.threshold, generator=generator(self.seeds[member.rank]))
        options = {
            "backend": self.call.implementation.backend,
            "gradient": sampled,
            "group": member.group,
            "sequence_parallel": self.call.token_shares is not None,
        }
        loss = on(member.device, logitless.linear_cross_entropy)
        draws = [loss_and_gradients(loss, problem, **options) for _ in range(self.number)]
        return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


# --- mistakes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arguments:
    """What one rank passes to a small call."""

    tokens: int = 24
    rows: int | None = None  # of the input, where not as many as tokens
    hidden: int = 16
    entries: int = 30  # of this rank's shard
    dtype: torch.dtype = torch.float32
    weight_dtype: torch.dtype | None = None
    target: int = 0  # of the last token, if there is one
    input_gradient: bool = True
    # Arguments that are there or not, and change nothing: ones, and a bias and a buffer of zeros.
    given: tuple[Literal["linear_bias", "weight", "token_weight", "main_grad"], ...] = ()
    function: Function = "loss"
    options: dict[str, object] = field(default_factory=dict)

    def __call__(self, member: Member) -> Tensor:
        random = generator(31)
        rows = self.tokens if self.rows is None else self.rows
        hidden = torch.randn(rows, self.hidden, generator=random).to(self.dtype).requires_grad_(self.input_gradient)
        weight = torch.randn(self.entries, self.hidden, generator=random).to(self.weight_dtype or self.dtype)
        target = torch.zeros(self.tokens, dtype=torch.int64)
        target[-1:] = self.target
        arguments = (hidden, weight.requires_grad_(), target)
        neutral = {
            "linear_bias": torch.zeros(self.entries),
            "weight": torch.ones(self.entries),
            "token_weight": torch.ones(self.tokens),
            "main_grad": torch.zeros(self.entries, self.hidden),
        }
        options = {**self.options, **{name: neutral[name] for name in self.given}, "group": member.group}
        if self.function == "statistics":
            return on(member.device, logitless.token_statistics)(*arguments, **options).nll.sum()
        return on(member.device, logitless.linear_cross_entropy)(*arguments, **options).sum()


@dataclass(frozen=True)
class Mistake:
    """A call that cannot be served, by rank."""

    by_rank: tuple[Arguments, ...]

    def __call__(self, member: Member) -> Results:
        loss = self.by_rank[member.rank](member)
        loss.backward()
        return {"loss": loss.detach()}


def world_group(member: Member) -> Results:
    """The default group, given as the attribute that names it."""
    call = Call(Case(dtype=torch.float32), SHARES[member.size]["uneven"])
    return call(replace(member, group=dist.group.WORLD))


@dataclass(frozen=True)
class Halves:
    """Two groups side by side, each with data of its own: a rank in the group is not the rank in the world."""

    calls: tuple[Call, Call]

    def __call__(self, member: Member) -> Results:
        half = member.size // 2
        groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, member.size)))]
        own, rank = divmod(member.rank, half)
        return self.calls[own](replace(member, rank=rank, size=half, group=groups[own]))


# --- the processes themselves -----------------------------------------------------------------------------------------


def stumble(member: Member) -> Results:
    """Fails on one rank."""
    if member.rank == 0:
        raise LookupError("rank 0 stumbled")
    return {}


def in_step(member: Member) -> Results:
    total = torch.tensor(float(member.rank), device=member.device)
    dist.all_reduce(total, group=member.group)
    return {"total": total}


def sleep(member: Member) -> Results:
    time.sleep(600)
    return {}
