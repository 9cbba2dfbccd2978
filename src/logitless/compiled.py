"""The operator under torch.compile and torch.export: two ``torch.library`` operators that a graph can hold.

``logitless::linear_head`` gives the objective's outputs and what its gradient needs, and
``logitless::linear_head_backward`` the gradients. Both are functional: nothing that a forward pass leaves is
overwritten and no outputs share memory, so no windows are aliased with the weight gradient, and what is cached is
read, not used up. Everything that is not a tensor travels as text, so that a graph can hold it. Sizes are those of
the trace: another number of tokens recompiles.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass
from typing import Any

import torch

from logitless import backends, planning
from logitless.backends.contract import Gradients, Shape, Statistics
from logitless.objective import LossObjective, StatisticsObjective
from logitless.operators import Call, differentiate, evaluate, of_valid_rows
from logitless.options import HeadOptions, LossOptions, Scan
from logitless.schedules import Forced


@dataclass(frozen=True)
class Settings:
    """What a call has besides tensors and its objective.

    Attributes:
        backend: the name asked for.
        workspace: bytes, or None.
        head: scale and cap of the logits.
        threshold: of the sampled gradient, or None.
        scan: of the sampled gradient.
        compute_dtype: of the products' operands.
        wants: whether the gradients of hidden states, weight and bias are wanted.
        forced: what ``force_strategy`` demands.
    """

    backend: str
    workspace: int | None
    head: HeadOptions
    threshold: float | None
    scan: Scan
    compute_dtype: torch.dtype
    wants: tuple[bool, bool, bool]
    forced: Forced | None


@dataclass(frozen=True)
class _Text:
    """Settings and objective as they are read back from text."""

    settings: Settings
    loss: LossOptions | None
    outputs: tuple[str, ...]
    uniform_smoothing: float | None

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.settings.compute_dtype == torch.float64 else torch.float32


def written(settings: Settings, objective: LossObjective | StatisticsObjective, uniform: float | None) -> str:
    """Everything that is not a tensor, as the text of a tuple."""
    head, forced = settings.head, settings.forced
    dtype = str(settings.compute_dtype)
    demanded = None
    if forced is not None:
        demanded = (forced.strategy, forced.rows, forced.window, forced.kept, forced.aliased, forced.prepared)
    loss = outputs = None
    if isinstance(objective, LossObjective):
        options = objective.options
        loss = (options.reduction, options.ignore_index, options.label_smoothing, options.z_loss)
    else:
        outputs = objective.names
    parts = (
        settings.backend,
        settings.workspace,
        (head.logit_scale, head.softcap),
        settings.threshold,
        settings.scan,
        dtype,
        settings.wants,
        demanded,
        loss,
        outputs,
        uniform,
    )
    return str(parts)


@functools.lru_cache(maxsize=256)
def _read(text: str) -> _Text:
    backend, workspace, head, threshold, scan, dtype, wants, demanded, loss, outputs, uniform = ast.literal_eval(text)
    settings = Settings(
        backend=backend,
        workspace=workspace,
        head=HeadOptions(*head),
        threshold=threshold,
        scan=scan,
        compute_dtype=getattr(torch, dtype.removeprefix("torch.")),
        wants=wants,
        forced=None if demanded is None else Forced(*demanded),
    )
    return _Text(settings, None if loss is None else LossOptions(*loss), tuple(outputs or ()), uniform)


def apply(
    hidden: torch.Tensor,  # [N, D]
    weight: torch.Tensor,  # [V, D]
    bias: torch.Tensor | None,  # [V]
    target: torch.Tensor,  # [N]
    valid_mask: torch.Tensor | None,  # [N]
    objective: LossObjective | StatisticsObjective,
    smoothing: torch.Tensor | float | None,  # [V] or one for all
    uniforms: torch.Tensor | None,  # [N]
    settings: Settings,
) -> tuple[torch.Tensor, ...]:
    """As ``operators.apply``."""
    vector = smoothing if isinstance(smoothing, torch.Tensor) else None
    text = written(settings, objective, smoothing if isinstance(smoothing, float) else None)
    class_weight = objective.class_weight if isinstance(objective, LossObjective) else None
    results = linear_head(
        hidden, weight, bias, target, valid_mask, objective.scale, class_weight, vector, uniforms, text
    )
    count = 1 if isinstance(objective, LossObjective) else len(objective.names)
    return tuple(results[:count])


def _call(
    text: _Text,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    valid_mask: torch.Tensor | None,
    scale: torch.Tensor,
    class_weight: torch.Tensor | None,
    smoothing: torch.Tensor | None,
    uniforms: torch.Tensor | None,
) -> Call:
    """The call that the operators' arguments stand for, planned."""
    settings = text.settings
    if text.loss is None:
        objective: LossObjective | StatisticsObjective = StatisticsObjective(text.outputs, valid_mask, scale)
    else:
        mass = 1.0 if smoothing is None else smoothing.sum()
        objective = LossObjective(text.loss, valid_mask, scale, class_weight, mass)
    shape = Shape.of(
        hidden,
        weight,
        int(hidden.shape[0]),
        compute_dtype=settings.compute_dtype,
        hidden_gradient=settings.wants[0],
        weight_gradient=settings.wants[1],
        bias_gradient=settings.wants[2],
        statistics=objective.statistics,
        biased=bias is not None,
        softcapped=settings.head.softcap is not None,
        threshold=settings.threshold,
        scan=settings.scan,
        compacted=not hidden.is_contiguous(),
        main_grad=False,
        functional=True,
    )
    backend = planning.choose_backend(settings.backend, shape)
    return Call(
        shape=shape,
        plan=planning.choose(shape, backend, objective.scalar, settings.workspace, settings.forced),
        rows=None,
        total_rows=shape.tokens,
        head=settings.head,
        objective=objective,
        valid_mask=valid_mask,
        smoothing=text.uniform_smoothing if smoothing is None else smoothing,
        main_grad=None,
        uniforms=uniforms,
    )


