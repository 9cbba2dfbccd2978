"""A call whose arguments are checked: which tokens count, products of what, what other ranks do; planned, and made.

Shapes: ``...`` any leading shape with N elements in all, D hidden, V vocabulary.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from logitless import compiled, dtensors, operators, planning, schedules, sharding, validation
from logitless.backends.contract import Shape
from logitless.objective import LossObjective, StatisticsObjective
from logitless.options import HeadOptions, Sampled

Normalizer = torch.Tensor | float | None
Adapter = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Tokens:
    """The tokens that count.

    On the CPU those are picked out. On an accelerator that would be a host-device synchronization, so all rows stay:
    ignored ones count 0, and those whose target is out of range count NaN, so that their loss and gradients are NaN.

    Attributes:
        target: [N] int64 indices in [0, V).
        rows: [N] positions among the caller's tokens, None for all.
        token_scale: [N] float: 1, 0 or NaN.
        valid_mask: [N] bool tokens that are not ignored; None where all that are left count.
        total: how many tokens the caller gave.
    """

    target: torch.Tensor
    rows: torch.Tensor | None
    token_scale: torch.Tensor
    valid_mask: torch.Tensor | None
    total: int

    @classmethod
    def of(cls, target: torch.Tensor, vocabulary: int, ignore_index: int) -> Tokens:
        flat = validation.indices(target, ignore_index)
        keep = flat != ignore_index
        if flat.device.type == "cpu" and not torch.compiler.is_compiling():
            validation.check_targets_in_range(target, vocabulary, ignore_index)
            rows = None if keep.all() else keep.nonzero()[:, 0]
            kept = flat if rows is None else flat[rows]
            if kept.is_inference() and torch.is_grad_enabled():
                kept = kept.clone()  # as autograd saves no tensor of inference mode, and generated tokens often are
            ones = torch.ones(kept.shape[0], dtype=torch.float32, device=kept.device)
            return cls(kept, rows, ones, None, flat.shape[0])
        inside = (flat >= 0) & (flat < vocabulary)
        token_scale = keep.float().masked_fill(keep & ~inside, torch.nan)
        return cls(torch.where(keep & inside, flat, 0), None, token_scale, keep, flat.shape[0])

    def packed(self, values: torch.Tensor) -> torch.Tensor:
        """[...] values of all tokens -> [N] of those that count."""
        flat = values.reshape(-1)
        return flat if self.rows is None else flat[self.rows]


def inverse_normalizer(normalizer: Normalizer, token_scale: torch.Tensor) -> torch.Tensor:
    """One over what a mean divides by; 0 where that is 0. 0-d, in the dtype of ``token_scale`` [N]."""
    if normalizer is None:
        total = token_scale.sum()
    elif isinstance(normalizer, torch.Tensor):
        total = normalizer.to(token_scale)
    else:  # made on the device: a copy from the host would wait; and by a product, which a graph has for any number
        total = token_scale.new_ones(()) * normalizer
    return torch.where(total == 0, 0, 1 / total)


def compute_dtype(input: torch.Tensor, linear_weight: torch.Tensor) -> torch.dtype:
    """Dtype of the products' operands: autocast's where it is on, else the wider of the two."""
    device = input.device.type
    if torch.is_autocast_enabled(device) and input.dtype != torch.float64 and linear_weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(input.dtype, linear_weight.dtype)


def statistics_dtype(operands: torch.dtype) -> torch.dtype:
    """Dtype of statistics and loss, by that of the products' operands."""
    return torch.float64 if operands == torch.float64 else torch.float32


