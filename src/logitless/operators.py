"""The operator: one differentiable call from hidden states, weight and bias to an objective's outputs.

Forward packs the rows that count, asks the backend for statistics and the objective for outputs. Backward asks the
objective for coefficients and the backend for gradients. Under the chunked strategy the gradients of a scalar output
are formed in the forward pass and only scaled here; they are used up by the first backward pass, and a second one
through a retained graph computes them again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from logitless import backends
from logitless.backends.contract import Gradients, Problem, Schedule, Shape, Statistics, rows_of
from logitless.dtensors import wait_tensor
from logitless.objective import LossObjective, StatisticsObjective
from logitless.options import HeadOptions
from logitless.planning import Plan
from logitless.precision import full_precision_accumulation
from logitless.sharding import Merging, Shard, of_target
from logitless.transforms import check_upstream

SECOND_ORDER = (
    "logitless: second derivatives are not supported: the backward pass of this operator cannot be differentiated "
    "again (create_graph=True was used and its result differentiated); compute this loss with "
    "torch.nn.functional.cross_entropy on logits where second derivatives are needed"
)


@dataclass(frozen=True)
class Call:
    """One call of the operator, but for the caller's tensors, which the backward pass reads as autograd saved them.

    What tensors there are here are the call's own, but for ``main_grad``.

    Attributes:
        shape: of the problem.
        plan: how to compute it.
        rows: [N] int64 their positions among the caller's rows, None where all of them count.
        total_rows: how many rows the caller gave.
        head: scale and cap of the logits.
        objective: from statistics to outputs.
        valid_mask: as in ``Problem``.
        smoothing: as in ``Problem``.
        main_grad: as in ``Problem``.
        uniforms: as in ``Problem``.
        shard: this rank's part, where the vocabulary is in shards.
        appended: dtype of the last columns of the weight, where these alone have a gradient; else None.
        regather_in_backward: whether hidden states that are sharded too are gathered again for the backward pass.
    """

    shape: Shape
    plan: Plan
    rows: torch.Tensor | None
    total_rows: int
    head: HeadOptions
    objective: LossObjective | StatisticsObjective
    valid_mask: torch.Tensor | None
    smoothing: torch.Tensor | float | None
    main_grad: torch.Tensor | None
    uniforms: torch.Tensor | None
    shard: Shard | None = None
    appended: torch.dtype | None = None
    regather_in_backward: bool = False

    def problem(
        self,
        hidden: torch.Tensor,  # [total_rows, D]
        weight: torch.Tensor,  # [V, D]
        bias: torch.Tensor | None,  # [V]
        target: torch.Tensor,  # [N]
        merge: Merging | None = None,
    ) -> Problem:
        """The problem of the rows that count."""
        matrix, index = rows_of(hidden)
        if self.rows is not None:
            index = self.rows if index is None else index[self.rows]
        if backends.load(self.plan.backend).READS_MATRIX:
            matrix = (matrix if index is None else matrix.index_select(0, index)).contiguous()
            index = None
        return Problem(
            shape=self.shape,
            hidden=matrix,
            weight=weight,
            bias=bias,
            target=target,
            head=self.head,
            valid_mask=self.valid_mask,
            smoothing=self.smoothing,
            main_grad=self.main_grad,
            uniforms=self.uniforms,
            merge=merge,
            hidden_index=index,
        )

    def spread(self, packed: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Rows that count, put back among the caller's; ``fill`` elsewhere. [N, ...] -> [total_rows, ...]."""
        if self.rows is None:
            return packed
        full = packed.new_full((self.total_rows, *packed.shape[1:]), fill)
        return full.index_copy_(0, self.rows, packed)


def apply(
    hidden: torch.Tensor,  # [..., D], total_rows of them
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    target: torch.Tensor,  # [N] int64, of the rows that count
    call: Call,
    appended: torch.Tensor | None = None,  # [V, R]
) -> tuple[torch.Tensor, ...]:
    """The objective's outputs: scalars, or [total_rows] with 0 (integers: -1) at rows that do not count.

    ``appended`` are the last columns of ``weight`` once more, where their gradient alone is wanted.
    """
    return _LinearHead.apply(hidden, weight, bias, target, call, appended)  # type: ignore[no-any-return]


