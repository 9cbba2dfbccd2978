"""The operator: one differentiable call from hidden states, weight and bias to an objective's outputs.

Forward packs the rows that count, asks the backend for statistics and the objective for outputs. Backward asks the
objective for coefficients and the backend for gradients. Under the chunked strategy the gradients of a scalar output
are formed in the forward pass and only scaled here; they are used up by the first backward pass, and a second one
through a retained graph computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from logitless import backends
from logitless.backends.contract import Gradients, Problem, Shape, Statistics
from logitless.objective import LossObjective, StatisticsObjective
from logitless.options import HeadOptions
from logitless.planning import Plan

SECOND_ORDER = (
    "logitless: second derivatives are not supported: the backward pass of this operator cannot be differentiated "
    "again (create_graph=True was used and its result differentiated); compute this loss with "
    "torch.nn.functional.cross_entropy on logits where second derivatives are needed"
)


@dataclass(frozen=True)
class Call:
    """One call of the operator, but for its differentiable tensors.

    Attributes:
        shape: of the problem.
        plan: how to compute it.
        target: [N] int64, of the rows that count.
        rows: [N] int64 their positions among the caller's rows, None where all of them count.
        total_rows: how many rows the caller gave.
        head: scale and cap of the logits.
        objective: from statistics to outputs.
        counted: as in ``Problem``.
        smoothing: as in ``Problem``.
        main_grad: as in ``Problem``.
        offsets: as in ``Problem``.
    """

    shape: Shape
    plan: Plan
    target: torch.Tensor
    rows: torch.Tensor | None
    total_rows: int
    head: HeadOptions
    objective: LossObjective | StatisticsObjective
    counted: torch.Tensor | None
    smoothing: torch.Tensor | float | None
    main_grad: torch.Tensor | None
    offsets: torch.Tensor | None

    def problem(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> Problem:
        """The problem of the rows that count, packed."""
        packed = hidden if self.rows is None else hidden.index_select(0, self.rows)
        if self.counted is not None and not backends.load(self.plan.backend).SKIPS_ROWS:
            packed = packed.masked_fill(~self.counted[:, None], 0)  # zero times what ignored rows hold could be NaN
        return Problem(
            shape=self.shape,
            hidden=packed.contiguous(),
            weight=weight,
            bias=bias,
            target=self.target,
            head=self.head,
            counted=self.counted,
            smoothing=self.smoothing,
            main_grad=self.main_grad,
            offsets=self.offsets,
        )

    def spread(self, packed: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Rows that count, put back among the caller's; ``fill`` elsewhere. [N, ...] -> [total_rows, ...]."""
        if self.rows is None:
            return packed
        full = packed.new_full((self.total_rows, *packed.shape[1:]), fill)
        return full.index_copy_(0, self.rows, packed)


def apply(
    hidden: torch.Tensor,  # [total_rows, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    call: Call,
) -> tuple[torch.Tensor, ...]:
    """The objective's outputs: scalars, or [total_rows] with 0 (integers: -1) at rows that do not count."""
    return _LinearHead.apply(hidden, weight, bias, call)  # type: ignore[no-any-return]


def evaluate(
    call: Call, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[tuple[torch.Tensor, ...], Statistics, Gradients | None]:
    """Outputs, statistics, and under the chunked strategy the gradients of a scalar output for an upstream one of 1."""
    schedule, backend, objective = call.plan.schedule, backends.load(call.plan.backend), call.objective
    prepared = None
    with torch.autocast(hidden.device.type, enabled=False):
        problem = call.problem(hidden, weight, bias)
        ahead = None
        if schedule.strategy == "chunked" or schedule.prepared:
            assert isinstance(objective, LossObjective)
            ahead = objective.ahead()
        if schedule.strategy == "chunked":
            assert ahead is not None
            statistics, prepared = backend.forward_with_gradients(problem, schedule, ahead)
        else:
            statistics = backend.forward(problem, schedule, ahead)
        outputs = objective.outputs(statistics)
    if not objective.scalar:
        outputs = tuple(call.spread(o, 0 if o.is_floating_point() else -1) for o in outputs)
    return outputs, statistics, prepared


def differentiate(
    call: Call,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    statistics: Statistics,
    upstream: tuple[torch.Tensor | None, ...],
) -> Gradients:
    """Gradients of the rows that count, of weight and of bias, in accumulation dtypes; residuals may be used up."""
    with torch.autocast(hidden.device.type, enabled=False):
        problem, backend = call.problem(hidden, weight, bias), backends.load(call.plan.backend)
        if call.plan.schedule.prepared:
            (grad,) = upstream
            assert grad is not None
            return backend.finish(problem, call.plan.schedule, statistics, grad)
        coefficients = call.objective.coefficients(statistics, _packed(call, upstream))
        return backend.backward(problem, call.plan.schedule, statistics, coefficients)


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: Call
    ) -> tuple[torch.Tensor, ...]:
        outputs, ctx.statistics, ctx.prepared = evaluate(call, hidden, weight, bias)
        ctx.call = call
        ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        with torch.no_grad():
            gradients = _gradients(ctx, hidden, weight, bias, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            connected = [t for t in (hidden, weight, bias, *upstream) if t is not None and t.requires_grad]
            gradients = tuple(None if g is None else _NotTwice.apply(g, *connected) for g in gradients)
        return (*gradients, None)


def _gradients(
    ctx: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    upstream: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of hidden states, weight and bias in their own dtypes."""
    call: Call = ctx.call
    if all(grad is None for grad in upstream):
        return None, None, None
    scale: torch.Tensor | None = None
    if ctx.prepared is not None:
        (scale,) = upstream
        gradients: Gradients = ctx.prepared
        ctx.prepared = None
    else:
        gradients = differentiate(call, hidden, weight, bias, ctx.statistics, upstream)
        if call.plan.strategy != "sampled" and not call.plan.schedule.prepared:  # their residuals are read, not used up
            ctx.statistics = ctx.statistics.leaving(())
    packed = _handed_on(gradients, "hidden", scale, hidden.dtype)
    return (
        None if packed is None else call.spread(packed),
        _handed_on(gradients, "weight", scale, weight.dtype),
        None if bias is None else _handed_on(gradients, "bias", scale, bias.dtype),
    )


def _packed(call: Call, upstream: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    """Upstream gradients of the rows that count."""
    if call.rows is None or call.objective.scalar:
        return upstream
    return tuple(None if grad is None else grad[call.rows] for grad in upstream)


def _handed_on(gradients: Gradients, name: str, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """One gradient, scaled while it is still in accumulation dtype, then rounded; its accumulator is let go."""
    gradient: torch.Tensor | None = getattr(gradients, name)
    setattr(gradients, name, None)
    return None if gradient is None else scaled(gradient, scale, dtype)


def scaled(gradient: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A gradient times a 0-d scale, rounded once; on an accelerator in one pass, without asking for the scale."""
    if scale is None or (scale.device.type == "cpu" and scale.item() == 1):
        return gradient.to(dtype)
    if gradient.dtype == dtype:
        return gradient.mul_(scale)
    if scale.device.type == "cpu":
        return gradient.mul_(scale).to(dtype)
    return torch.mul(gradient, scale, out=torch.empty_like(gradient, dtype=dtype))


class _NotTwice(torch.autograd.Function):
    """The identity on a gradient, connected to what it came from, so that differentiating it says why it cannot be."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *connected: torch.Tensor) -> torch.Tensor:
        del ctx, connected
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError(SECOND_ORDER)
