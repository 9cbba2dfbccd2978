"""Strategies, their sizes, and the memory they take: chosen here, from figures that the backends state.

A backend says what a schedule holds (``workspace``). Candidates are tried in order of preference, and the first that
fits the budget is taken; the budget is the caller's ``workspace=``, or by default an eighth of what the two-stage
pipeline holds (log-softmax, its gradient and that of the logits) above the gradients' size, but at least 64 MiB.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from dataclasses import dataclass, replace

import torch

from logitless import backends, validation
from logitless.arguments import check_flag, check_size
from logitless.backends.contract import Schedule, Shape, Strategy
from logitless.options import Sampled
from logitless.schedules import STRATEGIES, Forced, Search, forced

MEBIBYTE = 1 << 20
LEAST_DEFAULT_BUDGET = 64 * MEBIBYTE

# Tensors of the logits' size that autograd holds at once in the two-stage pipeline: log-softmax, its gradient and that
# of the logits; without a gradient, logits and log-softmax.
TWO_STAGE_TENSORS = 3
TWO_STAGE_TENSORS_FORWARD = 2


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
        device_type: the kind of device planned for.
        schedule: the sizes of the tiles.
    """

    strategy: Strategy
    reason: str
    workspace: int
    budget: int
    gradients: int
    two_stage: int
    backend: str
    device_type: str
    schedule: Schedule

    @property
    def peak(self) -> int:
        """Upper bound, in bytes, of workspace and gradients together."""
        return self.workspace + self.gradients

    def __str__(self) -> str:
        tile = f"tiles of {self.schedule.rows} tokens x {self.schedule.window} vocabulary entries"
        kept = self.schedule.cached_windows + self.schedule.aliased_windows
        if kept and self.strategy == "windowed":
            tile += f", logits of {kept} windows kept"
        return (
            f"{self.strategy} on {self.device_type} by backend {self.backend!r}: {self.reason}; {tile}.\n"
            f"  workspace {format_bytes(self.workspace)} of {format_bytes(self.budget)} allowed, gradients "
            f"{format_bytes(self.gradients)}; two-stage pipeline: {format_bytes(self.two_stage)} and gradients"
        )


def format_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1."""
    for unit, size in (("GiB", 1 << 30), ("MiB", MEBIBYTE), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _readable(count: int) -> str:
    """Bytes in a larger unit, rounded up so that as much is enough, where there is one."""
    for letter, size in (("G", 1 << 30), ("M", MEBIBYTE), ("K", 1 << 10)):
        if count >= size:
            tenths = -(-10 * count // size)
            return f" ({tenths // 10}.{tenths % 10} {letter}iB)"
    return ""


def plan(
    *,
    tokens: int,
    hidden: int,
    vocabulary: int,
    dtype: torch.dtype | str = "bfloat16",
    device: str | torch.device | None = None,
    gradient: str | Sampled = "exact",
    reduction: str = "mean",
    weight_dtype: torch.dtype | str | None = None,
    frozen_weight: bool = False,
    frozen_input: bool = False,
    workspace: int | str | None = None,
    backend: str = "auto",
    main_grad: bool = False,
) -> Plan:
    """Say which strategy a call would take and what memory it would need, without computing anything.

    Args:
        tokens: N, rows of the hidden states that are not ignored.
        hidden: D.
        vocabulary: V.
        dtype: of the hidden states, as a torch dtype or its name, ``"bf16"``, ``"fp16"``, ``"fp32"`` and ``"fp64"``
            among them.
        device: where they would be, on this machine or not; None for a CUDA device if PyTorch sees one, else the CPU.
        gradient: ``"exact"`` or ``Sampled(...)``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        weight_dtype: that of the weight, by default ``dtype``.
        frozen_weight: whether the weight needs no gradient.
        frozen_input: whether the hidden states need none.
        workspace: bytes allowed above inputs and gradients, as in ``linear_cross_entropy``.
        backend: as in ``linear_cross_entropy``.
        main_grad: whether the weight's gradient is added to a buffer of the caller's.

    Returns:
        The plan; ``print`` it.

    Raises:
        ValueError: an unknown name, a size that is not positive, or a workspace too small for any strategy; the message
            says the smallest that works.
        TypeError: an argument of the wrong type.
    """
    tokens = check_size("tokens", tokens, least=0)
    hidden = check_size("hidden", hidden, least=1)
    vocabulary = check_size("vocabulary", vocabulary, least=1)
    reduction = validation.check_reduction(reduction)
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
        device_type=default_device_type() if device is None else validation.check_device("device", device).type,
        hidden_gradient=not check_flag("frozen_input", frozen_input),
        weight_gradient=not check_flag("frozen_weight", frozen_weight),
        bias_gradient=False,
        statistics=frozenset(),
        biased=False,
        softcapped=False,
        threshold=None if sampled is None else sampled.threshold,
        scan="input" if sampled is None else sampled.scan,
        compacted=False,
        weight_layout="rows",
        main_grad=check_flag("main_grad", main_grad),
        functional=False,
    )
    budget = validation.check_workspace(workspace)
    return choose(shape, choose_backend(backend, shape), reduction != "none", budget, forced())


def default_device_type() -> str:
    """That of the device that is there."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def choose_backend(name: str, shape: Shape) -> str:
    """The backend to use: the named one if it can, else an error with its reason."""
    validation.check_backend(name)
    if name == "auto":
        reason = triton_refuses(shape) if shape.device_type == "cuda" else "it is for CUDA devices"
        if reason is not None and shape.estimated and shape.device_type == "cuda":
            raise ValueError(
                f"gradient=Sampled(scan='fp8') saves time only in the triton backend, which cannot serve this call: "
                f"{reason}; use scan='input', or backend='torch', which rounds like it and multiplies in fp32"
            )
        return "triton" if reason is None else "torch"
    reason = backends.load(name).unsupported(shape)
    if reason is not None:
        raise ValueError(f"backend={name!r} cannot serve this call: {reason}; use backend='auto'")
    return name


