"""A vocabulary in shards: each rank of a process group holds consecutive rows of the weight, in rank order.

A rank computes statistics of its own shard as if that were all, with a target that lies elsewhere taken for its first
entry. What its row is in the whole vocabulary follows from one all-gather of ``[C, N]`` numbers,

    peak         = max_r peak_r                          prediction   = that of the first rank with the largest logit
    log_sum      = log sum_r exp(peak_r - peak + log_sum_r)
    target_logit = that of the rank that has the target
    mean_gap     = sum_r q_r (mean_gap_r + peak - peak_r),   q_r = exp(peak_r - peak + log_sum_r - log_sum)
    smooth_logit = sum_r (smooth_logit_r + (peak_r - peak) sum_v s_v), v in the shard of r

and gradients follow from these and the coefficients, of which ``c`` is 0 on ranks that do not have the target: those of
the weight and the bias are the shard's own, those of the hidden states a sum over ranks, one all-reduce. All ranks form
the same sums in the same order, so that losses agree bit for bit.

Before a call computes anything the ranks tell each other through the group's store, on the host, what they were called
with. Ranks that disagree would wait for each other in a collective, or mix up numbers; so all raise, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from logitless.backends.contract import Statistics

# Facts that ranks may differ in.
OWN = ("vocabulary", "rows", "has no room for all rows")
KEY = "logitless"


@dataclass(frozen=True)
class Layout:
    """Who has what.

    Attributes:
        group: of the ranks.
        rank: this one's number in the group.
        sizes: rows of the weight, by rank.
        rows: rows of the hidden states by rank, where they are sharded too; None where each rank has all.
    """

    group: dist.ProcessGroup
    rank: int
    sizes: tuple[int, ...]
    rows: tuple[int, ...] | None

    @property
    def vocabulary(self) -> int:
        """V of the whole."""
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """Index of the first row of this rank's shard."""
        return sum(self.sizes[: self.rank])

    def own(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] indices into this shard, 0 for targets that lie elsewhere, and [N] bool which lie in it."""
        inside = (target >= self.first) & (target < self.first + self.sizes[self.rank])
        return torch.where(inside, target - self.first, 0), inside

    def own_rows(self, values: torch.Tensor) -> torch.Tensor:
        """[R] those of this rank's rows, of [N] values for all; the same where rows are not sharded."""
        return values if self.rows is None else values.split(self.rows)[self.rank]

    def gathered(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, D] hidden states of all ranks: one all-gather, if they are sharded."""
        if self.rows is None or sum(self.rows) == 0:
            return hidden
        most, columns = max(self.rows), hidden.shape[1]
        parts = hidden.new_empty(len(self.rows), most, columns)
        own = hidden.contiguous()
        if own.shape[0] < most:
            own = torch.cat((own, own.new_zeros(most - own.shape[0], columns)))
        _all_gather(parts.view(-1, columns), own, self.group).wait()
        if min(self.rows) == most:
            return parts.view(-1, columns)
        return torch.cat([part[:count] for part, count in zip(parts, self.rows, strict=True)])

    def summed(self, gradient: torch.Tensor) -> torch.Tensor:
        """[N, D] the sum over ranks, or [R, D] its rows of this rank; in fp32, or fp64."""
        gradient = gradient if gradient.dtype == torch.float64 else gradient.float()
        if gradient.shape[0] == 0:
            return gradient
        if self.rows is None:
            gradient = gradient.contiguous()
            dist.all_reduce(gradient, group=self.group)
            return gradient
        most, columns = max(self.rows), gradient.shape[1]
        if min(self.rows) < most:
            padded = gradient.new_zeros(len(self.rows), most, columns)
            for place, part in zip(padded, gradient.split(self.rows), strict=True):
                place[: part.shape[0]] = part
            gradient = padded.view(-1, columns)
        own = gradient.new_empty(most, columns)
        _reduce_scatter(own, gradient.contiguous(), self.group)
        return own[: self.rows[self.rank]]

    def sum_over_ranks(self, numbers: torch.Tensor) -> torch.Tensor:
        """[N] integers, the sum over ranks."""
        if numbers.shape[0]:
            dist.all_reduce(numbers, group=self.group)
        return numbers

    def class_weights(
        self,
        weight: torch.Tensor,  # [this shard's V]
        target: torch.Tensor,  # [N]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N] the class weights of targets, and 0-d the sum of all class weights: one all-reduce."""
        index, inside = self.own(target)
        packed = weight.new_zeros(target.shape[0] + 1)
        if weight.shape[0]:
            packed[:-1] = torch.where(inside, weight[index], 0)
        packed[-1] = weight.sum()
        dist.all_reduce(packed, group=self.group)
        return packed[:-1], packed[-1]