def evaluate(
    call: Call, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
) -> tuple[tuple[torch.Tensor, ...], Statistics, Gradients | None]:
    """Outputs, statistics, and under the chunked strategy the gradients of a scalar output for an upstream one of 1."""
    schedule, backend, objective = call.plan.schedule, backends.load(call.plan.backend), call.objective
    prepared, shard = None, call.shard
    merge = None if shard is None else Merging(shard, call.smoothing)
    # Kernels start on the current device.
    with full_precision_accumulation(hidden.device), torch.cuda.device_of(hidden):
        problem = call.problem(hidden, weight, bias, target, merge)
        ahead = None
        if schedule.strategy == "chunked" or schedule.prepared:
            assert isinstance(objective, LossObjective)
            ahead = objective.ahead()
            if shard is not None:
                ahead = replace(ahead, c=shard.of_own_targets(ahead.c))
        if shard is not None:
            problem = replace(problem, shape=replace(call.shape, statistics=call.shape.statistics - {"target_rank"}))
        if call.shape.vocabulary == 0:
            statistics = _nothing_seen(problem, schedule)
            prepared = _no_gradients(problem) if schedule.strategy == "chunked" else None
        elif schedule.strategy == "chunked":
            assert ahead is not None
            statistics, prepared = backend.forward_with_gradients(problem, schedule, ahead)
            prepared = prepared if backend.READS_MATRIX else _of_valid_rows(problem, prepared)
        else:
            statistics = backend.forward(problem, schedule, ahead)
        whole = statistics
        if merge is not None:
            whole = merge.whole(statistics)
            if "target_rank" in call.shape.statistics:
                whole = replace(whole, target_rank=_rank_in_whole(call, problem, whole))
            statistics = of_target(whole, statistics)
        outputs = objective.outputs(whole)
    if not objective.scalar:
        outputs = tuple(call.spread(o, 0 if o.is_floating_point() else -1) for o in outputs)
    return outputs, statistics, prepared


def _nothing_seen(problem: Problem, schedule: Schedule) -> Statistics:
    """Statistics of an empty shard; its ranks come to the collectives of the others."""
    shape, wanted, device = problem.shape, problem.shape.statistics, problem.hidden.device

    def of(rows: int) -> Statistics:
        zero = torch.zeros(rows, dtype=shape.statistics_dtype, device=device)
        return Statistics(
            peak=zero,
            log_sum=torch.full_like(zero, -torch.inf),
            target_logit=zero,
            mean_gap=zero if "mean_gap" in wanted else None,
            smooth_logit=zero if "smooth_logit" in wanted else None,
            prediction=zero.long() if "prediction" in wanted else None,
        )

    if schedule.strategy == "chunked":
        assert problem.merge is not None
        for start in range(0, shape.tokens, schedule.rows):
            rows = slice(start, min(start + schedule.rows, shape.tokens))
            problem.merge(of(rows.stop - rows.start), rows)()
    return of(shape.tokens)


def _rank_in_whole(call: Call, problem: Problem, whole: Statistics) -> torch.Tensor:
    """[N] how many logits of all shards are above the target's: a second pass, and an all-reduce."""
    assert call.shard is not None
    count = torch.zeros_like(whole.target_logit, dtype=torch.int64)
    if call.shape.vocabulary:
        plain = replace(
            call.shape,
            statistics=frozenset({"target_rank"}),
            threshold=None,
            hidden_gradient=False,
            weight_gradient=False,
            bias_gradient=False,
        )
        schedule = Schedule("loss_only", call.plan.schedule.rows, call.shape.vocabulary)
        ranked = replace(problem, shape=plain, merge=None, rank_above=whole.target_logit, smoothing=None)
        above = backends.load(call.plan.backend).forward(ranked, schedule, None).target_rank
        assert above is not None
        count = above
    return call.shard.layout.sum_over_ranks(count)


def differentiate(
    call: Call,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    statistics: Statistics,
    upstream: tuple[torch.Tensor | None, ...],
) -> Gradients:
    """Gradients of the rows that count, of weight and of bias, in accumulation dtypes; saved tensors may be used up."""
    with full_precision_accumulation(hidden.device), torch.cuda.device_of(hidden):
        problem, backend = call.problem(hidden, weight, bias, target), backends.load(call.plan.backend)
        if call.plan.schedule.prepared:
            (grad,) = upstream
            assert grad is not None
            return backend.finish(problem, call.plan.schedule, statistics, grad)
        coefficients = call.objective.coefficients(statistics, _packed(call, upstream))
        if call.shape.vocabulary == 0:
            return _no_gradients(problem)
        if call.shard is not None:
            coefficients = replace(coefficients, c=call.shard.of_own_targets(coefficients.c))
        gradients = backend.backward(problem, call.plan.schedule, statistics, coefficients)
        return gradients if backend.READS_MATRIX else _of_valid_rows(problem, gradients)


