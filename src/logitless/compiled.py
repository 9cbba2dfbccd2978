"""The operator under torch.compile and torch.export: two ``torch.library`` operators that a graph can hold.

``logitless::linear_head`` gives the objective's outputs and what its gradient needs, and
``logitless::linear_head_backward`` the gradients. Both are functional: nothing that a forward pass leaves is
overwritten and no outputs share memory, so no windows are aliased with the weight gradient, and what is cached is
read, not used up.

What is not a tensor travels as text, so that a graph can hold it; numbers that the compiler takes for variables (a
temperature that changes from step to step) travel as a tensor on the CPU. So does one graph serve any number of tokens,
if it was traced for that: what its forward pass saves must then not depend on a plan, which the number decides. Logits
are recomputed in the backward pass, or on the CPU, for a scalar, gradients are formed in the forward pass.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from logitless import backends, planning
from logitless.backends.contract import Gradients, Schedule, Shape, Statistics, Strategy, TensorForm
from logitless.objective import LossObjective, StatisticsObjective
from logitless.operators import Call, differentiate, evaluate, of_valid_rows
from logitless.options import HeadOptions, LossOptions, Reduction, Scan
from logitless.schedules import Forced

INTEGER_OUTPUTS = ("prediction", "target_rank")


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
    """A call as it is read back from text.

    Attributes:
        numbers: ``logit_scale``, ``softcap``, ``label_smoothing``, ``z_loss`` and the smoothing of each entry: a
            number, None, or ``"n"`` and its index among those that travel as a tensor.
        reduction: of a loss; None for token statistics.
        outputs: of token statistics.
        traced: as in ``Shape``.
    """

    backend: str
    workspace: int | None
    threshold: float | None
    scan: Scan
    dtype: str
    wants: tuple[bool, bool, bool]
    forced: tuple[Any, ...] | None
    numbers: tuple[float | str | None, ...]
    reduction: Reduction | None
    outputs: tuple[str, ...]
    traced: Strategy | None

    @property
    def compute_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype.removeprefix("torch."))
        return dtype

    @property
    def statistics_dtype(self) -> torch.dtype:
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    @property
    def output_count(self) -> int:
        return 1 if self.reduction is not None else len(self.outputs)

    def read_numbers(self, given: torch.Tensor | None) -> list[float | None]:
        """The numbers; those of the tensor are 0 where it is not known, as while a graph is traced."""

        def value(number: float | str | None) -> float | None:
            if not isinstance(number, str):
                return number
            return 0.0 if given is None else float(given[int(number.removeprefix("n"))])

        return [value(number) for number in self.numbers]


@functools.lru_cache(maxsize=256)
def _read(text: str) -> _Text:
    return _Text(*ast.literal_eval(text))


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
    from torch.fx.experimental.symbolic_shapes import guard_scalar, has_static_value

    vector = smoothing if isinstance(smoothing, torch.Tensor) else None
    label_smoothing = z_loss = reduction = class_weight = None
    outputs: tuple[str, ...] = ()
    if isinstance(objective, LossObjective):
        options, class_weight = objective.options, objective.class_weight
        label_smoothing, z_loss, reduction = options.label_smoothing, options.z_loss, options.reduction
    else:
        outputs = objective.names
    uniform = None if isinstance(smoothing, torch.Tensor) else smoothing
    numbers: list[float | str | None] = []
    variables: list[torch.Tensor] = []
    for number in (settings.head.logit_scale, settings.head.softcap, label_smoothing, z_loss, uniform):
        if number is None or has_static_value(number):
            numbers.append(None if number is None else guard_scalar(number))
        else:
            numbers.append("n" + str(len(variables)))
            variables.append(torch.ones((), dtype=torch.float64, device="cpu") * number)
    traced = None if has_static_value(hidden.shape[0]) else _traced(hidden, settings, reduction)
    workspace, threshold = settings.workspace, settings.threshold
    fixed = replace(
        settings,
        workspace=None if workspace is None else guard_scalar(workspace),
        threshold=None if threshold is None else guard_scalar(threshold),
    )
    results = linear_head(
        hidden,
        weight,
        bias,
        target,
        valid_mask,
        objective.scale,
        class_weight,
        vector,
        uniforms,
        torch.stack(variables) if variables else None,
        written(fixed, tuple(numbers), reduction, outputs, traced),
    )
    return tuple(results[: 1 if reduction is not None else len(outputs)])


def written(
    settings: Settings,
    numbers: tuple[float | str | None, ...],
    reduction: Reduction | None,
    outputs: tuple[str, ...],
    traced: Strategy | None,
) -> str:
    """A call as text; of the settings without ``head``, whose numbers are among the others: see ``_Text``."""
    forced = settings.forced
    demanded = None
    if forced is not None:
        demanded = (forced.strategy, forced.rows, forced.window, forced.kept, forced.aliased, forced.prepared)
    parts = (
        settings.backend,
        settings.workspace,
        settings.threshold,
        settings.scan,
        str(settings.compute_dtype),
        settings.wants,
        demanded,
        numbers,
        reduction,
        outputs,
        traced,
    )
    return str(parts)


def _traced(hidden: torch.Tensor, settings: Settings, reduction: Reduction | None) -> Strategy:
    """The strategy of a graph that serves any number of tokens."""
    if not (settings.wants[0] or settings.wants[1] or settings.wants[2]):
        return "loss_only"
    if settings.threshold is not None:
        return "sampled"
    on_cpu = hidden.device.type == "cpu" and settings.backend != "triton"
    return "chunked" if on_cpu and reduction in ("mean", "sum") else "windowed"


def _shape(
    text: _Text,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    objective: LossObjective | StatisticsObjective,
) -> Shape:
    tokens: Any = hidden.shape[0]  # a symbol where a graph is traced for any number
    return Shape.of(
        hidden,
        weight,
        tokens if text.traced is not None else int(tokens),
        compute_dtype=text.compute_dtype,
        hidden_gradient=text.wants[0],
        weight_gradient=text.wants[1],
        bias_gradient=text.wants[2],
        statistics=objective.statistics,
        biased=bias is not None,
        softcapped=text.numbers[1] is not None,
        threshold=text.threshold,
        scan=text.scan,
        compacted=not hidden.is_contiguous(),
        main_grad=False,
        functional=True,
        traced=text.traced,
    )


def _objective(
    text: _Text,
    valid_mask: torch.Tensor | None,
    scale: torch.Tensor,
    class_weight: torch.Tensor | None,
    smoothing: torch.Tensor | None,
    label_smoothing: float | None,
    z_loss: float | None,
) -> LossObjective | StatisticsObjective:
    if text.reduction is None:
        return StatisticsObjective(text.outputs, valid_mask, scale)
    options = LossOptions(text.reduction, label_smoothing=label_smoothing or 0.0, z_loss=z_loss or 0.0)
    return LossObjective(options, valid_mask, scale, class_weight, 1.0 if smoothing is None else smoothing.sum())


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
    numbers: torch.Tensor | None,
) -> Call:
    """The call that the operators' arguments stand for, planned."""
    logit_scale, softcap, label_smoothing, z_loss, uniform = text.read_numbers(numbers)
    objective = _objective(text, valid_mask, scale, class_weight, smoothing, label_smoothing, z_loss)
    shape = _shape(text, hidden, weight, bias, objective)
    forced = None if text.forced is None else Forced(*text.forced)
    backend = planning.choose_backend(text.backend, shape)
    assert logit_scale is not None
    return Call(
        shape=shape,
        plan=planning.choose(shape, backend, objective.scalar, text.workspace, forced),
        rows=None,
        total_rows=shape.tokens,
        head=HeadOptions(logit_scale, softcap),
        objective=objective,
        valid_mask=valid_mask,
        smoothing=uniform if smoothing is None else smoothing,
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
    numbers: torch.Tensor | None,
    text: str,
) -> list[torch.Tensor]:
    """The objective's outputs, then what the gradient needs: see ``_saved``."""
    call = _call(_read(text), hidden, weight, bias, valid_mask, scale, class_weight, smoothing, uniforms, numbers)
    outputs, statistics, prepared = evaluate(call, hidden, weight, bias, target)
    if call.shape.traced == "windowed":
        statistics = statistics.with_saved(())
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
    numbers: torch.Tensor | None,
    text: str,
) -> list[torch.Tensor]:
    read = _read(text)
    _, _, label_smoothing, z_loss, _ = read.read_numbers(None)
    objective = _objective(read, valid_mask, scale, class_weight, smoothing, label_smoothing, z_loss)
    shape, dtype = _shape(read, hidden, weight, bias, objective), read.statistics_dtype

    def rows(kind: torch.dtype) -> torch.Tensor:
        return hidden.new_empty(shape.tokens, dtype=kind)

    if objective.scalar:
        outputs = [hidden.new_empty((), dtype=dtype)]
    elif read.reduction is not None:
        outputs = [rows(dtype)]
    else:
        outputs = [rows(torch.int64 if name in INTEGER_OUTPUTS else dtype) for name in read.outputs]
    strategy, left = _left(read, shape, objective.scalar)
    if strategy == "chunked":
        sizes = ((shape.tokens, shape.hidden), (shape.vocabulary, shape.hidden), (shape.vocabulary,))
        prepared = [size for size, wanted in zip(sizes, read.wants, strict=True) if wanted]
        return [*outputs, *(hidden.new_empty(size, dtype=dtype) for size in prepared)]
    statistics = [rows(dtype) for _ in range(4 if "mean_gap" in shape.statistics else 3)]
    return [*outputs, *statistics, *(hidden.new_empty(size, dtype=kind) for size, kind in left)]


