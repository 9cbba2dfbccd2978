"""Strategies, their sizes, and the memory they take: chosen here, from figures that the backends state.

A backend says what a schedule holds (``workspace``). Candidates are tried in order of preference, and the first that
fits the budget is taken; the budget is the caller's ``workspace=``, or by default an eighth of what the two-stage
pipeline holds (log-softmax, its gradient and that of the logits) above the gradients' size, but at least 64 MiB.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from logitless import backends, validation
from logitless.backends.contract import Schedule, Shape, Strategy, lodging_spacing
from logitless.options import BLOCK, Sampled
from logitless.sampling import block_count

MEBIBYTE = 1 << 20
LEAST_DEFAULT_BUDGET = 64 * MEBIBYTE

# Tensors of the logits' size that autograd holds at once in the two-stage pipeline: log-softmax, its gradient and that
# of the logits; without a gradient, logits and log-softmax.
TWO_STAGE_TENSORS = 3
TWO_STAGE_TENSORS_FORWARD = 2

# Tile sizes in order of preference. Products of fewer rows or columns than the first few lose speed: at D=768 on two
# cores, chunks of 128 rows take 1.6 times as long as 512 in fp32, windows of 512 columns 1.1 times as long as 2048.
CHUNK_ROWS = (1024, 768, 512, 384, 256, 192, 128)
SMALL_CHUNK_ROWS = (96, 64, 32, 16, 8, 4, 2, 1)
WINDOWS = (8192, 4096, 2048, 1024, 512, 256)
SMALL_WINDOWS = (128, 64, 32)
TILE_ROWS = (2048, 1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
# What the thirty or so small operations on a window cost, in columns of one product.
WINDOW_OVERHEAD = 128

STRATEGIES: dict[Strategy, str] = {
    "loss_only": "no gradient is wanted",
    "stored": "the logits fit the workspace",
    "chunked": "scalar reduction: the gradient is computed with the loss, row chunk by row chunk",
    "windowed": "the backward pass recomputes vocabulary windows",
    "sampled": "gradient=Sampled(): the backward pass computes the kept blocks alone",
}


@dataclass(frozen=True)
class Plan:
    """How a loss will be computed, and what memory that takes.

    Attributes:
        strategy: ``"loss_only"``, ``"stored"``, ``"chunked"``, ``"windowed"`` or ``"sampled"``.
        reason: why that strategy.
        workspace: upper bound, in bytes, of what is held above inputs and gradients.
        budget: what was allowed, in bytes.
        gradients: bytes of the gradients themselves.
        two_stage: bytes that logits, log-softmax and gradient of the logits take in the two-stage pipeline.
        backend: the backend planned for.
        schedule: the sizes of the tiles.
    """

    strategy: Strategy
    reason: str
    workspace: int
    budget: int
    gradients: int
    two_stage: int
    backend: str
    schedule: Schedule

    @property
    def peak(self) -> int:
        """Upper bound, in bytes, of workspace and gradients together."""
        return self.workspace + self.gradients

    def __str__(self) -> str:
        tile = f"tiles of {self.schedule.rows} tokens x {self.schedule.window} vocabulary entries"
        kept = self.schedule.kept_windows + self.schedule.lodged_windows
        if kept and self.strategy == "windowed":
            tile += f", logits of {kept} windows kept"
        return (
            f"{self.strategy} on backend {self.backend!r}: {self.reason}; {tile}.\n"
            f"  workspace {format_bytes(self.workspace)} of {format_bytes(self.budget)} allowed, gradients "
            f"{format_bytes(self.gradients)}; two-stage pipeline: {format_bytes(self.two_stage)} and gradients"
        )


def format_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit, size in (("GiB", 1 << 30), ("MiB", MEBIBYTE), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def plan(
    *,
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype | str = "bfloat16",
    device: str | torch.device = "cpu",
    gradient: str | Sampled = "exact",
    reduction: str = "mean",
    weight_dtype: torch.dtype | str | None = None,
    frozen_weight: bool = False,
    frozen_input: bool = False,
    workspace: int | str | None = None,
    backend: str = "auto",
) -> Plan:
    """Say which strategy a call would take and what memory it would need, without computing anything.

    Args:
        tokens: N, rows of the hidden states that are not ignored.
        hidden: D.
        vocabulary: V.
        dtype: of the hidden states, as a torch dtype or its name.
        device: where they would be.
        gradient: ``"exact"`` or ``Sampled(...)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight_dtype: that of the weight, by default ``dtype``.
        frozen_weight: whether the weight needs no gradient.
        frozen_input: whether the hidden states need none.
        workspace: bytes allowed above inputs and gradients, as in ``linear_cross_entropy``.
        backend: as in ``linear_cross_entropy``.

    Returns:
        The plan; ``print`` it.

    Raises:
        ValueError: an unknown name, a size that is not positive, or a workspace too small for any strategy; the message
            says the smallest that works.
        TypeError: an argument of the wrong type.
    """
    for name, value in (("tokens", tokens), ("hidden", hidden), ("vocabulary", vocabulary)):
        validation.check_size(name, value, least=0 if name == "tokens" else 1)
    validation.check_reduction(reduction)
    sampled = validation.check_gradient(gradient)
    hidden_dtype = validation.check_dtype("dtype", dtype)
    head_dtype = hidden_dtype if weight_dtype is None else validation.check_dtype("weight_dtype", weight_dtype)
    shape = Shape(
        tokens=tokens,
        hidden=hidden,
        vocabulary=vocabulary,
        hidden_dtype=hidden_dtype,
        weight_dtype=head_dtype,
        compute_dtype=torch.promote_types(hidden_dtype, head_dtype),
        device_type=torch.device(device).type,
        hidden_gradient=not frozen_input,
        weight_gradient=not frozen_weight,
        bias_gradient=False,
        statistics=frozenset(),
        softcapped=False,
        threshold=None if sampled is None else sampled.threshold,
        compacted=False,
        weight_strided=False,
    )
    return choose(shape, choose_backend(backend, shape), reduction != "none", validation.check_workspace(workspace))


def choose_backend(name: str, shape: Shape) -> str:
    """The backend to use: the named one if it can, else an error with its reason."""
    validation.check_backend(name)
    if name == "auto":
        return "torch"
    reason = backends.load(name).unsupported(shape)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot serve this call: {reason}; use backend='auto'")
    return name


def default_budget(shape: Shape) -> int:
    """Bytes allowed where the caller does not say.

    An eighth of what the two-stage pipeline holds above the gradients' own size, at least 64 MiB.
    """
    return max(LEAST_DEFAULT_BUDGET, (two_stage_bytes(shape) - _gradient_bytes(shape)) // 8)


def two_stage_bytes(shape: Shape) -> int:
    """Bytes of the [tokens, vocabulary] tensors that the two-stage pipeline holds at once."""
    tensors = TWO_STAGE_TENSORS if shape.any_gradient else TWO_STAGE_TENSORS_FORWARD
    return tensors * shape.tokens * shape.vocabulary * shape.compute_dtype.itemsize


def choose(shape: Shape, backend: str, scalar: bool, workspace: int | None) -> Plan:
    """The plan for a problem: the first candidate that fits.

    Args:
        shape: of the problem.
        backend: a name that ``choose_backend`` returned.
        scalar: whether the output is one number, so that its gradient may be computed before the upstream one is known.
        workspace: bytes, or None for the default.

    Raises:
        ValueError: no candidate fits; the message says the smallest workspace that works.
    """
    return _choose(shape, backend, scalar, workspace, _forced.get())


@functools.lru_cache(maxsize=256)
def _choose(shape: Shape, backend: str, scalar: bool, workspace: int | None, forced: _Forced | None) -> Plan:
    budget = default_budget(shape) if workspace is None else workspace
    needed = functools.partial(backends.load(backend).workspace, shape)
    candidates = [*_candidates(shape, scalar)] if forced is None else [_forced_schedule(forced, shape, scalar)]
    least = min(candidates, key=needed)
    schedule = next((candidate for candidate in candidates if needed(candidate) <= budget), None)
    if schedule is None and workspace is not None:
        raise ValueError(
            f"workspace={workspace} bytes is too small: N={shape.tokens}, D={shape.hidden}, V={shape.vocabulary} "
            f"needs at least {needed(least)} bytes (strategy {least.strategy!r}); raise workspace, or leave it None"
        )
    if schedule is None:  # the default budget is a wish, not a bound
        schedule = least
    if forced is None:
        schedule = _refine(schedule, candidates, shape, lambda candidate: needed(candidate) <= budget)
    return Plan(
        strategy=schedule.strategy,
        reason=STRATEGIES[schedule.strategy],
        workspace=needed(schedule),
        budget=budget,
        gradients=_gradient_bytes(shape),
        two_stage=two_stage_bytes(shape),
        backend=backend,
        schedule=schedule,
    )


def _gradient_bytes(shape: Shape) -> int:
    return (
        shape.hidden_gradient * shape.tokens * shape.hidden * shape.hidden_dtype.itemsize
        + shape.weight_gradient * shape.vocabulary * shape.hidden * shape.weight_dtype.itemsize
        + shape.bias_gradient * shape.vocabulary * shape.weight_dtype.itemsize
    )


def _candidates(shape: Shape, scalar: bool) -> Iterator[Schedule]:
    """Schedules in order of preference."""
    if not shape.any_gradient:
        yield from _tiled("loss_only", shape, WINDOWS + SMALL_WINDOWS)
        return
    if shape.threshold is not None:
        yield from _tiled("sampled", shape, tuple(w for w in WINDOWS + SMALL_WINDOWS if w % BLOCK == 0))
        return
    yield _stored(shape, shape.vocabulary)
    yield _stored(shape, WINDOWS[0])
    yield from _chunked(shape, scalar, CHUNK_ROWS)
    yield from _windowed(shape, WINDOWS)
    yield from _chunked(shape, scalar, SMALL_CHUNK_ROWS)
    yield from _windowed(shape, SMALL_WINDOWS)


def _needs_whole_rows(shape: Shape) -> bool:
    """Whether a forward tile must span the vocabulary: a rank compares a row with its target's logit."""
    return "target_rank" in shape.statistics


