"""The contract between the operator and the code that computes it.

A backend is a module with these functions:

``unsupported(shape) -> str | None``
    why it cannot serve a problem, or None; shared by dispatch, ``logitless doctor`` and test skips.
``workspace(shape, schedule) -> int``
    an upper bound, in bytes, of what it holds above inputs and gradients under a schedule.
``window_multiple(shape) -> int``
    what a schedule's windows must be a multiple of, unless they span the vocabulary.
``cost(shape, schedule) -> float | None``
    seconds, roughly, to rank schedules; None where the planner's order of preference decides.
``saved_forms(shape, schedule) -> sizes and dtypes``
    of the tensors that ``forward`` leaves for ``backward``, as far as these are known before.
``recomputed(problem, schedule) -> tensors``
    what ``forward`` leaves under a windowed schedule that keeps no logits, made without these.
``forward(problem, schedule, ahead) -> Statistics``
    one pass over the logits.
``backward(problem, schedule, statistics, coefficients) -> Gradients``
    gradients of hidden states, weight and bias from per-row coefficients.
``finish(problem, schedule, statistics, upstream) -> Gradients``
    the same where the schedule had the forward pass prepare the gradient of the logits.
``forward_with_gradients(problem, schedule, ahead) -> (Statistics, Gradients)``
    both at once, for schedules of the ``chunked`` strategy.

A backend knows nothing of losses, reductions, autograd or process groups.

N tokens, D hidden, V vocabulary; the rows of a ``Problem`` are those that count, so N is their number here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from logitless.options import HeadOptions, Scan

TensorForm = tuple[tuple[int, ...], torch.dtype]
"""Size and dtype of a tensor."""

# Index among the saved tensors of the buffer that becomes the weight's gradient, where windows are aliased with it.
WEIGHT_GRADIENT = 0

WeightLayout = Literal["rows", "columns", "unaligned", "strided"]
Strategy = Literal["loss_only", "stored", "chunked", "windowed", "sampled"]
Statistic = Literal["mean_gap", "smooth_logit", "prediction", "target_rank"]


@dataclass(frozen=True)
class Shape:
    """What planning needs to know of a problem, without its tensors.

    Attributes:
        tokens: N, the rows that count.
        hidden: D.
        vocabulary: V.
        hidden_dtype: dtype of the hidden states and of their gradient.
        weight_dtype: dtype of the weight and of its gradient.
        compute_dtype: dtype in which operands enter the products.
        device_type: ``"cpu"``, ``"cuda"``, ...
        hidden_gradient: whether the gradient of the hidden states is wanted.
        weight_gradient: whether that of the weight is.
        bias_gradient: whether that of the bias is.
        statistics: what is wanted of each row besides logsumexp and target logit.
        biased: whether the head has a bias.
        softcapped: whether the logits are capped.
        threshold: that of the sampled gradient, None for the exact one.
        scan: precision of the sampled gradient's scan; ``"input"`` for the exact one.
        compacted: whether rows of the hidden states are copied (some left out, or unusual strides) before a product.
        weight_layout: of the weight in memory: ``"rows"`` one after the other, aligned to 16 bytes; ``"columns"`` one
            after the other; ``"unaligned"`` rows; or ``"strided"``, neither.
        main_grad: whether the weight's gradient is added to an fp32 buffer of the caller's.
        functional: whether what a forward pass leaves must stay as it is, as under torch.compile.
        sharded: whether the vocabulary is that of one rank of several, whose statistics are to be merged.
        frozen_columns: how many of the weight's first columns are without a gradient where the others have one.
        traced: the strategy of a graph that serves any number of tokens, under which a forward pass saves nothing whose
            size is for the plan to decide; None where the plan decides everything.
    """

    tokens: int
    hidden: int
    vocabulary: int
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    compute_dtype: torch.dtype
    device_type: str
    hidden_gradient: bool
    weight_gradient: bool
    bias_gradient: bool
    statistics: frozenset[Statistic]
    biased: bool
    softcapped: bool
    threshold: float | None
    scan: Scan
    compacted: bool
    weight_layout: WeightLayout
    main_grad: bool
    functional: bool
    sharded: bool = False
    frozen_columns: int = 0
    traced: Strategy | None = None

    @classmethod
    def of(
        cls,
        hidden: torch.Tensor,  # [..., D]
        weight: torch.Tensor,  # [V, D]
        tokens: int,
        **others: Any,
    ) -> Shape:
        """The shape of a problem on these tensors, of which ``tokens`` rows count."""
        return cls(
            tokens=tokens,
            hidden=int(hidden.shape[-1]),
            vocabulary=int(weight.shape[0]),
            hidden_dtype=hidden.dtype,
            weight_dtype=weight.dtype,
            device_type=hidden.device.type,
            weight_layout=weight_layout(weight),
            **others,
        )

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Dtype of statistics, coefficients and accumulators: fp64 for fp64 problems, else fp32."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype of the products' operands and results.

        It is the compute dtype but for fp16 on the CPU, whose library products take a hundred times as long as in fp32,
        and where a scan in fewer bits is corrected: products rounded to bf16 would be off by more than the scan.
        """
        if self.estimated:
            return self.statistics_dtype
        if self.compute_dtype == torch.float16 and self.device_type == "cpu":
            return torch.float32
        return self.compute_dtype

    @property
    def estimated(self) -> bool:
        """Whether statistics come from a scan in fewer bits, corrected by the blocks that are kept."""
        return self.scan != "input" and self.any_gradient

    @property
    def trained_columns(self) -> slice:
        """Columns of the weight that its gradient is of; of the hidden states, those that it is a product of."""
        return slice(self.frozen_columns, self.hidden)

    @property
    def weight_gradient_size(self) -> tuple[int, int]:
        """Of the weight's gradient: [V, D], or [V, fewer]."""
        return self.vocabulary, self.hidden - self.frozen_columns

    @property
    def any_gradient(self) -> bool:
        """Whether any gradient is wanted."""
        return self.hidden_gradient or self.weight_gradient or self.bias_gradient