def _left(text: _Text, shape: Shape, scalar: bool) -> tuple[Strategy, list[TensorForm]]:
    """The strategy of a call, and the sizes and dtypes of what its forward pass saves besides statistics."""
    backend = planning.choose_backend(text.backend, shape)
    if text.traced is not None:
        if text.traced != "sampled":
            return text.traced, []
        return "sampled", backends.load(backend).saved_forms(shape, Schedule("sampled", shape.tokens, shape.vocabulary))
    forced = None if text.forced is None else Forced(*text.forced)
    plan = planning.choose(shape, backend, scalar, text.workspace, forced)
    left = backends.load(backend).saved_forms(shape, plan.schedule) if shape.any_gradient else []
    return plan.strategy, left


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
    numbers: torch.Tensor | None,
    saved: list[torch.Tensor],
    text: str,
) -> list[torch.Tensor]:
    """The gradients that are wanted, in their tensors' dtypes, from upstream gradients of the outputs ``given``."""
    read = _read(text)
    call = _call(read, hidden, weight, bias, valid_mask, scale, class_weight, smoothing, uniforms, numbers)
    gap = "mean_gap" in call.shape.statistics
    statistics = Statistics(
        peak=saved[0],
        log_sum=saved[1],
        target_logit=saved[2],
        mean_gap=saved[3] if gap else None,
        saved=tuple(saved[3 + gap :]),
    )
    if call.shape.traced == "windowed":
        problem = call.problem(hidden, weight, bias, target)
        backend = backends.load(call.plan.backend)
        statistics = statistics.with_saved(backend.recomputed(problem, call.plan.schedule))
    by_output: list[torch.Tensor | None] = [None] * read.output_count
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
    numbers: torch.Tensor | None,
    saved: list[torch.Tensor],
    text: str,
) -> list[torch.Tensor]:
    wanted = zip((hidden, weight, bias), _read(text).wants, strict=True)
    return [of.new_empty(of.shape) for of, want in wanted if want and of is not None]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    *tensors, text = inputs
    read = _read(text)
    ctx.text, ctx.count = text, read.output_count
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output[ctx.count :])


def _backward(ctx: Any, upstream: list[torch.Tensor | None]) -> tuple[torch.Tensor | None, ...]:
    tensors, saved = ctx.saved_tensors[:10], list(ctx.saved_tensors[10:])
    read = _read(ctx.text)
    nothing = (None,) * 8
    given = [index for index, grad in enumerate(upstream[: ctx.count]) if grad is not None]
    if not given:
        return None, None, None, *nothing
    grads = [grad for grad in upstream[: ctx.count] if grad is not None]
    wants, of = read.wants, tensors[:3]
    if saved[0].ndim == 2 or len(saved) < 3:  # gradients, for an upstream one of 1, instead of statistics
        scales = (of_valid_rows(grads[0], tensors[4]), grads[0], grads[0])
        wanted = [(tensor, scale) for tensor, scale, want in zip(of, scales, wants, strict=True) if want]
        results = [(gradient * scale).to(tensor.dtype) for gradient, (tensor, scale) in zip(saved, wanted, strict=True)]
    else:
        results = linear_head_backward(grads, given, *tensors, saved, ctx.text)
    results = iter(results)
    return *(next(results) if want else None for want in wants), *nothing


linear_head.register_autograd(_backward, setup_context=_setup_context)