def _up_to(sizes: tuple[int, ...], limit: int) -> list[int]:
    """Distinct sizes, none above the limit, in order."""
    return list(dict.fromkeys(min(size, max(1, limit)) for size in sizes))


def _tiled(strategy: Strategy, shape: Shape, windows: tuple[int, ...]) -> list[Schedule]:
    """Forward tiles, those first whose products read the fewest operands for each logit."""
    columns = [shape.vocabulary] if _needs_whole_rows(shape) else _up_to(windows, shape.vocabulary)
    tiles = [Schedule(strategy, rows, window) for rows in _up_to(TILE_ROWS, shape.tokens) for window in columns]
    return sorted(tiles, key=lambda tile: (1 / tile.rows + 1 / tile.window, tile.rows * tile.window))


def _stored(shape: Shape, window: int) -> Schedule:
    window = shape.vocabulary if _needs_whole_rows(shape) else min(window, shape.vocabulary)
    kept = math.ceil(shape.vocabulary / window)
    return Schedule("stored", max(1, shape.tokens), window, kept_windows=kept, backward_window=window)


def _chunked(shape: Shape, scalar: bool, sizes: tuple[int, ...]) -> Iterator[Schedule]:
    if not scalar:
        return
    tokens = max(1, shape.tokens)
    for size in sizes:
        rows = math.ceil(tokens / math.ceil(tokens / size))  # chunks of equal size
        yield Schedule("chunked", rows, shape.vocabulary, backward_window=min(SMALL_WINDOWS[-1], shape.vocabulary))