@dataclass(frozen=True)
class Operands:
    """What the products are of, adapter included.

    Attributes:
        hidden: [..., D], or [..., D + R].
        weight: [V, D], or [V, D + R].
        compute_dtype: dtype in which they enter the products, decided once: ranks agree on it before they begin.
        appended: [V, R] the last columns of ``weight``, where these alone have a gradient; else None.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    compute_dtype: torch.dtype
    appended: torch.Tensor | None = None

    @classmethod
    def of(cls, input: torch.Tensor, linear_weight: torch.Tensor, adapter: Adapter | None) -> Operands:
        dtype = compute_dtype(input, linear_weight)
        if adapter is None:
            return cls(input, linear_weight, dtype)
        low, appended = adapter
        with torch.autocast(input.device.type, enabled=False):  # it takes over torch.cat, and knows one narrow dtype
            hidden = torch.cat((input, low.to(input.dtype)), -1)
            if linear_weight.requires_grad or not appended.requires_grad or torch.compiler.is_compiling():
                return cls(hidden, torch.cat((linear_weight, appended.to(linear_weight.dtype)), 1), dtype)
            columns = appended.detach().to(linear_weight.dtype)
            return cls(hidden, torch.cat((linear_weight, columns), 1), dtype, appended)

    @property
    def trained(self) -> torch.Tensor:
        """What the weight's gradient is of."""
        return self.weight if self.appended is None else self.appended


@dataclass(frozen=True)
class CallOptions:
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


def checked_head(given: dtensors.Arguments, softcap: float | None, logit_scale: float) -> HeadOptions:
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
    head = HeadOptions(validation.check_logit_scale(logit_scale), validation.check_softcap(softcap))
    main_grad, weight = tensors["main_grad"], tensors["linear_weight"]
    if main_grad is not None:
        validation.check_main_grad(main_grad, weight)
    return head


