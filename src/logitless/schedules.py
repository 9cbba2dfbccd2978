"""Schedules for a problem: which there are, and which of those that fit is best.

A backend that can say what a schedule costs gets the cheapest; the others get the first in an order of preference,
which is that of the torch backend on a CPU.
"""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from logitless.backends.contract import BackendModule, Schedule, Shape, Strategy, alias_spacing
from logitless.options import BLOCK
from logitless.sampling import block_count

# Tile sizes in order of preference. Products of fewer rows or columns than the first few lose speed: at D=768 on two
# cores, chunks of 128 rows take 1.6 times as long as 512 in fp32, windows of 512 columns 1.1 times as long as 2048.
CHUNK_ROWS = (1024, 768, 512, 384, 256, 192, 128)
SMALL_CHUNK_ROWS = (96, 64, 32, 16, 8, 4, 2, 1)
WINDOWS = (8192, 4096, 2048, 1024, 512, 256)
SMALL_WINDOWS = (128, 64, 32)
TILE_ROWS = (2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
# What the thirty or so small operations on a window cost, in columns of one product.
WINDOW_OVERHEAD = 128


# Sizes that the cheapest schedule is sought among. On a GPU a product of fewer rows than a few thousand loses speed to
# the traffic of the weight and its gradient.
COSTED_ROWS = (32768, 16384, 12288, 8192, 6144, 4096, 3072, 2048, 1024, 512, 256, 128, 64, 32, 16)
COSTED_CHUNKS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024)
COSTED_WINDOWS = (32768, 16384, 8192, 4096, 2048, 1024, 512, 256, 128)
# Of schedules whose cost is within this of the least, the one that holds the least is taken.
SAME_COST = 1.005

STRATEGIES: dict[Strategy, str] = {
    "loss_only": "no gradient is wanted",
    "stored": "the logits fit the workspace",
    "chunked": "scalar reduction: the gradient is computed with the loss, row chunk by row chunk",
    "windowed": "the backward pass recomputes vocabulary windows",
    "sampled": "gradient=Sampled(): the backward pass computes the kept blocks alone",
}


Fits = Callable[[Schedule], bool]


@dataclass(frozen=True)
class Forced:
    """What ``force_strategy`` demands."""

    strategy: Strategy
    rows: int | None
    window: int | None
    kept: int | None = None
    aliased: int | None = None
    prepared: bool = False


