"""``sampling_report``: the noise of the sampled gradient on a user's own batch, beside that of the batch itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from logitless import validation
from logitless.arguments import check_size
from logitless.functional import linear_cross_entropy
from logitless.options import BLOCK, Backend, Sampled
from logitless.sampling import block_count, block_sums, mix_in_smoothing, most_sampled

# Bytes of fp32 logits that are looked at in one go.
LOOKED_AT = 64 << 20


@dataclass(frozen=True)
class GradientNoise:
    """Errors of sampled gradients of one tensor, as root mean squares relative to the norm of the exact gradient.

    Attributes:
        one_draw: of one sampled gradient.
        mean: of the mean of all draws; of an unbiased gradient ``one_draw / sqrt(draws)``, up to chance.
        minibatch: of the exact gradient itself, as an estimate from this many tokens: half the distance of the
            gradients of two random halves. None for hidden states, which each token has of its own.
    """

    one_draw: float
    mean: float
    minibatch: float | None

    @property
    def added(self) -> float | None:
        """By how much sampling increases the variance of a minibatch's gradient: 0.01 is 1 %."""
        if self.minibatch is None or self.minibatch == 0:
            return None
        return (self.one_draw / self.minibatch) ** 2


@dataclass(frozen=True)
class LossError:
    """Errors of the losses of single tokens, in nats, where a scan in fewer bits makes the loss an estimate.

    Attributes:
        rms: root mean square of the estimate's error, over tokens and draws.
        bias: mean of the estimate's error.
        rounded_rms: root mean square of the error that comes of logits rounded to the dtype of the inputs, as those of
            the two-stage pipeline are.
        rounded_bias: mean of that error.
    """

    rms: float
    bias: float
    rounded_rms: float
    rounded_bias: float


@dataclass(frozen=True)
class SamplingReport:
    """What ``sampling_report`` measured; ``print`` it.

    Attributes:
        threshold: of the sampled gradient.
        tokens: that count.
        blocks: of the vocabulary.
        bound: most blocks that are computed for a token, its target's included.
        kept: mean over tokens of the blocks expected to be computed, the target's included.
        kept_most: most that are expected for one token.
        certain_mass: mean over tokens of the softmax mass in blocks that are always kept.
        draws: sampled gradients that were compared with the exact one.
        noise: by tensor: ``"input"``, ``"linear_weight"``, ``"linear_bias"``, as far as they are there.
        loss: errors of the tokens' negative log-likelihoods; None where these are exact.
    """

    threshold: float
    tokens: int
    blocks: int
    bound: int
    kept: float
    kept_most: float
    certain_mass: float
    draws: int
    noise: dict[str, GradientNoise]
    loss: LossError | None

    def __str__(self) -> str:
        lines = [
            f"sampled gradient, threshold {self.threshold:.4g}: {self.tokens:,} tokens, {self.blocks:,} blocks of "
            f"{BLOCK} vocabulary entries",
            f"  blocks computed a token: {self.kept:.1f} on average, {self.kept_most:.1f} at most expected, bound "
            f"{self.bound}",
            f"  softmax mass in blocks that are always kept: {self.certain_mass:.0%}",
            f"  gradient of    one draw   mean of {self.draws:<4d} minibatch   variance added",
        ]
        for name, noise in self.noise.items():
            own = f"{noise.minibatch:>9.2g}" if noise.minibatch is not None else " " * 9
            added = f"{noise.added:>15.2%}" if noise.added is not None else ""
            lines.append(f"  {name:<14} {noise.one_draw:>8.2g} {noise.mean:>12.2g} {own} {added}".rstrip())
        lines.append("  errors relative to the exact gradient; minibatch: that gradient's own error as an estimate")
        if self.loss is not None:
            lines.append(
                f"  loss of a token: error {self.loss.rms:.2g} rms, {self.loss.bias:+.1g} on average; "
                f"with rounded logits {self.loss.rounded_rms:.2g} rms, {self.loss.rounded_bias:+.1g} on average"
            )
        return "\n".join(lines)


