"""``linear_cross_entropy`` and ``token_statistics``: arguments in, the operator's call out.

Shapes: ``...`` any leading shape with N elements in all, D hidden, V vocabulary.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from logitless import compiled, dtensors, operators, planning, schedules, sharding, validation
from logitless.backends.contract import Shape
from logitless.objective import LossObjective, StatisticsObjective
from logitless.options import Backend, FloatOutput, HeadOptions, IntegerOutput, LossOptions, Reduction, Sampled

Normalizer = torch.Tensor | float | None
Adapter = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token outputs of a language model's head; None where not asked for.

    Each has the shape of ``target``. Floats are fp32 (fp64 for fp64 inputs), differentiable, and 0 at ignored tokens;
    integers are int64, and -1 there.

    Attributes:
        nll: negative log-likelihood of the target, in nats.
        logsumexp: log of the sum of exponentials of the logits.
        entropy: of the softmax, in nats.
        prediction: index of the largest logit.
        target_rank: number of other vocabulary entries whose logit is above the target's; 0 means predicted.
    """

    nll: torch.Tensor | None = None
    logsumexp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    target_rank: torch.Tensor | None = None


def linear_cross_entropy(
    input: torch.Tensor,  # [..., D]
    linear_weight: torch.Tensor,  # [V, D]
    target: torch.Tensor,  # [...]
    *,
    linear_bias: torch.Tensor | None = None,  # [V]
    weight: torch.Tensor | None = None,  # [V]
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weight: torch.Tensor | None = None,  # [...]
    normalizer: Normalizer = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: str | Sampled = "exact",
    workspace: int | str | None = None,
    backend: Backend = "auto",
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    main_grad: torch.Tensor | None = None,  # [V, D]
    adapter: Adapter | None = None,
) -> torch.Tensor:
    """Cross-entropy of ``linear(input, linear_weight, linear_bias)`` and ``target``, without the logits.

    Takes the place of ``F.cross_entropy(F.linear(input, linear_weight, linear_bias), target)``. The logits are
    ``z_v = softcap * tanh((logit_scale * <x, w_v> + bias_v) / softcap)``, without the cap where ``softcap`` is None;
    the scale does not reach the bias. The loss of a token with target y is::

        token_weight * ((1 - label_smoothing) * weight_y * nll + label_smoothing * smooth + z_loss * logsumexp**2)

    with ``smooth = sum_v weight_v * (logsumexp - z_v) / V``, as in ``torch.nn.functional.cross_entropy``.

    Precision: statistics, loss and accumulators are fp32 (fp64 for fp64 inputs); each gradient has its tensor's dtype
    and is rounded to it once. Products take operands in the wider of the two dtypes, or under autocast in the autocast
    dtype, and accumulate in fp32.

    Args:
        input: hidden states [..., D], any strides; bf16, fp16, fp32 or fp64.
        linear_weight: [V, D], of any of these dtypes, not necessarily that of ``input``.
        target: vocabulary indices [...], any integer dtype.
        linear_bias: [V].
        weight: class weights [V].
        reduction: ``"mean"``: the sum divided by the sum of class weights over tokens that count (their number without
            class weights); ``"sum"``; ``"none"``: per token, in the shape of ``target``.
        ignore_index: tokens with this target cost nothing and count for nothing. Any integer, also one in [0, V).
        label_smoothing: in [0, 1].
        token_weight: [...] multiplies each token's loss; does not change what a mean divides by.
        normalizer: what a mean divides by instead, e.g. the number of tokens over all accumulation steps or ranks. A
            number or a 0-d tensor; 0 gives loss 0 and gradients 0.
        z_loss: coefficient of the squared logsumexp.
        softcap: bound of the logits, or None.
        logit_scale: factor of the products, e.g. an inverse temperature.
        gradient: ``"exact"``, or ``Sampled(...)``: exact loss, unbiased gradient, a fraction of the cost.
        workspace: bytes to hold at most above inputs and gradients: an int, text such as ``"512MiB"``, or None for
            the default policy: an eighth of what the two-stage pipeline holds, at least 64 MiB, exceeded where nothing
            fits it. See ``plan``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``. A named backend runs or raises; ``"auto"``
            takes ``"triton"`` on CUDA devices where it can, else ``"torch"``.
        group: process group over which the vocabulary is sharded: ``linear_weight``, ``linear_bias``, ``weight`` and
            ``main_grad`` hold this rank's rows, consecutive in rank order, any number of them. ``input``, ``target``
            and all else are the same on every rank, and so is what comes back, bit for bit; gradients are this rank's
            rows, and the whole one of ``input``. One collective forward and one backward, in fp32; one more forward
            with ``weight``. All ranks must make the same call: if they do not, all raise.
        sequence_parallel: whether ``input`` too is sharded over ``group``: this rank's tokens, consecutive in rank
            order; ``target`` is that of all. One all-gather more forward, and a reduce-scatter backward. The hidden
            states of all ranks are kept for the backward pass unless ``workspace`` is too small; then they are gathered
            again.
        main_grad: fp32 [V, D], e.g. ``lm_head.weight.main_grad``: the weight's gradient is added there in the backward
            pass, without a tensor of its own, and ``linear_weight.grad`` stays as it is.
        adapter: hidden states [..., R] and weight [V, R] of a low-rank adapter of the head: their product is added to
            that of ``input`` and ``linear_weight``, before ``logit_scale``. Where ``linear_weight`` is frozen its
            gradient is not formed, in no part (under torch.compile it is); a copy of both weights side by side lives
            until the backward pass. In the dtype of ``linear_weight``.

    Returns:
        The loss: a scalar, or per token with 0 at ignored tokens; fp32, or fp64 for fp64 inputs. With nothing to count
        (no tokens, or all ignored) loss and gradients are 0.

    Raises:
        TypeError: an argument of the wrong type, or a tensor of the wrong kind of dtype.
        ValueError: shapes that do not fit, tensors on different devices, numbers out of bounds, unknown names, a target
            outside [0, V) on the CPU, a workspace too small (the message says the smallest that works), or ranks of a
            group that do not make the same call.
        RuntimeError: from a second differentiation.

    The method: arXiv 2511.17599, with the strategies and the sampled gradient of ``docs/design.md``.
    """
    tensors: dict[str, Any] = {
        "input": input,
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "weight": weight,
        "token_weight": token_weight,
        "main_grad": main_grad,
    }
    given = dtensors.Arguments(tensors, group, sequence_parallel).local()
    validation.check_group(given.group, given.sequence_parallel)
    input, linear_weight, target, linear_bias, weight, token_weight, main_grad = (given.tensors[n] for n in tensors)
    with sharding.meeting(given.group) as meeting:
        sampled = validation.check_gradient(gradient)
        head = _checked_head(given, softcap, logit_scale)
        validation.check_adapter(adapter, input, linear_weight, main_grad)
        operands = _Operands.of(input, linear_weight, adapter)
        validation.check_scan(sampled, (), sharded=given.group is not None)
        validation.check_reduction(reduction)
        validation.check_index("ignore_index", ignore_index)
        validation.check_number("label_smoothing", label_smoothing, least=0, most=1)
        validation.check_number("z_loss", z_loss, least=0)
        validation.check_normalizer(normalizer, reduction, input)
        if weight is not None:
            own = (linear_weight.shape[0],)
            validation.check_weighting("weight", weight, input, own, "one for each row of linear_weight")
        if token_weight is not None:
            validation.check_weighting("token_weight", token_weight, input, tuple(target.shape), "the shape of target")
        budget = validation.check_workspace(workspace)
        validation.check_backend(backend)
        call = _CallOptions(head, sampled, budget, backend, main_grad)
        layout = None
        if meeting is not None:
            layout = _meet(
                meeting,
                given,
                operands,
                call,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                normalizer="a tensor" if isinstance(normalizer, torch.Tensor) else normalizer,
            )
    vocabulary = linear_weight.shape[0] if layout is None else layout.vocabulary
    options = LossOptions(reduction, ignore_index, label_smoothing, z_loss)
    tokens = _Tokens.of(target, vocabulary, ignore_index)
    dtype = _statistics_dtype(_compute_dtype(operands.hidden, operands.weight))

    class_weight = None if weight is None else weight.to(dtype)
    row_weight = total = None
    if class_weight is not None and layout is not None:
        row_weight, total = layout.class_weights(class_weight, tokens.target)
    elif class_weight is not None:
        row_weight = class_weight[tokens.target]
    scale = tokens.counted.to(dtype)
    if reduction == "mean":
        scale = scale * _inverse_normalizer(normalizer, scale if row_weight is None else scale * row_weight)
    if token_weight is not None:
        scale = scale * tokens.packed(token_weight).to(dtype)
    smoothing: torch.Tensor | float | None = None
    if label_smoothing:
        smoothing = 1 / vocabulary if class_weight is None else class_weight / vocabulary
    mass: torch.Tensor | float = 1.0
    if isinstance(smoothing, torch.Tensor):
        mass = smoothing.sum() if total is None else total / vocabulary
    objective = LossObjective(options, scale, row_weight, mass)
    (loss,) = _evaluate(operands, linear_bias, tokens, objective, smoothing, call, layout)
    return loss if reduction != "none" else loss.view(target.shape)