@dataclass(frozen=True)
class Search:
    """The schedules of one problem on one backend.

    Attributes:
        shape: of the problem.
        scalar: whether the output is one number, so that its gradient may be computed before the upstream one is known.
        backend: which serves it.
        forced: the one schedule there is, if a test demands it.
    """

    shape: Shape
    scalar: bool
    backend: BackendModule
    forced: Forced | None = None

    def needed(self, schedule: Schedule) -> int:
        """Bytes a schedule holds."""
        return self.backend.workspace(self.shape, schedule)

    def best(self, budget: int) -> Schedule | None:
        """The best schedule that holds no more than the budget, or None where none does."""
        if self.forced is not None:
            schedule = self._demanded(self.forced)
            return schedule if self.needed(schedule) <= budget else None

        def fits(schedule: Schedule) -> bool:
            return self.needed(schedule) <= budget

        if self._costed:
            return self._cheapest(fits)
        candidates = [*self._traced(self._preferred())]
        schedule = next((candidate for candidate in candidates if fits(candidate)), None)
        return None if schedule is None else self._refine(schedule, candidates, fits)

    def least(self) -> Schedule:
        """The schedule that holds least."""
        if self.forced is not None:
            return self._demanded(self.forced)
        return min(self._traced(self._costed_candidates() if self._costed else self._preferred()), key=self.needed)

    def _traced(self, candidates: Iterator[Schedule]) -> Iterator[Schedule]:
        """Those of the strategy that a graph was traced with, if it was."""
        strategy = self.shape.traced
        return (candidate for candidate in candidates if strategy is None or candidate.strategy == strategy)

    @property
    def _costed(self) -> bool:
        whole = max(1, self.shape.tokens)
        return self.backend.cost(self.shape, Schedule("loss_only", whole, self.shape.vocabulary)) is not None

    def _cost(self, schedule: Schedule) -> float:
        cost = self.backend.cost(self.shape, schedule)
        assert cost is not None
        return cost

    def _cheapest(self, fits: Fits) -> Schedule | None:
        costs = {}
        for candidate in self._traced(self._costed_candidates()):
            filled = self._cache_windows(candidate, fits) if candidate.strategy == "windowed" else candidate
            if fits(filled):
                costs[filled] = self._cost(filled)
        if not costs:
            return None
        limit = SAME_COST * min(costs.values())
        return min((schedule for schedule, cost in costs.items() if cost <= limit), key=self.needed)

    def _costed_candidates(self) -> Iterator[Schedule]:
        shape, tokens, vocabulary = self.shape, max(1, self.shape.tokens), self.shape.vocabulary
        multiple = self.backend.window_multiple(shape)
        if not shape.any_gradient:
            for rows in _up_to(COSTED_ROWS, tokens):
                yield Schedule("loss_only", rows, vocabulary)
            return
        if shape.threshold is not None:
            # Each tile of a shard's rows would be a collective.
            for rows in (tokens,) if shape.sharded else _up_to(COSTED_ROWS, tokens):
                yield Schedule("sampled", rows, vocabulary)
            return
        narrower = [window for window in COSTED_WINDOWS if window % multiple == 0 and window < vocabulary]
        windows = narrower or [vocabulary]
        if self._may_be_ahead:
            yield self._prepared()
        if self._may_cache:
            yield Schedule("stored", tokens, vocabulary, cached_windows=1, backward_window=windows[0])
        if self._may_be_ahead and not shape.main_grad:
            for chunks in _up_to(COSTED_CHUNKS, tokens):
                yield Schedule("chunked", math.ceil(tokens / chunks), vocabulary)
        for window in windows:
            plain = Schedule("windowed", tokens, window, backward_window=window)
            most = self._alias_windows(plain).aliased_windows
            for aliased in {0, *(2**power for power in range(8) if 2**power < most), most}:
                yield replace(plain, aliased_windows=aliased)

    @property
    def _may_be_ahead(self) -> bool:
        """Whether the gradient of the logits may be formed before the upstream gradient is known.

        Not in fp16, where what is not scaled by a loss scale yet would underflow; nor by kernels that form it with the
        statistics, where these are those of a shard.
        """
        if self.shape.sharded and self._costed:
            return False
        half = torch.float16 in (self.shape.product_dtype, self.shape.compute_dtype if self._costed else None)
        return self.scalar and not half

    @property
    def _may_cache(self) -> bool:
        """Whether what is kept of a window says all that its gradient needs.

        A backend that keeps probabilities takes a capped logit from its probability's logarithm, for the part of label
        smoothing that the cap leaves; in fp16 too many probabilities are zero.
        """
        shape = self.shape
        if shape.traced is not None:
            return False
        smoothed = shape.softcapped and "smooth_logit" in shape.statistics
        return not (self._costed and smoothed and shape.compute_dtype == torch.float16)

    def _prepared(self) -> Schedule:
        tokens, vocabulary = max(1, self.shape.tokens), self.shape.vocabulary
        return Schedule("stored", tokens, vocabulary, cached_windows=1, backward_window=vocabulary, prepared=True)

    # --- order of preference ------------------------------------------------------------------------------------------

    def _preferred(self) -> Iterator[Schedule]:
        if not self.shape.any_gradient:
            yield from self._tiled("loss_only", WINDOWS + SMALL_WINDOWS)
            return
        if self.shape.threshold is not None:
            yield from self._tiled("sampled", tuple(w for w in WINDOWS + SMALL_WINDOWS if w % BLOCK == 0))
            return
        yield self._stored(self.shape.vocabulary)
        yield self._stored(WINDOWS[0])
        yield from self._chunked(CHUNK_ROWS)
        yield from self._windowed(WINDOWS)
        yield from self._chunked(SMALL_CHUNK_ROWS)
        yield from self._windowed(SMALL_WINDOWS)

    @property
    def _whole_rows(self) -> bool:
        """Whether a forward tile must span the vocabulary: a rank compares a row with its target's logit."""
        return "target_rank" in self.shape.statistics and not self._costed

    def _tiled(self, strategy: Strategy, windows: tuple[int, ...]) -> list[Schedule]:
        """Forward tiles, those first whose products read the fewest operands for each logit."""
        shape = self.shape
        columns = [shape.vocabulary] if self._whole_rows else _up_to(windows, shape.vocabulary)
        tiles = [Schedule(strategy, rows, window) for rows in _up_to(TILE_ROWS, shape.tokens) for window in columns]
        return sorted(tiles, key=lambda tile: (1 / tile.rows + 1 / tile.window, tile.rows * tile.window))

    def _stored(self, window: int) -> Schedule:
        vocabulary = self.shape.vocabulary
        window = vocabulary if self._whole_rows else min(window, vocabulary)
        kept = math.ceil(vocabulary / window)
        return Schedule("stored", max(1, self.shape.tokens), window, cached_windows=kept, backward_window=window)

    def _chunked(self, sizes: tuple[int, ...]) -> Iterator[Schedule]:
        if not self._may_be_ahead or self.shape.main_grad:  # it would need a tensor of its own until it is scaled
            return
        tokens, vocabulary = max(1, self.shape.tokens), self.shape.vocabulary
        for size in sizes:
            rows = math.ceil(tokens / math.ceil(tokens / size))  # chunks of equal size
            yield Schedule("chunked", rows, vocabulary)

    def _windowed(self, sizes: tuple[int, ...]) -> Iterator[Schedule]:
        tokens, vocabulary = max(1, self.shape.tokens), self.shape.vocabulary
        for window in _up_to(sizes, vocabulary):
            if self._whole_rows:
                for rows in _up_to(TILE_ROWS, tokens):
                    yield Schedule("windowed", rows, vocabulary, backward_window=window)
            else:
                yield Schedule("windowed", tokens, window, backward_window=window)

    def _refine(self, schedule: Schedule, candidates: list[Schedule], fits: Fits) -> Schedule:
        """Spend what is left of the budget: keep the logits of windows, of the width that leaves the least work."""
        if schedule.strategy != "windowed" or self._whole_rows:
            return schedule
        windowed = (self._alias_windows(c) for c in candidates if c.strategy == "windowed")
        kept = [self._cache_windows(candidate, fits) for candidate in windowed if fits(candidate)]
        return min(kept, key=self._windowed_work, default=schedule)

    def _alias_windows(self, schedule: Schedule) -> Schedule:
        """Keep the first windows' logits in the weight gradient's buffer, as many as fit from its second window on."""
        shape = self.shape
        item, weight_item = shape.product_dtype.itemsize, shape.weight_dtype.itemsize
        if not shape.weight_gradient or shape.main_grad or shape.functional or item > weight_item:
            return schedule
        if not self._may_cache or shape.frozen_columns:
            return schedule
        window = schedule.window
        elements = max(0, shape.vocabulary - window) * shape.hidden * weight_item // item
        spacing, tile = alias_spacing(shape, window), window * shape.tokens
        aliased = 0 if elements < tile else 1 + (elements - tile) // max(1, spacing)
        return replace(schedule, aliased_windows=min(aliased, shape.vocabulary // window))

    def _cache_windows(self, schedule: Schedule, fits: Fits) -> Schedule:
        if not self._may_cache:
            return schedule
        most = math.ceil(self.shape.vocabulary / schedule.window) - schedule.aliased_windows

        def exceeds(count: int) -> bool:
            return not fits(replace(schedule, cached_windows=count))

        # More windows take more memory, so that those counts that fit come first.
        return replace(schedule, cached_windows=bisect.bisect_left(range(1, most + 1), True, key=exceeds))

    def _windowed_work(self, schedule: Schedule) -> float:
        """Work in columns of one product: four a column, one fewer where its logits are kept."""
        vocabulary = self.shape.vocabulary
        windows = math.ceil(vocabulary / schedule.window)
        kept = min((schedule.cached_windows + schedule.aliased_windows) * schedule.window, vocabulary)
        return 4 * vocabulary - kept + windows * WINDOW_OVERHEAD

    # --- forced -------------------------------------------------------------------------------------------------------

    def _demanded(self, forced: Forced) -> Schedule:
        shape, strategy = self.shape, forced.strategy
        tokens, vocabulary = max(1, shape.tokens), shape.vocabulary
        natural = "loss_only" if not shape.any_gradient else "sampled" if shape.threshold is not None else "exact"
        if natural != ("exact" if strategy in ("stored", "chunked", "windowed") else strategy):
            raise ValueError(f"strategy {strategy!r} cannot serve a call whose gradient is {natural!r}")
        if shape.traced is not None and (strategy != shape.traced or forced.kept):
            raise ValueError(
                f"strategy {strategy!r} cannot serve a graph for any number of tokens, which was traced for "
                f"{shape.traced!r} and saves no logits"
            )
        multiple = self.backend.window_multiple(shape)
        rows = min(forced.rows or tokens, tokens)
        narrow = min(math.ceil((forced.window or vocabulary) / multiple) * multiple, vocabulary)
        window = vocabulary if self._whole_rows else narrow
        if (strategy == "chunked" or forced.prepared) and not self._may_be_ahead:
            raise ValueError(
                f"strategy {strategy!r}, which forms a gradient ahead of the upstream one, cannot serve this call: it "
                f"needs a scalar reduction, and products that are not in fp16"
            )
        if strategy == "chunked" and shape.main_grad:
            raise ValueError(f"strategy {strategy!r} cannot serve this call: it needs a gradient besides main_grad")
        if not self._may_cache and (strategy == "stored" or forced.kept):
            raise ValueError(
                f"strategy {strategy!r} cannot serve this call: what it keeps in fp16 is too coarse for label "
                f"smoothing of capped logits"
            )
        if strategy == "stored":
            return self._prepared() if forced.prepared else self._stored(window)
        if strategy == "chunked":
            return Schedule("chunked", rows, vocabulary)
        if strategy == "windowed":
            if self._whole_rows:
                return Schedule("windowed", rows, window, backward_window=narrow)
            schedule = self._alias_windows(Schedule("windowed", tokens, window, backward_window=window))
            aliased = (
                schedule.aliased_windows if forced.aliased is None else min(forced.aliased, schedule.aliased_windows)
            )
            return replace(schedule, cached_windows=forced.kept or 0, aliased_windows=aliased)
        if strategy == "sampled":
            rows = tokens if shape.sharded and self._costed else rows
            window = min(block_count(window) * BLOCK, vocabulary)
        return Schedule(strategy, rows, window)


def _up_to(sizes: tuple[int, ...], limit: int) -> list[int]:
    """Distinct sizes, none above the limit, in order."""
    return list(dict.fromkeys(min(size, max(1, limit)) for size in sizes))


_forced: list[Forced | None] = [None]


def forced() -> Forced | None:
    """What is demanded now."""
    return _forced[-1]


@contextlib.contextmanager
def force_strategy(
    strategy: Strategy,
    *,
    rows: int | None = None,
    window: int | None = None,
    kept: int | None = None,
    aliased: int | None = None,
    prepared: bool = False,
) -> Iterator[None]:
    """Within this context, use one strategy with the given tile sizes. For tests and benchmarks.

    Args:
        strategy: a key of ``STRATEGIES``.
        rows: rows of a forward tile or chunk; None for all.
        window: vocabulary columns of a tile; None for all. Rounded up to what the backend or the strategy needs.
        kept: how many windows the windowed strategy keeps besides those aliased with the weight's gradient.
        aliased: how many windows are aliased with it at most; None for as many as can be.
        prepared: whether the stored strategy prepares the gradient of the logits in the forward pass.

    Raises:
        ValueError: the strategy is unknown, or (from the calls within) cannot serve the call.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {strategy!r}")
    _forced.append(Forced(strategy, rows, window, kept, aliased, prepared))
    try:
        yield
    finally:
        _forced.pop()
