"""From options and upstream gradients to per-row coefficients: the only place that knows what a loss is.

With ``lse = logsumexp(z)``, class weight ``w``, token weight ``t``, smoothing ``e``, class weights ``s_v`` (over V) and
``S = sum s_v``, the loss of a token is

    loss = t * ((1 - e) w_y (lse - z_y) + e (S lse - sum_v s_v z_v) + z_loss lse^2)

and with upstream gradient g its gradient has, in the form of ``Coefficients``,

    a = g t ((1 - e) w_y + e S + 2 z_loss lse),   b = 0,   c = g t (1 - e) w_y,   d = g t e.

The statistics of ``token_statistics`` with upstream gradients g (nll), l (logsumexp) and h (entropy) have

    a = g + l + h E[z],   b = -h,   c = g,   d = 0.

Every tensor here is [N], the rows that count.
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
        scale: [N] token weight, divided by the normaliser where the reduction is a mean.
        class_weight: [N] class weight of each row's target, or None for ones.
        smoothing_mass: S above; 0-d tensor or number.
    """

    options: LossOptions
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
        options, lse = self.options, statistics.logsumexp
        loss = lse - statistics.target_logit
        if self.class_weight is not None:
            loss = loss * self.class_weight
        if options.label_smoothing:
            assert statistics.smooth_logit is not None
            smooth = lse * self.smoothing_mass - statistics.smooth_logit
            loss = loss * (1 - options.label_smoothing) + smooth * options.label_smoothing
        if options.z_loss:
            loss = loss + options.z_loss * lse.square()
        return loss * self.scale

    def outputs(self, statistics: Statistics) -> tuple[torch.Tensor, ...]:
        """The reduced loss, or [N] losses."""
        loss = self.token_loss(statistics)
        return (loss.sum() if self.scalar else loss,)

    def coefficients(self, statistics: Statistics, upstream: tuple[torch.Tensor | None, ...]) -> Coefficients:
        """See the module."""
        (grad,) = upstream
        token = self.scale if grad is None else self.scale * grad.to(self.scale.dtype)
        return self._affine(token).at(statistics.logsumexp)

    def ahead(self) -> AffineCoefficients:
        """The coefficients for an upstream gradient of 1, before statistics are known."""
        return self._affine(self.scale)

    def _affine(self, token: torch.Tensor) -> AffineCoefficients:
        options = self.options
        target = token if self.class_weight is None else token * self.class_weight
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
        scale: [N] 1 for rows that count, 0 for those that do not, NaN for those with no valid target.
    """

    names: tuple[str, ...]
    scale: torch.Tensor

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What the outputs are made of."""
        wanted: set[Statistic] = set()
        if "entropy" in self.names:
            wanted.add("mean_logit")
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
        lse = statistics.logsumexp
        if name in INTEGER_OUTPUTS:
            value = statistics.prediction if name == "prediction" else statistics.target_rank
            assert value is not None
            return torch.where(self.scale == 0, -1, value)
        if name == "nll":
            return (lse - statistics.target_logit) * self.scale
        if name == "entropy":
            assert statistics.mean_logit is not None
            return (lse - statistics.mean_logit) * self.scale
        return lse * self.scale

    def coefficients(self, statistics: Statistics, upstream: tuple[torch.Tensor | None, ...]) -> Coefficients:
        """See the module."""
        given = {name: g * self.scale for name, g in zip(self.names, upstream, strict=True) if g is not None}
        zero = torch.zeros_like(statistics.logsumexp)
        c = given.get("nll", zero)
        a = c + given.get("logsumexp", zero)
        b = None
        if "entropy" in given:
            assert statistics.mean_logit is not None
            a = a + given["entropy"] * statistics.mean_logit
            b = -given["entropy"]
        return Coefficients(a=a, b=b, c=c, d=None)