def _windowed(shape: Shape, sizes: tuple[int, ...]) -> Iterator[Schedule]:
    for window in _up_to(sizes, shape.vocabulary):
        if _needs_whole_rows(shape):
            for rows in _up_to(TILE_ROWS, shape.tokens):
                yield Schedule("windowed", rows, shape.vocabulary, backward_window=window)
        else:
            yield Schedule("windowed", max(1, shape.tokens), window, backward_window=window)


def _refine(schedule: Schedule, candidates: list[Schedule], shape: Shape, fits: Callable[[Schedule], bool]) -> Schedule:
    """Spend what is left of the budget.

    Windowed: keep the logits of as many windows as fit, with the window that leaves the least work. Chunked: the widest
    window for a second backward pass through a retained graph, which recomputes.
    """
    if schedule.strategy == "chunked":
        wider = (window for window in _windowed(shape, WINDOWS + SMALL_WINDOWS) if fits(window))
        window = next(wider, schedule).backward_window
        return replace(schedule, backward_window=window)
    if schedule.strategy != "windowed" or _needs_whole_rows(shape):
        return schedule
    windowed = (_lodge_windows(c, shape) for c in candidates if c.strategy == "windowed")
    kept = [_keep_windows(candidate, shape, fits) for candidate in windowed if fits(candidate)]
    return min(kept, key=lambda c: _windowed_work(c, shape), default=schedule)