@dataclass(frozen=True)
class Shard:
    """This rank's part of a call.

    Attributes:
        layout: of the vocabulary over ranks.
        has_target: [N] bool packed rows whose target this shard has.
    """

    layout: Layout
    has_target: torch.Tensor

    def of_own_targets(self, c: torch.Tensor) -> torch.Tensor:
        """[N] coefficients of the one-hot, 0 where another shard has the target."""
        return torch.where(self.has_target, c, 0.0)


class Merging:
    """The statistics of one forward pass, merged over ranks: all at once, or chunk by chunk by a backend that must.

    It is the ``Problem.merge`` of a sharded problem.
    """

    def __init__(self, shard: Shard, smoothing: torch.Tensor | float | None) -> None:
        """Nothing merged yet, of a shard with that weight of each logit in ``smooth_logit``, or one for all."""
        self._layout, self._has_target = shard.layout, shard.has_target
        if isinstance(smoothing, torch.Tensor):
            self._smoothing: torch.Tensor | float = smoothing.sum()
        else:
            self._smoothing = (smoothing or 0.0) * shard.layout.sizes[shard.layout.rank]
        self._parts: list[Statistics] = []

    def __call__(self, part: Statistics, rows: slice) -> Callable[[], Statistics]:
        """Begins to merge the statistics of some rows; what it returns waits, and gives those of the whole."""
        columns = _packed(part, self._has_target[rows], self._layout.first, self._smoothing)
        ranks = len(self._layout.sizes)
        table = columns.new_empty(ranks, *columns.shape)
        gathered = table.view(ranks * columns.shape[0], columns.shape[1])
        work = _all_gather(gathered, columns, self._layout.group)

        def wait() -> Statistics:
            work.wait()
            self._parts.append(_merged(table, part))
            return self._parts[-1]

        return wait

    def whole(self, statistics: Statistics) -> Statistics:
        """Statistics of the whole from those of the shard, unless a backend has merged them before."""
        if statistics.peak.shape[0] == 0:
            return statistics
        if not self._parts:
            return self(statistics, slice(0, statistics.peak.shape[0]))()
        if len(self._parts) == 1:
            return self._parts[0]
        names = [field.name for field in fields(Statistics) if field.name not in ("target_rank", "saved")]
        columns = {name: [getattr(part, name) for part in self._parts] for name in names}
        joined: dict[str, Any] = {name: None if c[0] is None else torch.cat(c) for name, c in columns.items()}
        return Statistics(**joined)


def _packed(part: Statistics, has_target: torch.Tensor, first: int, smoothing: torch.Tensor | float) -> torch.Tensor:
    """[C, N] what the ranks tell each other; indices travel as the bits of a float."""
    zero = torch.zeros_like(part.target_logit)
    columns = [part.peak, part.log_sum, torch.where(has_target, part.target_logit, zero)]
    if part.mean_gap is not None:
        columns.append(part.mean_gap)
    if part.smooth_logit is not None:
        columns += [part.smooth_logit, zero + smoothing]
    if part.prediction is not None:
        integer = torch.int64 if zero.dtype == torch.float64 else torch.int32
        columns.append((part.prediction + first).to(integer).view(zero.dtype))
    return torch.stack(columns)