def _of_valid_rows(problem: Problem, gradients: Gradients) -> Gradients:
    """The same, 0 for hidden states of rows that do not count: 0 times a weight that is not finite would be NaN."""
    if problem.valid_mask is not None and gradients.hidden is not None:
        gradients.hidden.masked_fill_(~problem.valid_mask[:, None], 0)
    return gradients


def _no_gradients(problem: Problem) -> Gradients:
    """Of an empty shard."""
    shape, dtype = problem.shape, problem.shape.statistics_dtype
    return Gradients(
        hidden=torch.zeros(shape.tokens, shape.hidden, dtype=dtype, device=problem.hidden.device)
        if shape.hidden_gradient
        else None,
        weight=problem.weight.new_zeros(shape.weight_gradient_size, dtype=dtype) if shape.weight_gradient else None,
        bias=None if not shape.bias_gradient or problem.bias is None else torch.zeros_like(problem.bias, dtype=dtype),
    )


class _LinearHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        call: Call,
        appended: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        del appended  # for its gradient
        hidden, weight = wait_tensor(hidden), wait_tensor(weight)
        bias = None if bias is None else wait_tensor(bias)
        # No collective or copy may depend on autocast, which one rank alone could fail under.
        with torch.autocast(hidden.device.type, enabled=False):
            gathered = hidden if call.shard is None else call.shard.layout.gathered(hidden)
            outputs, ctx.statistics, ctx.prepared = evaluate(call, gathered, weight, bias, target)
        ctx.call = call
        ctx.save_for_backward(hidden if call.regather_in_backward else gathered, weight, bias, target)
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        check_upstream(*upstream)
        hidden, weight, bias, target = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            if ctx.call.regather_in_backward:
                hidden = ctx.call.shard.layout.gathered(hidden)
            gradients = _gradients(ctx, hidden, weight, bias, target, upstream)
        if torch.is_grad_enabled():  # create_graph=True
            connected = [t for t in (hidden, weight, bias, *upstream) if t is not None and t.requires_grad]
            gradients = tuple(None if g is None else _NotTwice.apply(g, *connected) for g in gradients)
        of_hidden, of_weight, of_bias = gradients
        if ctx.call.appended is not None:
            return of_hidden, None, of_bias, None, None, of_weight
        return of_hidden, of_weight, of_bias, None, None, None


def _gradients(
    ctx: Any,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    upstream: tuple[torch.Tensor | None, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of hidden states, weight and bias in their own dtypes.

    Of a second backward pass, which finds used up what the forward pass left, the forward pass is repeated: another way
    to the logits rounds them otherwise, and statistics hold for those that they were made of.
    """
    call: Call = ctx.call
    if all(grad is None for grad in upstream):
        return None, None, None
    scale: torch.Tensor | None = None
    if call.plan.strategy == "chunked":
        (scale,) = upstream
        prepared = ctx.prepared
        if prepared is None:
            _, _, prepared = evaluate(call, hidden, weight, bias, target)
        assert prepared is not None
        gradients: Gradients = prepared
        ctx.prepared = None
    else:
        statistics = ctx.statistics
        if statistics is None:
            _, statistics, _ = evaluate(call, hidden, weight, bias, target)
        gradients = differentiate(call, hidden, weight, bias, target, statistics, upstream)
        if call.plan.schedule.uses_up_saved:
            ctx.statistics = None
    shard = call.shard
    if shard is not None and gradients.hidden is not None:
        spread = gradients.hidden if shard.layout.rows is None else call.spread(gradients.hidden)
        gradients.hidden = shard.layout.summed(spread)
    valid = call.valid_mask if shard is None or call.valid_mask is None else shard.layout.own_rows(call.valid_mask)
    packed = _handed_on(gradients, "hidden", of_valid_rows(scale, valid), hidden.dtype)
    if packed is not None and (shard is None or shard.layout.rows is None):
        packed = call.spread(packed)
    if packed is not None and shard is None:
        packed = packed.view(hidden.shape)
    return (
        packed,
        _handed_on(gradients, "weight", scale, call.appended or weight.dtype),
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


def of_valid_rows(scale: torch.Tensor | None, valid: torch.Tensor | None) -> torch.Tensor | None:
    """A 0-d scale as one for each row, [N, 1], that is 0 where rows do not count: the scale may be NaN or infinite."""
    return scale if scale is None or valid is None else torch.where(valid, scale, 0)[:, None]


def scaled(gradient: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """A gradient times a scale, rounded once; on an accelerator in one pass, without asking for the scale."""
    if scale is None or (scale.device.type == "cpu" and scale.ndim == 0 and scale.item() == 1):
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