def sampling_report(
    input: torch.Tensor,  # [..., D]
    linear_weight: torch.Tensor,  # [V, D]
    target: torch.Tensor,  # [...]
    *,
    linear_bias: torch.Tensor | None = None,  # [V]
    weight: torch.Tensor | None = None,  # [V]
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    token_weight: torch.Tensor | None = None,  # [...]
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    gradient: Sampled | None = None,
    draws: int = 8,
    workspace: int | str | None = None,
    backend: Backend = "auto",
) -> SamplingReport:
    """Measure the sampled gradient against the exact one, on one batch of a model's own hidden states.

    Says how many vocabulary blocks the backward pass would compute, how far a sampled gradient lies from the exact one,
    that the mean of several lies nearer as it must, and how all that compares with the noise which the gradient of a
    minibatch has anyway. Costs the exact gradient three times, the sampled one ``draws`` times, and one product of the
    logits in fp32, 64 MiB at a time; with a scan in fewer bits also the exact loss of inputs and weight copied to fp32.
    Nothing of it is recorded by autograd. The method: ``docs/design.md``.

    Args:
        input: hidden states [..., D], as in ``linear_cross_entropy``.
        linear_weight: [V, D].
        target: vocabulary indices [...]; more than one that counts.
        linear_bias: [V].
        weight: class weights [V].
        ignore_index: tokens with this target are left out.
        label_smoothing: in [0, 1].
        token_weight: [...] of the tokens' losses.
        z_loss: coefficient of the squared logsumexp.
        softcap: bound of the logits, or None.
        logit_scale: factor of the products.
        gradient: what to measure, by default ``Sampled()``. Its generator is drawn from.
        draws: sampled gradients to draw; at least 2.
        workspace: as in ``linear_cross_entropy``.
        backend: as in ``linear_cross_entropy``.

    Returns:
        The report. Errors are relative root mean squares, without unit.

    Raises:
        TypeError, ValueError: as ``linear_cross_entropy``, and for a target out of range on any device; for fewer than
            two draws; or for fewer than two tokens that count, of which no halves can be compared.
    """
    sampled = Sampled() if gradient is None else gradient
    if not isinstance(sampled, Sampled):
        raise TypeError(f"gradient must be a logitless.Sampled or None, got {type(gradient).__name__}")
    draws = check_size("draws", draws, least=2)
    validation.check_head(input, linear_weight, target, linear_bias)
    ignore_index = validation.check_ignore_index(ignore_index)
    softcap, logit_scale = validation.check_softcap(softcap), validation.check_logit_scale(logit_scale)
    label_smoothing = validation.check_label_smoothing(label_smoothing)
    validation.check_targets_in_range(target, linear_weight.shape[0], ignore_index)
    target = validation.indices(target, ignore_index).view(target.shape)  # few operations know unsigned targets
    with torch.no_grad():
        valid = (target != ignore_index).reshape(-1).nonzero()[:, 0]
    if len(valid) < 2:
        raise ValueError(f"target must hold at least two tokens that count, got {len(valid)}; give a larger batch")
    leaves = {"input": input, "linear_weight": linear_weight, "linear_bias": linear_bias}
    leaves = {name: leaf.detach().requires_grad_() for name, leaf in leaves.items() if leaf is not None}
    loss = partial(
        linear_cross_entropy,
        **leaves,
        weight=weight,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        token_weight=token_weight,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        workspace=workspace,
        backend=backend,
    )
    noise = _noise(loss, leaves, target, valid, ignore_index, sampled, draws)  # first: it checks the other arguments
    logits = partial(_logits, leaves, softcap=softcap, logit_scale=logit_scale)
    at_a_time = max(1, LOOKED_AT // (4 * linear_weight.shape[0]))
    smoothing = None
    if label_smoothing and softcap is not None:  # blocks are kept by a mixture then
        smoothing = 1.0 if weight is None else weight
    kept, certain = _kept_blocks(input, target, valid, sampled.threshold, smoothing, at_a_time, logits)
    loss_error = None
    if sampled.scan != "input":
        likelihood = partial(
            linear_cross_entropy,
            **leaves,
            target=target,
            reduction="none",
            ignore_index=ignore_index,
            softcap=softcap,
            logit_scale=logit_scale,
            workspace=workspace,
            backend=backend,
        )
        rounded = _losses_with_logits(input, target, valid, at_a_time, logits)
        wide = {name: torch.promote_types(leaf.dtype, torch.float32) for name, leaf in leaves.items()}
        with torch.no_grad():  # on a CPU products of bf16 are rounded to it
            exact = likelihood(**{name: leaf.to(wide[name]) for name, leaf in leaves.items()}).reshape(-1)[valid]
        loss_error = _loss_error(likelihood, exact, rounded, valid, sampled, draws)
    return SamplingReport(
        threshold=sampled.threshold,
        tokens=len(valid),
        blocks=block_count(linear_weight.shape[0]),
        bound=min(block_count(linear_weight.shape[0]), most_sampled(linear_weight.shape[0], sampled.threshold) + 1),
        kept=kept.mean().item(),
        kept_most=kept.max().item(),
        certain_mass=certain.mean().item(),
        draws=draws,
        noise=noise,
        loss=loss_error,
    )


def _noise(
    loss: Callable[..., torch.Tensor],
    leaves: dict[str, torch.Tensor],
    target: torch.Tensor,
    valid: torch.Tensor,
    ignore_index: int,
    sampled: Sampled,
    draws: int,
) -> dict[str, GradientNoise]:
    def gradients(target: torch.Tensor, gradient: str | Sampled) -> dict[str, torch.Tensor]:
        with torch.enable_grad():
            values = torch.autograd.grad(loss(target=target, gradient=gradient), list(leaves.values()))
        return {name: value.float() for name, value in zip(leaves, values, strict=True)}

    exact = gradients(target, "exact")
    sums = {name: torch.zeros_like(value) for name, value in exact.items()}
    squares = dict.fromkeys(exact, 0.0)
    for _ in range(draws):
        for name, value in gradients(target, sampled).items():
            sums[name] += value
            squares[name] += (value - exact[name]).square().sum().item()
    generator = torch.Generator("cpu").manual_seed(0)
    order = valid[torch.randperm(len(valid), generator=generator, device="cpu").to(valid.device)]
    half = {}
    for name, some in (("first", order[: len(order) // 2]), ("second", order[len(order) // 2 :])):
        alone = torch.full_like(target.reshape(-1), ignore_index)
        alone[some] = target.reshape(-1)[some]
        half[name] = gradients(alone.view(target.shape), "exact")
    result = {}
    for name, value in exact.items():
        size = max(value.norm().item(), torch.finfo(torch.float32).tiny)
        between = (half["first"][name] - half["second"][name]).norm().item() / 2 / size
        result[name] = GradientNoise(
            one_draw=(squares[name] / draws) ** 0.5 / size,
            mean=(sums[name] / draws - value).norm().item() / size,
            minibatch=None if name == "input" else between,
        )
    return result


def _loss_error(
    likelihood: Callable[..., torch.Tensor],
    exact: torch.Tensor,  # [N]
    rounded: torch.Tensor,  # [N]
    valid: torch.Tensor,
    sampled: Sampled,
    draws: int,
) -> LossError:
    with torch.enable_grad():  # where no gradient is wanted nothing is estimated
        estimates = [likelihood(gradient=sampled).detach().reshape(-1)[valid] for _ in range(draws)]
    error, rounding = torch.stack(estimates) - exact, rounded - exact
    return LossError(
        rms=error.square().mean().sqrt().item(),
        bias=error.mean().item(),
        rounded_rms=rounding.square().mean().sqrt().item(),
        rounded_bias=rounding.mean().item(),
    )


@torch.no_grad()
def _losses_with_logits(
    input: torch.Tensor,
    target: torch.Tensor,
    valid: torch.Tensor,
    step: int,
    logits: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """[N] of the tokens that count, ``step`` at a time."""
    hidden, targets = input.reshape(-1, input.shape[-1])[valid], target.reshape(-1)[valid]
    parts = zip(hidden.split(step), targets.split(step), strict=True)
    return torch.cat([F.cross_entropy(logits(rows), at.long(), reduction="none") for rows, at in parts])


def _logits(
    leaves: dict[str, torch.Tensor],
    rows: torch.Tensor,  # [R, D]
    *,
    softcap: float | None,
    logit_scale: float,
) -> torch.Tensor:
    """[R, V] in fp32."""
    weight = leaves["linear_weight"].detach()
    dtype = torch.promote_types(rows.dtype, weight.dtype)
    scores = (rows.to(dtype) @ weight.to(dtype).T).float() * logit_scale
    if "linear_bias" in leaves:
        scores += leaves["linear_bias"].detach()
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


@torch.no_grad()
def _kept_blocks(
    input: torch.Tensor,
    target: torch.Tensor,
    valid: torch.Tensor,
    threshold: float,
    smoothing: torch.Tensor | float | None,
    step: int,
    logits: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] expected blocks of each token that counts, and [N] its mass in blocks that are always kept.

    ``step`` tokens at a time.
    """
    hidden, targets = input.reshape(-1, input.shape[-1])[valid], target.reshape(-1)[valid]
    kept, certain = [], []
    for rows, at in zip(hidden.split(step), targets.split(step), strict=True):
        scores = logits(rows)
        mass = block_sums(scores.softmax(1))
        chosen_by = mass if smoothing is None else mix_in_smoothing(mass, smoothing, scores.shape[1])
        probability = (chosen_by / threshold).clamp(max=1)
        certain.append((mass * (probability == 1)).sum(1))
        probability.scatter_(1, (at.long() // BLOCK)[:, None], 1.0)
        kept.append(probability.sum(1))
    return torch.cat(kept), torch.cat(certain)