def token_statistics(
    input: torch.Tensor,  # [..., D]
    linear_weight: torch.Tensor,  # [V, D]
    target: torch.Tensor,  # [...]
    *,
    outputs: Sequence[FloatOutput | IntegerOutput] = ("nll",),
    linear_bias: torch.Tensor | None = None,  # [V]
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: str | Sampled = "exact",
    workspace: int | str | None = None,
    backend: Backend = "auto",
    group: ProcessGroup | None = None,
    sequence_parallel: bool = False,
    main_grad: torch.Tensor | None = None,  # [V, D]
    adapter: Adapter | None = None,
) -> TokenStatistics:
    """Per-token statistics of a language model's head, without the logits, from one pass.

    For scoring, and for losses of your own: the floats are differentiable with any upstream gradients, all at the same
    time. What is not asked for is not computed.

    Args:
        input: hidden states [..., D], any strides; bf16, fp16, fp32 or fp64.
        linear_weight: [V, D].
        target: vocabulary indices [...], any integer dtype.
        outputs: which fields of ``TokenStatistics`` to fill.
        linear_bias: [V].
        ignore_index: tokens with this target cost nothing and get 0 (integers: -1).
        softcap: bound of the logits, or None.
        logit_scale: factor of the products.
        gradient: ``"exact"`` or ``Sampled(...)``; the statistics are exact either way.
        workspace: as in ``linear_cross_entropy``.
        backend: as in ``linear_cross_entropy``.
        group: as in ``linear_cross_entropy``; ``target_rank`` takes one collective more forward.
        sequence_parallel: as in ``linear_cross_entropy``.
        main_grad: as in ``linear_cross_entropy``.
        adapter: as in ``linear_cross_entropy``.

    Returns:
        The statistics, in the shape of ``target``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``linear_cross_entropy``.
    """
    tensors: dict[str, Any] = {
        "input": input,
        "linear_weight": linear_weight,
        "target": target,
        "linear_bias": linear_bias,
        "main_grad": main_grad,
    }
    given = dtensors.Arguments(tensors, group, sequence_parallel).local()
    validation.check_group(given.group, given.sequence_parallel)
    input, linear_weight, target, linear_bias, main_grad = (given.tensors[n] for n in tensors)
    with sharding.meeting(given.group) as meeting:
        sampled = validation.check_gradient(gradient)
        head = _checked_head(given, softcap, logit_scale)
        validation.check_adapter(adapter, input, linear_weight, main_grad)
        operands = _Operands.of(input, linear_weight, adapter)
        names = validation.check_outputs(outputs)
        validation.check_scan(sampled, names, sharded=given.group is not None)
        validation.check_index("ignore_index", ignore_index)
        budget = validation.check_workspace(workspace)
        validation.check_backend(backend)
        call = _CallOptions(head, sampled, budget, backend, main_grad)
        layout = None
        if meeting is not None:
            layout = _meet(meeting, given, operands, call, outputs=list(names), ignore_index=ignore_index)
    tokens = _Tokens.of(target, linear_weight.shape[0] if layout is None else layout.vocabulary, ignore_index)
    dtype = _statistics_dtype(_compute_dtype(operands.hidden, operands.weight))
    objective = StatisticsObjective(names, tokens.counted.to(dtype))
    values = _evaluate(operands, linear_bias, tokens, objective, None, call, layout)
    return TokenStatistics(**{name: value.view(target.shape) for name, value in zip(names, values, strict=True)})