@torch.library.custom_op("logitless::linear_head", mutates_args=())
def linear_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    valid_mask: torch.Tensor | None,
    scale: torch.Tensor,
    class_weight: torch.Tensor | None,
    smoothing: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    text: str,
) -> list[torch.Tensor]:
    """The objective's outputs, then what the gradient needs: see ``_saved``."""
    call = _call(_read(text), hidden, weight, bias, valid_mask, scale, class_weight, smoothing, uniforms)
    outputs, statistics, prepared = evaluate(call, hidden, weight, bias, target)
    return [*outputs, *_saved(statistics, prepared)]


def _saved(statistics: Statistics, prepared: Gradients | None) -> list[torch.Tensor]:
    """Prepared gradients where there are, else statistics that coefficients are made of, and saved tensors."""
    if prepared is not None:
        return [g for g in (prepared.hidden, prepared.weight, prepared.bias) if g is not None]
    gap = [] if statistics.mean_gap is None else [statistics.mean_gap]
    return [statistics.peak, statistics.log_sum, statistics.target_logit, *gap, *statistics.saved]


@linear_head.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    valid_mask: torch.Tensor | None,
    scale: torch.Tensor,
    class_weight: torch.Tensor | None,
    smoothing: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    text: str,
) -> list[torch.Tensor]:
    read = _read(text)
    call = _call(read, hidden, weight, bias, valid_mask, scale, class_weight, smoothing, uniforms)
    shape, dtype = call.shape, read.statistics_dtype

    def rows(kind: torch.dtype) -> torch.Tensor:
        return hidden.new_empty(shape.tokens, dtype=kind)

    if call.objective.scalar:
        outputs = [hidden.new_empty((), dtype=dtype)]
    elif read.loss is not None:
        outputs = [rows(dtype)]
    else:
        outputs = [rows(torch.int64 if name in ("prediction", "target_rank") else dtype) for name in read.outputs]
    if call.plan.strategy == "chunked":
        sizes = ((shape.tokens, shape.hidden), (shape.vocabulary, shape.hidden), (shape.vocabulary,))
        prepared = [size for size, wanted in zip(sizes, read.settings.wants, strict=True) if wanted]
        return [*outputs, *(hidden.new_empty(size, dtype=dtype) for size in prepared)]
    statistics = [rows(dtype) for _ in range(4 if "mean_gap" in shape.statistics else 3)]
    left = backends.load(call.plan.backend).saved_forms(shape, call.plan.schedule) if shape.any_gradient else []
    return [*outputs, *statistics, *(hidden.new_empty(size, dtype=kind) for size, kind in left)]