@dataclass(frozen=True)
class Schedule:
    """How a backend goes about a problem: a strategy and the sizes of its tiles.

    Attributes:
        strategy: which of the five.
        rows: rows of the hidden states in one tile of the forward pass.
        window: vocabulary columns in one tile of the forward pass.
        cached_windows: how many of the last windows' logits the forward pass keeps for the backward pass.
        aliased_windows: how many of the first windows' logits it keeps in memory that the weight gradient will fill.
        backward_window: vocabulary columns in one tile of a backward pass that recomputes.
        prepared: whether the forward pass leaves the gradient of the logits for an upstream gradient of 1, which
            ``finish`` turns into gradients, instead of what ``backward`` needs.
    """

    strategy: Strategy
    rows: int
    window: int
    cached_windows: int = 0
    aliased_windows: int = 0
    backward_window: int = 0
    prepared: bool = False

    @property
    def uses_up_saved(self) -> bool:
        """Whether an eager backward pass overwrites what the forward pass left: logits, by their gradient."""
        return not self.prepared and (self.cached_windows > 0 or self.aliased_windows > 0)


def ceil_div(total: int, step: int) -> int:
    """How many steps cover the total."""
    return -(-total // step)


def weight_layout(weight: torch.Tensor) -> WeightLayout:
    """How a weight [V, D] lies in memory."""
    if weight.stride(1) == 1:
        aligned = (weight.storage_offset() * weight.element_size() | weight.stride(0) * weight.element_size()) % 16 == 0
        return "rows" if aligned else "unaligned"
    return "columns" if weight.stride(0) == 1 else "strided"


def alias_spacing(shape: Shape, window: int) -> int:
    """Elements, in the product dtype, from one window's logits to the next in the weight gradient's buffer."""
    slice_elements = window * shape.hidden * shape.weight_dtype.itemsize // shape.product_dtype.itemsize
    return max(window * shape.tokens, slice_elements)


@dataclass(frozen=True)
class Problem:
    """Tensors and options of one evaluation.

    Attributes:
        shape: the same problem without its tensors.
        hidden: [M, D] memory that holds the rows that count. Where ``hidden_index`` is None these are its rows.
        weight: [V, D] rows of the output projection.
        bias: [V], or None.
        target: [N] int64 vocabulary indices, all in [0, V) where the device could be asked.
        head: scale and cap of the logits.
        valid_mask: [N] bool rows that count; None for all. The others' coefficients are zero, and a backend may leave
            their statistics zero and skip their work.
        smoothing: [V] weight of each logit in ``smooth_logit``, one number for all, or None where not wanted.
        main_grad: [V, D] fp32 to which the weight's gradient is added; ``Gradients.weight`` is None then.
        uniforms: [N] float64 in [0, 1), where each row's systematic sample starts; None for the exact gradient.
        merge: where the weight is a shard of the whole vocabulary, begins to merge the statistics of some rows, and
            returns what waits for those of the whole. Strategies that need these before the backward pass call it, for
            all rows in order; others leave it to the operator. None where the weight is the whole.
        hidden_index: [N] int64 the rows of ``hidden``, which may overlap in memory; see ``hidden_rows``.
        rank_above: [N] logits above which ``target_rank`` counts entries; None for those of the targets.
    """

    shape: Shape
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    head: HeadOptions
    valid_mask: torch.Tensor | None
    smoothing: torch.Tensor | float | None
    main_grad: torch.Tensor | None
    uniforms: torch.Tensor | None
    merge: Callable[[Statistics, slice], Callable[[], Statistics]] | None = None
    hidden_index: torch.Tensor | None = None
    rank_above: torch.Tensor | None = None

    def hidden_rows(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """[R, D] some of the rows, contiguous; zeros where they do not count. Copied only where they have to be."""
        index = rows if self.hidden_index is None else self.hidden_index[rows]
        taken = self.hidden[index] if isinstance(index, slice) else self.hidden.index_select(0, index)
        if self.valid_mask is not None:
            taken = taken.masked_fill(~self.valid_mask[rows, None], 0)  # zero times what ignored rows hold could be NaN
        return taken.contiguous()


def rows_of(
    hidden: torch.Tensor,  # [..., D]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A matrix [M, D] in the memory of hidden states, and [N] which of its rows they are; None for all, in order.

    No strides make a copy: rows of a slice such as ``hidden[:, :-1]``, of a transpose or of an expanded tensor are at
    multiples of one pitch.
    """
    size = hidden.shape[-1]
    try:
        return hidden.view(-1, size), None
    except RuntimeError:  # the rows are not one stride apart
        pass
    leading = [(count, step) for count, step in zip(hidden.shape[:-1], hidden.stride()[:-1], strict=True) if count > 1]
    pitch = math.gcd(*(step for _, step in leading)) or 1
    index = torch.zeros((), dtype=torch.int64, device=hidden.device)
    for count, step in leading:
        index = index[..., None] + torch.arange(count, device=hidden.device) * (step // pitch)
    last = sum((count - 1) * (step // pitch) for count, step in leading)
    matrix = hidden.as_strided((last + 1, size), (pitch, hidden.stride(-1)))
    return matrix, index.reshape(-1)


@dataclass(frozen=True)
class Statistics:
    """Everything a loss can ask of a row. Each field is [N]; the floats in the problem's statistics dtype.

    The log-sum-exp is kept in two parts, because a loss is a difference of logits: where a token is predicted with
    confidence ``logsumexp - target_logit`` would be off by an ulp of the logits, however small the loss is, and
    ``(peak - target_logit) + log_sum`` is off by an ulp of one. What else is made of logits is relative to the peak.

    Attributes:
        peak: the row's largest logit; 0 where all are -inf.
        log_sum: log of the sum of exponentials of the row's logits less the peak: at least 0.
        target_logit: the target's logit.
        mean_gap: softmax expectation of what the logit lies below the peak, or None: the entropy less ``log_sum``.
        smooth_logit: sum of the logits less the peak, weighted by ``Problem.smoothing``, or None.
        prediction: int64 index of the largest logit, or None.
        target_rank: int64 number of other entries with a logit above the target's, or None.
        saved: tensors that the backward pass of the same backend may reuse, and use up: see ``saved_forms``.
    """

    peak: torch.Tensor
    log_sum: torch.Tensor
    target_logit: torch.Tensor
    mean_gap: torch.Tensor | None = None
    smooth_logit: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    target_rank: torch.Tensor | None = None
    saved: tuple[torch.Tensor, ...] = ()

    @property
    def logsumexp(self) -> torch.Tensor:
        """[N] log of the sum of exponentials of the row's logits."""
        return self.peak + self.log_sum

    def with_saved(self, saved: tuple[torch.Tensor, ...]) -> Statistics:
        """The same statistics, with something for the backward pass."""
        return replace(self, saved=saved)


@dataclass(frozen=True)
class Coefficients:
    """The one form of every gradient, each field [N].

    With z0 the row's peak it is ``dz_v = p_v (a + b (z_v - z0)) - c [v = target] - d s_v``.
    ``s`` is ``Problem.smoothing``; the chain factors of cap and scale are the backend's. None means zero.
    """

    a: torch.Tensor
    b: torch.Tensor | None
    c: torch.Tensor
    d: torch.Tensor | None

    def rows(self, rows: slice | torch.Tensor) -> Coefficients:
        """The coefficients of some rows."""
        return Coefficients(
            a=self.a[rows],
            b=None if self.b is None else self.b[rows],
            c=self.c[rows],
            d=None if self.d is None else self.d[rows],
        )


@dataclass(frozen=True)
class AffineCoefficients:
    """Coefficients of a scalar output for an upstream gradient of 1, before statistics are known; each field [N].

    ``a`` of ``Coefficients`` is ``a + slope * logsumexp``, ``b`` is zero, ``c`` and ``d`` are these.
    """

    a: torch.Tensor
    slope: torch.Tensor | None
    c: torch.Tensor
    d: torch.Tensor | None

    def rows(self, rows: slice) -> AffineCoefficients:
        """The coefficients of some rows."""
        return AffineCoefficients(
            a=self.a[rows],
            slope=None if self.slope is None else self.slope[rows],
            c=self.c[rows],
            d=None if self.d is None else self.d[rows],
        )

    def at(self, statistics: Statistics) -> Coefficients:
        """The coefficients, statistics known."""
        a = self.a if self.slope is None else self.a + self.slope * statistics.logsumexp
        return Coefficients(a=a, b=None, c=self.c, d=self.d)


@dataclass
class Gradients:
    """Gradients [N, D], [V, trained columns], [V]; None where not wanted.

    In accumulation dtype until the operator hands them on.
    """

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


class BackendModule(Protocol):
    """The functions of a backend, as a type.

    Attributes:
        READS_MATRIX: whether it needs all rows in one contiguous matrix, ``Problem.hidden``, and skips by itself those
            that do not count; others take rows by ``Problem.hidden_rows``.
    """

    READS_MATRIX: bool

    def unsupported(self, shape: Shape) -> str | None:
        """Why the backend cannot serve the problem, or None."""
        ...

    def workspace(self, shape: Shape, schedule: Schedule) -> int:
        """Upper bound, in bytes, of what the backend holds above inputs and gradients."""
        ...

    def window_multiple(self, shape: Shape) -> int:
        """What windows must be a multiple of."""
        ...

    def cost(self, shape: Shape, schedule: Schedule) -> float | None:
        """Seconds, roughly; None where the planner's order of preference decides."""
        ...

    def saved_forms(self, shape: Shape, schedule: Schedule) -> list[TensorForm]:
        """Sizes and dtypes of ``Statistics.saved``."""
        ...

    def recomputed(self, problem: Problem, schedule: Schedule) -> tuple[torch.Tensor, ...]:
        """``Statistics.saved`` of a windowed schedule that keeps no logits, made without them."""
        ...

    def forward(self, problem: Problem, schedule: Schedule, ahead: AffineCoefficients | None) -> Statistics:
        """Statistics of every row; ``ahead`` is given where the schedule prepares the gradient."""
        ...

    def finish(self, problem: Problem, schedule: Schedule, statistics: Statistics, upstream: torch.Tensor) -> Gradients:
        """Gradients from a prepared one of the logits and the upstream gradient of the scalar output."""
        ...

    def backward(
        self, problem: Problem, schedule: Schedule, statistics: Statistics, coefficients: Coefficients
    ) -> Gradients:
        """Gradients from statistics and coefficients."""
        ...

    def forward_with_gradients(
        self, problem: Problem, schedule: Schedule, ahead: AffineCoefficients
    ) -> tuple[Statistics, Gradients]:
        """Statistics and gradients in one pass, for an upstream gradient of 1."""
        ...