def check_targets(
    target: torch.Tensor,  # [...]
    vocabulary: int,
    *,
    ignore_index: int = -100,
) -> None:
    """Raise if a target is out of range, with its place: what made a loss NaN on a GPU.

    A loss on the CPU checks its targets. On an accelerator that would stop the host, so a token whose target is out of
    range gets a loss of NaN, and gradients of NaN, instead; this function then says which token it was. It waits for
    the device.

    Args:
        target: vocabulary indices [...], any integer dtype, on any device.
        vocabulary: V, the rows of the head.
        ignore_index: target of tokens that do not count.

    Raises:
        ValueError: a target is neither in [0, vocabulary) nor ``ignore_index``; the message has the first one's place.
        TypeError: a target that does not hold integers.
    """
    validation.check_size("vocabulary", vocabulary, least=1)
    validation.check_index("ignore_index", ignore_index)
    validation.check_target_type(target)
    validation.check_targets_in_range(target.detach().reshape(-1).long(), vocabulary, ignore_index)


def count_tokens(
    target: torch.Tensor,  # [...]
    *,
    ignore_index: int = -100,
    weight: torch.Tensor | None = None,  # [V]
    group: ProcessGroup | None = None,
) -> torch.Tensor:
    """What a mean over several calls divides by: pass it as their ``normalizer``.

    For gradient accumulation, with the targets of all micro-batches; for data and context parallelism, with the ranks
    that have tokens of their own as ``group``. The sum of the calls' losses, and of their gradients, is then that of
    one call on all tokens. Where gradients are averaged over ranks afterwards, as by DistributedDataParallel and
    ``fully_shard``, divide by the number of ranks.

    Args:
        target: vocabulary indices [...], any integer dtype; not those of ranks of ``group`` with the same tokens.
        ignore_index: target of tokens that do not count.
        weight: class weights [V], if the loss has them; then their sum over tokens.
        group: of ranks whose counts are added up: one all-reduce.

    Returns:
        A 0-d fp32 tensor on the device of ``target``; nothing waits for it.

    Raises:
        TypeError: a target that does not hold integers.
    """
    validation.check_target_type(target)
    validation.check_index("ignore_index", ignore_index)
    flat = target.detach().reshape(-1).long()
    keep = flat != ignore_index
    counted = keep.float() if weight is None else torch.where(keep, weight.float()[torch.where(keep, flat, 0)], 0.0)
    total = counted.sum()
    if group is not None:
        validation.check_group(group, sequence_parallel=False)
        torch.distributed.all_reduce(total, group=group)
    return total