def triton_refuses(shape: Shape) -> str | None:
    """The reason why the triton backend cannot serve a problem of a CUDA device, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return backends.load("triton").unsupported(shape)


def default_budget(shape: Shape) -> int:
    """Bytes allowed where the caller does not say.

    An eighth of what the two-stage pipeline holds above the gradients' own size, at least 64 MiB.
    """
    return max(LEAST_DEFAULT_BUDGET, (two_stage_bytes(shape) - _gradient_bytes(shape)) // 8)


def two_stage_bytes(shape: Shape) -> int:
    """Bytes of the [tokens, vocabulary] tensors that the two-stage pipeline holds at once."""
    tensors = TWO_STAGE_TENSORS if shape.any_gradient else TWO_STAGE_TENSORS_FORWARD
    return tensors * shape.tokens * shape.vocabulary * shape.compute_dtype.itemsize


@functools.lru_cache(maxsize=256)
def choose(shape: Shape, backend: str, scalar: bool, workspace: int | None, forced: Forced | None) -> Plan:
    """The plan for a problem.

    Args:
        shape: of the problem.
        backend: a name that ``choose_backend`` returned.
        scalar: whether the output is one number, so that its gradient may be computed before the upstream one is known.
        workspace: bytes, or None for the default.
        forced: what ``force_strategy`` demands.

    Raises:
        ValueError: no schedule fits; the message says the smallest workspace that works.
    """
    search = Search(shape, scalar, backends.load(backend), forced)
    budget = default_budget(shape) if workspace is None else workspace
    schedule = search.best(budget)
    if schedule is None:
        schedule = search.least()
        if workspace is not None:  # the default budget is a wish, not a bound
            raise ValueError(
                f"workspace={workspace} bytes{_readable(workspace)} is too small: N={shape.tokens}, D={shape.hidden}, "
                f"V={shape.vocabulary} needs at least {search.needed(schedule)} bytes"
                f"{_readable(search.needed(schedule))} by strategy {schedule.strategy!r}; raise workspace, or leave "
                f"it None"
            )
    return Plan(
        strategy=schedule.strategy,
        reason=STRATEGIES[schedule.strategy],
        workspace=search.needed(schedule),
        budget=budget,
        gradients=_gradient_bytes(shape),
        two_stage=two_stage_bytes(shape),
        backend=backend,
        device_type=shape.device_type,
        schedule=schedule,
    )


def choose_shard(
    shape: Shape, widest: int, backend: str, scalar: bool, workspace: int | None, forced: Forced | None
) -> Plan:
    """The plan for a shard of the vocabulary.

    Strategies that merge statistics chunk by chunk are planned for the widest shard, so that all ranks have the same
    chunks. The others merge once, and each rank takes what is best for its own.

    Args:
        shape: of this rank's problem.
        widest: rows of the largest shard's weight.
        backend: as in ``choose``, like the others.
        scalar: as in ``choose``.
        workspace: as in ``choose``.
        forced: as in ``choose``.

    Raises:
        ValueError: as ``choose``.
    """
    common = choose(replace(shape, vocabulary=widest), backend, scalar, workspace, forced)
    if common.strategy not in ("chunked", "sampled"):
        return common if shape.vocabulary in (0, widest) else choose(shape, backend, False, workspace, forced)
    schedule, own = common.schedule, max(1, shape.vocabulary)
    narrowed = replace(schedule, window=min(schedule.window, own), backward_window=min(schedule.backward_window, own))
    return replace(common, schedule=narrowed)


def _gradient_bytes(shape: Shape) -> int:
    return (
        shape.hidden_gradient * shape.tokens * shape.hidden * shape.hidden_dtype.itemsize
        + (shape.weight_gradient and not shape.main_grad)
        * math.prod(shape.weight_gradient_size)
        * shape.weight_dtype.itemsize
        + shape.bias_gradient * shape.vocabulary * shape.weight_dtype.itemsize
    )