def check_ranks_agree(
    agreement: sharding.RankAgreement,
    given: dtensors.Arguments,
    operands: Operands,
    call: CallOptions,
    **options: object,
) -> sharding.Layout:
    """Tell the other ranks what this call is, and hear who has what."""
    input, linear_weight, target = (given.tensors[name] for name in ("input", "linear_weight", "target"))
    linear_bias, sampled = given.tensors["linear_bias"], call.sampled
    others = {name: given.tensors.get(name) for name in ("linear_bias", "weight", "token_weight", "main_grad")}
    everyone = agreement.exchange(
        {
            "vocabulary": linear_weight.shape[0],
            "rows": input.numel() // input.shape[-1],
            "shape of target": list(target.shape),
            "checksum of target": _checksum(target),
            "hidden size": operands.hidden.shape[-1],
            "dtype of input": str(input.dtype),
            "dtype of linear_weight": str(linear_weight.dtype),
            **{f"dtype of {name}": None if tensor is None else str(tensor.dtype) for name, tensor in others.items()},
            "autocast": _autocast_dtype(input.device),
            "compute dtype": str(operands.compute_dtype),
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
        group=agreement.group,
        rank=agreement.group.rank(),
        sizes=sizes,
        rows=rows if given.sequence_parallel else None,
    )


def _autocast_dtype(device: torch.device) -> str | None:
    """Of autocast on a device, None where it is off."""
    return str(torch.get_autocast_dtype(device.type)) if torch.is_autocast_enabled(device.type) else None


def _checksum(target: torch.Tensor) -> int | None:
    """Of the targets, where nobody has to wait for them."""
    return zlib.crc32(target.detach().long().contiguous().numpy().tobytes()) if target.device.type == "cpu" else None


def _wanted(operands: Operands, linear_bias: torch.Tensor | None) -> tuple[bool, bool, bool]:
    """Whether the gradients of hidden states, weight and bias are wanted."""
    recording = torch.is_grad_enabled()
    return (
        recording and operands.hidden.requires_grad,
        recording and operands.trained.requires_grad,
        recording and linear_bias is not None and linear_bias.requires_grad,
    )


def evaluate(
    operands: Operands,
    linear_bias: torch.Tensor | None,
    tokens: Tokens,
    objective: LossObjective | StatisticsObjective,
    smoothing: torch.Tensor | float | None,
    options: CallOptions,
    layout: sharding.Layout | None,
) -> tuple[torch.Tensor, ...]:
    """Plan the call and make it."""
    hidden, weight = operands.hidden, operands.weight
    if layout is not None or torch.compiler.is_compiling():
        hidden = hidden.reshape(-1, hidden.shape[-1])
    wants = _wanted(operands, linear_bias)
    main_grad = options.main_grad if wants[1] else None
    sampled, head = options.sampled, options.head
    dtype = operands.compute_dtype
    uniforms = None
    if sampled is not None and any(wants):
        uniforms = _uniforms(tokens.target.shape[0], hidden.device, sampled.generator)
    threshold, scan = (None, "input") if sampled is None else (sampled.threshold, sampled.scan)
    if torch.compiler.is_compiling():
        if main_grad is not None:
            raise NotImplementedError("main_grad is not supported under torch.compile; call this loss outside of it")
        settings = compiled.Settings(
            options.backend, options.workspace, head, threshold, scan, dtype, wants, schedules.forced()
        )  # fmt: skip
        return compiled.apply(
            hidden, weight, linear_bias, tokens.target, tokens.valid_mask, objective, smoothing, uniforms, settings
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
        compute_dtype=dtype,
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
    plan, regather_in_backward = _plan(shape, objective.scalar, options, layout)
    call = operators.Call(
        shape=shape,
        plan=plan,
        rows=tokens.rows,
        total_rows=tokens.total,
        head=head,
        objective=objective,
        valid_mask=tokens.valid_mask,
        smoothing=smoothing,
        main_grad=main_grad,
        uniforms=uniforms,
        shard=shard,
        appended=None if operands.appended is None else trained.dtype,
        regather_in_backward=regather_in_backward,
    )
    return operators.apply(hidden, weight, linear_bias, target, call, operands.appended)


def _plan(
    shape: Shape, scalar: bool, options: CallOptions, layout: sharding.Layout | None
) -> tuple[planning.Plan, bool]:
    """The plan of a call, and whether hidden states that are sharded are gathered again for the backward pass.

    Of a shard's, all ranks learn if one cannot keep to the workspace that was asked for, or has no room for the hidden
    states of all: a collective is called by all of them.
    """
    if layout is None:
        name = planning.choose_backend(options.backend, shape)
        return planning.choose(shape, name, scalar, options.workspace, schedules.forced()), False
    bounded = options.workspace is not None or schedules.forced() is not None or options.backend != "auto"
    with sharding.rank_agreement(layout.group if bounded else None) as agreement:
        name = planning.choose_backend(options.backend, shape)
        widest = max(layout.sizes)
        plan = planning.choose_shard(shape, widest, name, scalar, options.workspace, schedules.forced())
        if agreement is None:
            return plan, False
        no_room = _no_room(shape, plan, layout, options.workspace)
        everyone = agreement.exchange({"has no room for all rows": no_room})
    return plan, any(theirs["has no room for all rows"] for theirs in everyone)


def _no_room(shape: Shape, plan: planning.Plan, layout: sharding.Layout, workspace: int | None) -> bool:
    """Whether the hidden states of all ranks do not fit the workspace beside what the plan holds."""
    if layout.rows is None or workspace is None:
        return False
    return plan.workspace + sum(layout.rows) * shape.hidden * shape.hidden_dtype.itemsize > workspace


def _uniforms(tokens: int, device: torch.device, generator: torch.Generator | None) -> torch.Tensor:
    """[N] float64 uniform in [0, 1), drawn where the generator lives; copying them waits for nothing."""
    if generator is None:
        return torch.rand(tokens, dtype=torch.float64, device=device)
    source = generator.device
    pinned = source.type == "cpu" and device.type == "cuda"
    drawn = torch.rand(tokens, dtype=torch.float64, device=source, generator=generator, pin_memory=pinned)
    return drawn.to(device, non_blocking=True)