@dataclass(frozen=True)
class _Tokens:
    """The tokens that count.

    On the CPU those are picked out. On an accelerator that would stop the host, so all rows stay: ignored ones count 0,
    and those whose target is out of range count NaN, so that their loss and gradients are NaN.

    Attributes:
        target: [N] int64 indices in [0, V).
        rows: [N] positions among the caller's tokens, None for all.
        counted: [N] float: 1, 0 or NaN.
        mask: [N] bool tokens that are not ignored; None where all that are left count.
        total: how many tokens the caller gave.
    """

    target: torch.Tensor
    rows: torch.Tensor | None
    counted: torch.Tensor
    mask: torch.Tensor | None
    total: int

    @classmethod
    def of(cls, target: torch.Tensor, vocabulary: int, ignore_index: int) -> _Tokens:
        flat = target.detach().reshape(-1).long()
        keep = flat != ignore_index
        if flat.device.type == "cpu" and not torch.compiler.is_compiling():
            validation.check_targets_in_range(flat, vocabulary, ignore_index)
            rows = None if keep.all() else keep.nonzero()[:, 0]
            kept = flat if rows is None else flat[rows]
            return cls(kept, rows, torch.ones(kept.shape[0]), None, flat.shape[0])
        inside = (flat >= 0) & (flat < vocabulary)
        counted = keep.float().masked_fill(keep & ~inside, torch.nan)
        return cls(torch.where(keep & inside, flat, 0), None, counted, keep, flat.shape[0])

    def packed(self, values: torch.Tensor) -> torch.Tensor:
        """[...] values of all tokens -> [N] of those that count."""
        flat = values.reshape(-1)
        return flat if self.rows is None else flat[self.rows]