def _merged(table: torch.Tensor, part: Statistics) -> Statistics:
    """Statistics of the whole from [ranks, C, N] those of the shards."""
    columns = iter(table.unbind(1))
    peaks, log_sums = next(columns), next(columns)
    peaks = torch.where(log_sums == -torch.inf, -torch.inf, peaks)  # of a shard whose logits are all -inf
    rank = torch.where(log_sums.isnan(), torch.nan, peaks).argmax(0)  # a row with NaN predicts the first of them
    peak = peaks.amax(0)
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    below = peaks - peak
    log_sum = (below + log_sums).exp().sum(0).log()
    target_logit = next(columns).sum(0)
    mean_gap = smooth = prediction = None
    if part.mean_gap is not None:
        share = ((below + log_sums) - log_sum).exp()
        mean_gap = torch.where(share == 0, 0.0, share * (next(columns) - below)).sum(0)
    if part.smooth_logit is not None:
        smooth, smoothing = next(columns), next(columns)
        smooth = (smooth + torch.where(below == -torch.inf, 0.0, below) * smoothing).sum(0)
    if part.prediction is not None:
        bits = next(columns)
        integer = torch.int64 if bits.dtype == torch.float64 else torch.int32
        prediction = bits.contiguous().view(integer).gather(0, rank[None])[0].long()
    return Statistics(peak, log_sum, target_logit, mean_gap, smooth, prediction)


# --- agreement --------------------------------------------------------------------------------------------------------

# How often the ranks of a group have met.
_exchanges: WeakKeyDictionary[dist.ProcessGroup, int] = WeakKeyDictionary()


@dataclass
class RankAgreement:
    """The ranks of a group at the start of a call; ``exchange`` is to be called once, or ``abandon``."""

    group: dist.ProcessGroup
    done: bool = False

    def exchange(self, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The facts of all ranks.

        Raises:
            ValueError: a rank has abandoned its call, or facts differ that must not.
        """
        self.done = True
        answers = _exchange(self.group, {"facts": dict(facts)})
        for rank, answer in enumerate(answers):
            if "error" in answer:
                raise ValueError(f"group: rank {rank} cannot make this call: {answer['error']}")
        everyone = [answer["facts"] for answer in answers]
        for name in facts:
            values = [theirs.get(name) for theirs in everyone]
            if name not in OWN and any(value != values[0] for value in values):
                listed = ", ".join(f"rank {rank}: {value}" for rank, value in enumerate(values))
                raise ValueError(f"group: all ranks must make the same call, but differ in {name}: {listed}")
        return everyone

    def abandon(self, error: Exception) -> None:
        """Tell the others, who wait for this rank's facts, why there are none."""
        self.done = True
        _exchange(self.group, {"error": str(error)})


@contextmanager
def rank_agreement(group: dist.ProcessGroup | None) -> Iterator[RankAgreement | None]:
    """What the ranks exchange before a call, or the error that the body raises before; None without a group."""
    if group is None:
        yield None
        return
    here = RankAgreement(group)
    try:
        yield here
    except Exception as error:
        if not here.done:
            here.abandon(error)
        raise


def _exchange(group: dist.ProcessGroup, answer: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank says, by rank, through the group's store: the host waits for the others' hosts, for no device."""
    store, rank, ranks = group.get_group_store(), group.rank(), group.size()
    number = _exchanges.get(group, 0)
    _exchanges[group] = number + 1
    if number >= 2:  # all ranks have come to the one after it, so all have read it
        store.delete_key(f"{KEY}/{number - 2}/{rank}")
    store.set(f"{KEY}/{number}/{rank}", json.dumps(answer))
    try:
        said: Sequence[bytes] = store.multi_get([f"{KEY}/{number}/{other}" for other in range(ranks)])
    except RuntimeError as error:
        raise RuntimeError(
            f"group: not all of its {ranks} ranks came to the call that rank {rank} makes; one makes no such call, or "
            f"failed before it could say so: see what it printed ({error})"
        ) from error
    return [json.loads(words) for words in said]


# --- collectives ------------------------------------------------------------------------------------------------------

# PyTorch 2.13 has them under new names, and warns of the old ones.


def _all_gather(result: torch.Tensor, own: torch.Tensor, group: dist.ProcessGroup) -> dist.Work:
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    work = gather(result, own, group=group, async_op=True)
    assert work is not None
    return work


def _reduce_scatter(result: torch.Tensor, parts: torch.Tensor, group: dist.ProcessGroup) -> None:
    scatter = dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    scatter(result, parts, group=group)


def of_target(statistics: Statistics, part: Statistics) -> Statistics:
    """Statistics of the whole as a backend wants them for its backward pass: what it left, and its own target logit."""
    return replace(statistics, target_logit=part.target_logit, saved=part.saved)