@torch.library.custom_op("logitless::linear_head_backward", mutates_args=())
def linear_head_backward(
    upstream: list[torch.Tensor],
    given: list[int],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    valid_mask: torch.Tensor | None,
    scale: torch.Tensor,
    class_weight: torch.Tensor | None,
    smoothing: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    saved: list[torch.Tensor],
    text: str,
) -> list[torch.Tensor]:
    """The gradients that are wanted, in their tensors' dtypes, from upstream gradients of the outputs ``given``."""
    read = _read(text)
    call = _call(read, hidden, weight, bias, valid_mask, scale, class_weight, smoothing, uniforms)
    gap = "mean_gap" in call.shape.statistics
    statistics = Statistics(
        peak=saved[0],
        log_sum=saved[1],
        target_logit=saved[2],
        mean_gap=saved[3] if gap else None,
        saved=tuple(saved[3 + gap :]),
    )
    by_output: list[torch.Tensor | None] = [None] * (1 if read.loss is not None else len(read.outputs))
    for index, grad in zip(given, upstream, strict=True):
        by_output[index] = grad
    gradients = differentiate(call, hidden, weight, bias, target, statistics, tuple(by_output))
    tensors = ((gradients.hidden, hidden), (gradients.weight, weight), (gradients.bias, bias))
    return [g.to(of.dtype) for g, of in tensors if g is not None and of is not None]


@linear_head_backward.register_fake
def _(
    upstream: list[torch.Tensor],
    given: list[int],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    valid_mask: torch.Tensor | None,
    scale: torch.Tensor,
    class_weight: torch.Tensor | None,
    smoothing: torch.Tensor | None,
    uniforms: torch.Tensor | None,
    saved: list[torch.Tensor],
    text: str,
) -> list[torch.Tensor]:
    wanted = zip((hidden, weight, bias), _read(text).settings.wants, strict=True)
    return [of.new_empty(of.shape) for of, want in wanted if want and of is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    *tensors, text = inputs
    hidden, weight, bias, _, *others = tensors
    read = _read(text)
    count = 1 if read.loss is not None else len(read.outputs)
    ctx.text, ctx.count = text, count
    ctx.prepared = _call(read, hidden, weight, bias, *others).plan.strategy == "chunked"
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[count:])


def _backward(ctx: Any, upstream: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    tensors, saved = ctx.saved_tensors[:9], list(ctx.saved_tensors[9:])
    read = _read(ctx.text)
    nothing = (None,) * 7
    given = [index for index, grad in enumerate(upstream[: ctx.count]) if grad is not None]
    if not given:
        return None, None, None, *nothing
    grads = [grad for grad in upstream[: ctx.count] if grad is not None]
    wants, of = read.settings.wants, tensors[:3]
    if ctx.prepared:  # for an upstream gradient of 1
        scales = (of_valid_rows(grads[0], tensors[4]), grads[0], grads[0])
        wanted = [(tensor, scale) for tensor, scale, want in zip(of, scales, wants, strict=True) if want]
        results = [(gradient * scale).to(tensor.dtype) for gradient, (tensor, scale) in zip(saved, wanted, strict=True)]
    else:
        results = linear_head_backward(grads, given, *tensors, saved, ctx.text)
    results = iter(results)
    return *(next(results) if want else None for want in wants), *nothing


linear_head.register_autograd(_backward, setup_context=_setup_context)