def _inverse_normalizer(normalizer: Normalizer, counted: torch.Tensor) -> torch.Tensor:
    """One over what a mean divides by; 0 where that is 0. 0-d, in the dtype of ``counted`` [N]."""
    if normalizer is None:
        total = counted.sum()
    elif isinstance(normalizer, torch.Tensor):
        total = normalizer.to(counted)
    else:  # written on the device: a copy from the host would wait
        total = torch.full((), normalizer, dtype=counted.dtype, device=counted.device)
    return torch.where(total == 0, 0, 1 / total)


def _compute_dtype(input: torch.Tensor, linear_weight: torch.Tensor) -> torch.dtype:
    """Dtype of the products' operands: autocast's where it is on, else the wider of the two."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64 and linear_weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(input.dtype, linear_weight.dtype)


def _statistics_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Operands:
    """What the products are of, adapter included.

    Attributes:
        hidden: [..., D], or [..., D + R].
        weight: [V, D], or [V, D + R].
        appended: [V, R] the last columns of ``weight``, where these alone have a gradient; else None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    appended: torch.Tensor | None = None

    @classmethod
    def of(cls, input: torch.Tensor, linear_weight: torch.Tensor, adapter: Adapter | None) -> _Operands:
        if adapter is None:
            return cls(input, linear_weight)
        low, appended = (part.to(of.dtype) for part, of in zip(adapter, (input, linear_weight), strict=True))
        hidden = torch.cat((input, low), -1)
        if linear_weight.requires_grad or not appended.requires_grad or torch.compiler.is_compiling():
            return cls(hidden, torch.cat((linear_weight, appended), 1))
        return cls(hidden, torch.cat((linear_weight, appended.detach()), 1), appended)

    @property
    def trained(self) -> torch.Tensor:
        """What the weight's gradient is of."""
        return self.weight if self.appended is None else self.appended


@dataclass(frozen=True)
class _CallOptions:
    """What says how a call is computed, checked.

    Attributes:
        head: scale and cap of the logits.
        sampled: the sampled gradient, None for the exact one.
        workspace: bytes, or None.
        backend: the name asked for.
        main_grad: where the weight's gradient is added, or None.
    """

    head: HeadOptions
    sampled: Sampled | None
    workspace: int | None
    backend: str
    main_grad: torch.Tensor | None


