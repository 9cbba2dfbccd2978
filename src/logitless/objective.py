"""From options and upstream gradients to per-row coefficients: the only place that knows what a loss is.

With ``lse = logsumexp(z)``, class weight ``w``, token weight ``t``, smoothing ``e``, class weights ``s_v`` (over V) and
``S = sum s_v``, the loss of a token is

    loss = t * ((1 - e) w_y (lse - z_y) + e sum_v s_v (lse - z_v) + z_loss lse^2)

and with upstream gradient g its gradient has, in the form of ``Coefficients``,

    a = g t ((1 - e) w_y + e S + 2 z_loss lse),   b = 0,   c = g t (1 - e) w_y,   d = g t e.

The statistics of ``token_statistics`` with upstream gradients g (nll), l (logsumexp) and h (entropy) have

    a = g + l - h E[z0 - z],   b = -h,   c = g,   d = 0,

where z0 is the row's peak and E the softmax expectation, ``mean_gap``.

Every difference of logits is formed before it is rounded: ``lse - z`` is ``(peak - z) + log_sum`` (see ``Statistics``).
Tokens that do not count are selected away, whatever their weights and upstream gradients hold: 0 times NaN is NaN.

Every tensor here is [N]: the rows that count, and on devices where those cannot be picked out all rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from logitless.backends.contract import AffineCoefficients, Coefficients, Statistic, Statistics
from logitless.options import INTEGER_OUTPUTS, LossOptions


@dataclass(frozen=True)
class LossObjective:
    """The loss of ``linear_cross_entropy``.

    Attributes:
        options: the caller's.
        valid: [N] bool tokens that count, or None for all.
        scale: [N] token weight, divided by the normaliser where the reduction is a mean.
        class_weight: [N] class weight of each row's target, or None for ones.
        smoothing_mass: S above; 0-d tensor or number.
    """

    options: LossOptions
    valid: torch.Tensor | None
    scale: torch.Tensor
    class_weight: torch.Tensor | None
    smoothing_mass: torch.Tensor | float

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The weighted sum of logits, where labels are smoothed."""
        return frozenset({"smooth_logit"}) if self.options.label_smoothing else frozenset()

    @property
    def scalar(self) -> bool:
        """Whether the output is one number."""
        return self.options.reduction != "none"

    def token_loss(self, statistics: Statistics) -> torch.Tensor:
        """[N] scaled loss of each token."""
        options = self.options
        loss = negative_log_likelihood(statistics)
        if self.class_weight is not None:
            loss = loss * self.class_weight
        if options.label_smoothing:
            assert statistics.smooth_logit is not None
            smooth = statistics.log_sum * self.smoothing_mass - statistics.smooth_logit
            loss = loss * (1 - options.label_smoothing) + smooth * options.label_smoothing
        if options.z_loss:
            loss = loss + options.z_loss * statistics.logsumexp.square()
        return select(self.valid, loss * self.scale)

    def outputs(self, statistics: Statistics) -> tuple[torch.Tensor, ...]:
        """The reduced loss, or [N] losses."""
        loss = self.token_loss(statistics)
        return (loss.sum() if self.scalar else loss,)

    def coefficients(self, statistics: Statistics, upstream: tuple[torch.Tensor | None, ...]) -> Coefficients:
        """See the module."""
        (grad,) = upstream
        token = self.scale if grad is None else self.scale * grad.to(self.scale.dtype)
        return self._affine(token).at(statistics)

    def ahead(self) -> AffineCoefficients:
        """The coefficients for an upstream gradient of 1, before statistics are known."""
        return self._affine(self.scale)

    def _affine(self, token: torch.Tensor) -> AffineCoefficients:
        options, token = self.options, select(self.valid, token)
        target = token if self.class_weight is None else select(self.valid, token * self.class_weight)
        if not options.label_smoothing:
            a, c, d = target, target, None
        else:
            c, d = target * (1 - options.label_smoothing), token * options.label_smoothing
            a = c + d * self.smoothing_mass
        return AffineCoefficients(a=a, slope=token * (2 * options.z_loss) if options.z_loss else None, c=c, d=d)


@dataclass(frozen=True)
class StatisticsObjective:
    """The outputs of ``token_statistics``.

    Attributes:
        names: of the outputs, in the order asked for.
        valid: [N] bool tokens that count, or None for all.
        scale: [N] 1, and NaN for tokens whose target is out of range.
    """

    names: tuple[str, ...]
    valid: torch.Tensor | None
    scale: torch.Tensor

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What the outputs are made of."""
        wanted: set[Statistic] = set()
        if "entropy" in self.names:
            wanted.add("mean_gap")
        if "prediction" in self.names:
            wanted.add("prediction")
        if "target_rank" in self.names:
            wanted.add("target_rank")
        return frozenset(wanted)

    @property
    def scalar(self) -> bool:
        """Never: outputs are per token."""
        return False

    def outputs(self, statistics: Statistics) -> tuple[torch.Tensor, ...]:
        """[N] tensors."""
        return tuple(self._output(name, statistics) for name in self.names)

    def _output(self, name: str, statistics: Statistics) -> torch.Tensor:
        if name in INTEGER_OUTPUTS:
            value = statistics.prediction if name == "prediction" else statistics.target_rank
            assert value is not None
            return value if self.valid is None else torch.where(self.valid, value, -1)
        value = statistics.logsumexp
        if name == "nll":
            value = negative_log_likelihood(statistics)
        elif name == "entropy":
            assert statistics.mean_gap is not None
            value = statistics.log_sum + statistics.mean_gap
        return select(self.valid, value * self.scale)

    def coefficients(self, statistics: Statistics, upstream: tuple[torch.Tensor | None, ...]) -> Coefficients:
        """See the module."""
        given = {
            name: select(self.valid, grad * self.scale)
            for name, grad in zip(self.names, upstream, strict=True)
            if grad is not None
        }
        zero = torch.zeros_like(statistics.logsumexp)
        c = given.get("nll", zero)
        a = c + given.get("logsumexp", zero)
        b = None
        if "entropy" in given:
            assert statistics.mean_gap is not None
            b = -given["entropy"]
            a = a + select(self.valid, b * statistics.mean_gap)
        return Coefficients(a=a, b=b, c=c, d=None)


def negative_log_likelihood(statistics: Statistics) -> torch.Tensor:
    """[N] logsumexp less the target's logit."""
    return (statistics.peak - statistics.target_logit) + statistics.log_sum


def select(valid: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor:
    """[N] the values of tokens that count, and 0 for the others, whatever theirs are."""
    return values if valid is None else torch.where(valid, values, 0.0)