def _lodge_windows(schedule: Schedule, shape: Shape) -> Schedule:
    """Keep the first windows' logits in the weight gradient's buffer, as many as fit from its second window on."""
    item, weight_item = shape.product_dtype.itemsize, shape.weight_dtype.itemsize
    if not shape.weight_gradient or item > weight_item:
        return schedule
    window = schedule.window
    elements = max(0, shape.vocabulary - window) * shape.hidden * weight_item // item
    spacing, tile = lodging_spacing(shape, window), window * shape.tokens
    lodged = 0 if elements < tile else 1 + (elements - tile) // max(1, spacing)
    return replace(schedule, lodged_windows=min(lodged, shape.vocabulary // window))


def _keep_windows(schedule: Schedule, shape: Shape, fits: Callable[[Schedule], bool]) -> Schedule:
    windows = math.ceil(shape.vocabulary / schedule.window)
    options = (replace(schedule, kept_windows=count) for count in range(windows - schedule.lodged_windows, 0, -1))
    return next((option for option in options if fits(option)), schedule)


def _windowed_work(schedule: Schedule, shape: Shape) -> float:
    """Work of a windowed schedule in columns of one product: four a column, one fewer where its logits are kept."""
    windows = math.ceil(shape.vocabulary / schedule.window)
    kept = min((schedule.kept_windows + schedule.lodged_windows) * schedule.window, shape.vocabulary)
    return 4 * shape.vocabulary - kept + windows * WINDOW_OVERHEAD


@dataclass(frozen=True)
class _Forced:
    strategy: Strategy
    rows: int | None
    window: int | None


_forced: contextvars.ContextVar[_Forced | None] = contextvars.ContextVar("forced_strategy", default=None)


@contextlib.contextmanager
def force_strategy(strategy: Strategy, *, rows: int | None = None, window: int | None = None) -> Iterator[None]:
    """Within this context, use one strategy with the given tile sizes. For tests and benchmarks.

    Args:
        strategy: a key of ``STRATEGIES``.
        rows: rows of a forward tile or chunk; None for all.
        window: vocabulary columns of a tile; None for all. The sampled strategy rounds it up to whole blocks.

    Raises:
        ValueError: the strategy is unknown, or (from the calls within) cannot serve the call.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {strategy!r}")
    token = _forced.set(_Forced(strategy, rows, window))
    try:
        yield
    finally:
        _forced.reset(token)


def _forced_schedule(forced: _Forced, shape: Shape, scalar: bool) -> Schedule:
    strategy, tokens, vocabulary = forced.strategy, max(1, shape.tokens), shape.vocabulary
    natural = "loss_only" if not shape.any_gradient else "sampled" if shape.threshold is not None else "exact"
    if natural != ("exact" if strategy in ("stored", "chunked", "windowed") else strategy):
        raise ValueError(f"strategy {strategy!r} cannot serve a call whose gradient is {natural!r}")
    rows = min(forced.rows or tokens, tokens)
    window = vocabulary if _needs_whole_rows(shape) else min(forced.window or vocabulary, vocabulary)
    if strategy == "stored":
        return _stored(shape, window)
    if strategy == "chunked":
        if not scalar:
            raise ValueError("strategy 'chunked' needs a scalar reduction, got per-token outputs")
        return Schedule("chunked", rows, vocabulary, backward_window=window)
    if strategy == "windowed":
        narrow = min(forced.window or vocabulary, vocabulary)
        if _needs_whole_rows(shape):
            return Schedule("windowed", rows, window, backward_window=narrow)
        return _lodge_windows(Schedule("windowed", tokens, window, backward_window=narrow), shape)
    if strategy == "sampled":
        window = min(block_count(window) * BLOCK, vocabulary)
    return Schedule(strategy, rows, window)