def _checked_head(given: dtensors.Arguments, softcap: float | None, logit_scale: float) -> HeadOptions:
    """Check what every call has; a shard may be empty, and its rows need not be those of the target."""
    tensors = given.tensors
    validation.check_head(
        tensors["input"],
        tensors["linear_weight"],
        tensors["target"],
        tensors["linear_bias"],
        least_vocabulary=1 if given.group is None else 0,
        sharded_rows=given.sequence_parallel,
    )
    if softcap is not None:
        validation.check_number("softcap", softcap, above=0)
    validation.check_number("logit_scale", logit_scale)
    main_grad, weight = tensors["main_grad"], tensors["linear_weight"]
    if main_grad is not None:
        validation.check_main_grad(main_grad, weight)
    return HeadOptions(logit_scale, softcap)


def _meet(
    meeting: sharding.Meeting,
    given: dtensors.Arguments,
    operands: _Operands,
    call: _CallOptions,
    **options: object,
) -> sharding.Layout:
    """Tell the other ranks what this call is, and hear who has what."""
    input, linear_weight, target = (given.tensors[name] for name in ("input", "linear_weight", "target"))
    linear_bias, sampled = given.tensors["linear_bias"], call.sampled
    others = {name: given.tensors.get(name) for name in ("linear_bias", "weight", "token_weight", "main_grad")}
    everyone = meeting.meet(
        {
            "vocabulary": linear_weight.shape[0],
            "rows": input.numel() // input.shape[-1],
            "shape of target": list(target.shape),
            "checksum of target": _checksum(target),
            "hidden size": operands.hidden.shape[-1],
            "dtype of input": str(input.dtype),
            "dtype of linear_weight": str(linear_weight.dtype),
            **{f"dtype of {name}": None if tensor is None else str(tensor.dtype) for name, tensor in others.items()},
            "compute dtype": str(_compute_dtype(operands.hidden, operands.weight)),
            "gradients of input, linear_weight, linear_bias": list(_wanted(operands, linear_bias)),
            "adapter alone trained": operands.appended is not None,
            "softcap": call.head.softcap,
            "logit_scale": call.head.logit_scale,
            "gradient": "exact" if sampled is None else f"Sampled(threshold={sampled.threshold})",
            "workspace": call.workspace,
            "backend": call.backend,
            "sequence_parallel": given.sequence_parallel,
            "strategy": str(schedules.forced()),
            **options,
        }
    )
    sizes, rows = (tuple(int(theirs[name]) for theirs in everyone) for name in ("vocabulary", "rows"))
    if sum(sizes) == 0:
        raise ValueError(f"linear_weight must have rows on some rank of group, got 0 on each of {len(sizes)}")
    if given.sequence_parallel and sum(rows) != target.numel():
        raise ValueError(
            f"target must hold the {sum(rows)} tokens whose hidden states the ranks of group have "
            f"({', '.join(map(str, rows))}), got {target.numel()}"
        )
    return sharding.Layout(
        group=meeting.group,
        rank=meeting.group.rank(),
        sizes=sizes,
        rows=rows if given.sequence_parallel else None,
        sums=given.sums_hidden,
    )


def _checksum(target: torch.Tensor) -> int | None:
    """Of the targets, where nobody has to wait for them."""
    return zlib.crc32(target.detach().contiguous().numpy().tobytes()) if target.device.type == "cpu" else None


def _wanted(operands: _Operands, linear_bias: torch.Tensor | None) -> tuple[bool, bool, bool]:
    """Whether the gradients of hidden states, weight and bias are wanted."""
    recording = torch.is_grad_enabled()
    return (
        recording and operands.hidden.requires_grad,
        recording and operands.trained.requires_grad,
        recording and linear_bias is not None and linear_bias.requires_grad,
    )


