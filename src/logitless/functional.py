"""``linear_cross_entropy`` and ``token_statistics``: arguments in, the operator's call out.

Shapes: ``...`` any leading shape with N elements in all, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.distributed import ProcessGroup

from logitless import dtensors, sharding, validation
from logitless.arguments import check_size
from logitless.calls import (
    Adapter,
    CallOptions,
    Normalizer,
    Operands,
    Tokens,
    check_ranks_agree,
    checked_head,
    evaluate,
    inverse_normalizer,
    statistics_dtype,
)
from logitless.objective import LossObjective, StatisticsObjective, select
from logitless.options import Backend, FloatOutput, IntegerOutput, LossOptions, Reduction, Sampled
from logitless.transforms import not_scriptable


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


@not_scriptable
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
        ignore_index: tokens with this target cost nothing and count for nothing. Any integer of 64 bits, also one in
            [0, V).
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
            fits it. In text KiB, MiB, GiB, TiB and the letters K, M, G, T alone are powers of 1024, and KB, MB, GB, TB
            powers of 1000. See ``plan``.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``. A named backend runs or raises; ``"auto"``
            takes ``"triton"`` on CUDA devices where it can, else ``"torch"``.
        group: process group over which the vocabulary is sharded: ``linear_weight``, ``linear_bias``, ``weight`` and
            ``main_grad`` hold this rank's rows, consecutive in rank order, any number of them. ``input``, ``target``
            and all else are the same on every rank, and so is what comes back, bit for bit; gradients are this rank's
            rows, and the whole one of ``input``. One collective forward and one backward, in fp32; one more forward
            with ``weight``. All ranks must make the same call: if they do not, all raise.
        sequence_parallel: whether ``input`` too is sharded over ``group``, along its first dimension, consecutive in
            rank order; ``target`` is that of all. One all-gather more forward, and a reduce-scatter backward. The
            hidden states of all ranks are kept for the backward pass unless ``workspace`` is too small; then they are
            gathered again.
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
        ValueError: shapes that do not fit, tensors on different devices, numbers out of bounds or beyond those of fp32,
            unknown names, a target outside [0, V) on the CPU, a workspace too small (the message says the smallest that
            works), a mean without ``normalizer`` where DTensors shard the tokens, or ranks of a group that do not make
            the same call.
        NotImplementedError: within a transform of ``torch.func``, with forward-mode differentiation, in TorchScript.
        RuntimeError: from a second differentiation; from a backward pass that reads a tensor written to since the
            forward pass, as PyTorch raises; after the group's time limit, where a rank makes no such call.

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
    adapter = given.moved(adapter)
    input, linear_weight, target, linear_bias, weight, token_weight, main_grad = (given.tensors[n] for n in tensors)
    with sharding.rank_agreement(given.group) as agreement:
        sampled = validation.check_gradient(gradient)
        head = checked_head(given, softcap, logit_scale)
        validation.check_adapter(adapter, input, linear_weight, main_grad)
        operands = Operands.of(input, linear_weight, adapter)
        validation.check_scan(sampled, (), sharded=given.group is not None)
        options = LossOptions(
            reduction=validation.check_reduction(reduction),
            ignore_index=validation.check_ignore_index(ignore_index),
            label_smoothing=validation.check_label_smoothing(label_smoothing),
            z_loss=validation.check_z_loss(z_loss),
        )
        normalizer = validation.check_normalizer(normalizer, reduction, input, tokens_sharded=given.tokens_sharded)
        if weight is not None:
            own = (linear_weight.shape[0],)
            validation.check_weighting("weight", weight, input, own, "one for each row of linear_weight")
        if token_weight is not None:
            validation.check_weighting("token_weight", token_weight, input, tuple(target.shape), "the shape of target")
        budget = validation.check_workspace(workspace)
        call = CallOptions(head, sampled, budget, validation.check_backend(backend), main_grad)
        layout = None
        if agreement is not None:
            layout = check_ranks_agree(
                agreement,
                given,
                operands,
                call,
                **asdict(options),
                normalizer="a tensor" if isinstance(normalizer, torch.Tensor) else normalizer,
            )
    vocabulary = linear_weight.shape[0] if layout is None else layout.vocabulary
    tokens = Tokens.of(target, vocabulary, options.ignore_index)
    dtype = statistics_dtype(operands.compute_dtype)

    class_weight = None if weight is None else weight.to(dtype)
    row_weight = total = None
    if class_weight is not None and layout is not None:
        row_weight, total = layout.class_weights(class_weight, tokens.target)
    elif class_weight is not None:
        row_weight = class_weight[tokens.target]
    scale = tokens.token_scale.to(dtype)
    if options.reduction == "mean":
        weights = scale if row_weight is None else select(tokens.valid_mask, scale * row_weight)
        scale = scale * inverse_normalizer(normalizer, weights)
    if token_weight is not None:
        scale = scale * tokens.packed(token_weight).to(dtype)
    smoothing: torch.Tensor | float | None = None
    if options.label_smoothing:
        smoothing = 1 / vocabulary if class_weight is None else class_weight / vocabulary
    mass: torch.Tensor | float = 1.0
    if isinstance(smoothing, torch.Tensor):
        mass = smoothing.sum() if total is None else total / vocabulary
    objective = LossObjective(options, tokens.valid_mask, scale, row_weight, mass)
    (loss,) = evaluate(operands, linear_bias, tokens, objective, smoothing, call, layout)
    return loss if objective.scalar else given.moved_back(loss.view(target.shape))


@not_scriptable
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
        TypeError, ValueError, NotImplementedError, RuntimeError: as ``linear_cross_entropy``.
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
    adapter = given.moved(adapter)
    input, linear_weight, target, linear_bias, main_grad = (given.tensors[n] for n in tensors)
    with sharding.rank_agreement(given.group) as agreement:
        sampled = validation.check_gradient(gradient)
        head = checked_head(given, softcap, logit_scale)
        validation.check_adapter(adapter, input, linear_weight, main_grad)
        operands = Operands.of(input, linear_weight, adapter)
        names = validation.check_outputs(outputs)
        validation.check_scan(sampled, names, sharded=given.group is not None)
        ignore_index = validation.check_ignore_index(ignore_index)
        budget = validation.check_workspace(workspace)
        call = CallOptions(head, sampled, budget, validation.check_backend(backend), main_grad)
        layout = None
        if agreement is not None:
            layout = check_ranks_agree(agreement, given, operands, call, outputs=list(names), ignore_index=ignore_index)
    tokens = Tokens.of(target, linear_weight.shape[0] if layout is None else layout.vocabulary, ignore_index)
    dtype = statistics_dtype(operands.compute_dtype)
    objective = StatisticsObjective(names, tokens.valid_mask, tokens.token_scale.to(dtype))
    values = evaluate(operands, linear_bias, tokens, objective, None, call, layout)
    shaped = (given.moved_back(value.view(target.shape)) for value in values)
    return TokenStatistics(**dict(zip(names, shaped, strict=True)))


def check_targets(
    target: torch.Tensor,  # [...]
    vocabulary: int,
    *,
    ignore_index: int = -100,
) -> None:
    """Raise if a target is out of range, with its place: what made a loss NaN on a GPU.

    A loss on the CPU checks its targets. On an accelerator that would be a host-device synchronization, so a token
    whose target is out of range gets a NaN loss, and gradients of NaN. This function then says which it was. It waits
    for the device of the targets.

    Args:
        target: vocabulary indices [...], any integer dtype, on any device.
        vocabulary: V, the rows of the head.
        ignore_index: target of tokens that do not count.

    Raises:
        ValueError: a target is neither in [0, vocabulary) nor ``ignore_index``; the message has the first one's place.
        TypeError: a target that does not hold integers.
    """
    vocabulary = check_size("vocabulary", vocabulary, least=1)
    ignore_index = validation.check_ignore_index(ignore_index)
    validation.check_targets_in_range(validation.check_target_type(target), vocabulary, ignore_index)


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
        A 0-d fp32 tensor on the device of ``target``; nothing waits for it. NaN where a target has no class weight.

    Raises:
        TypeError: a target that does not hold integers, class weights that are no floating tensor, or a DTensor.
        ValueError: class weights of another shape than [V], or on another device.
    """
    if dtensors.is_dtensor(target) or dtensors.is_dtensor(weight):
        raise TypeError(
            "target and weight must be plain tensors, got a DTensor; pass its to_local(), and its mesh's group"
        )
    ignore_index = validation.check_ignore_index(ignore_index)
    validation.check_group(group, sequence_parallel=False)
    flat = validation.indices(validation.check_target_type(target), ignore_index)
    keep = flat != ignore_index
    token_scale = keep.float()
    if weight is not None:
        known = validation.check_class_weight(weight).float()
        validation.check_same_device("weight", known, "target", target)
        inside = (flat >= 0) & (flat < known.shape[0])
        padded = torch.cat((known, known.new_full((1,), torch.nan)))
        token_scale = padded[torch.where(inside, flat, known.shape[0])].masked_fill(~keep, 0.0)
    total = token_scale.sum()
    if group is not None:
        torch.distributed.all_reduce(total, group=group)
    return total