def _evaluate(
    operands: _Operands,
    linear_bias: torch.Tensor | None,
    tokens: _Tokens,
    objective: LossObjective | StatisticsObjective,
    smoothing: torch.Tensor | float | None,
    options: _CallOptions,
    layout: sharding.Layout | None,
) -> tuple[torch.Tensor, ...]:
    """Plan the call and make it."""
    hidden, weight = operands.hidden.reshape(-1, operands.hidden.shape[-1]), operands.weight
    wants = _wanted(operands, linear_bias)
    main_grad = options.main_grad if wants[1] else None
    sampled, head = options.sampled, options.head
    compute_dtype = _compute_dtype(hidden, weight)
    offsets = None
    if sampled is not None and any(wants):
        offsets = _offsets(tokens.target.shape[0], hidden.device, sampled.generator)
    threshold, scan = (None, "input") if sampled is None else (sampled.threshold, sampled.scan)
    if torch.compiler.is_compiling():
        if main_grad is not None:
            raise NotImplementedError("main_grad is not supported under torch.compile; call this loss outside of it")
        settings = compiled.Settings(
            options.backend, options.workspace, head, threshold, scan, compute_dtype, wants, schedules.forced()
        )  # fmt: skip
        return compiled.apply(
            hidden, weight, linear_bias, tokens.target, tokens.mask, objective, smoothing, offsets, settings
        )
    target, shard = tokens.target, None
    if layout is not None:
        target, has_target = layout.own(target)
        shard = sharding.Shard(layout, has_target)
    trained = operands.trained
    shape = Shape.of(
        hidden,
        weight,
        tokens.target.shape[0],
        compute_dtype=compute_dtype,
        hidden_gradient=wants[0],
        weight_gradient=wants[1],
        bias_gradient=wants[2],
        statistics=objective.statistics,
        biased=linear_bias is not None,
        softcapped=head.softcap is not None,
        threshold=threshold,
        scan=scan,
        compacted=tokens.rows is not None or not hidden.is_contiguous(),
        main_grad=main_grad is not None,
        functional=False,
        sharded=layout is not None,
        frozen_columns=weight.shape[1] - trained.shape[1],
    )
    plan = _plan(shape, objective.scalar, options, layout)
    call = operators.Call(
        shape=shape,
        plan=plan,
        target=target,
        rows=tokens.rows,
        total_rows=tokens.total,
        head=head,
        objective=objective,
        counted=tokens.mask,
        smoothing=smoothing,
        main_grad=main_grad,
        offsets=offsets,
        shard=shard,
        appended=None if operands.appended is None else trained.dtype,
        gathers_again=layout is not None and _gathers_again(shape, plan, layout, options.workspace),
    )
    return operators.apply(hidden, weight, linear_bias, call, operands.appended)


def _gathers_again(shape: Shape, plan: planning.Plan, layout: sharding.Layout, workspace: int | None) -> bool:
    """Whether the hidden states of all ranks do not fit the workspace beside what the plan holds."""
    if layout.rows is None or workspace is None:
        return False
    return plan.workspace + sum(layout.rows) * shape.hidden * shape.hidden_dtype.itemsize > workspace


def _plan(shape: Shape, scalar: bool, options: _CallOptions, layout: sharding.Layout | None) -> planning.Plan:
    """The plan of a call; of a shard's, all ranks learn if one cannot keep to the workspace that was asked for."""
    if layout is None:
        name = planning.choose_backend(options.backend, shape)
        return planning.choose(shape, name, scalar, options.workspace, schedules.forced())
    bounded = options.workspace is not None or schedules.forced() is not None or options.backend != "auto"
    with sharding.meeting(layout.group if bounded else None) as meeting:
        name = planning.choose_backend(options.backend, shape)
        widest = max(layout.sizes)
        plan = planning.choose_shard(shape, widest, name, scalar, options.workspace, schedules.forced())
        if meeting is not None:
            meeting.meet({})
    return plan


def _offsets(tokens: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """[N] float64 uniform in [0, 1), drawn where the generator lives; copying them makes nobody wait."""
    source = device if generator is None else generator.device
    pinned = source.type == "cpu" and device.type == "cuda"
    drawn = torch.rand(tokens, dtype=torch.float64, device=source, generator=generator, pin_memory=pinned)
    return drawn.to(device, non_blocking=True)
