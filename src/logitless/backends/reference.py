"""The specification: full logits and plain operations, in fp32 or fp64. Every other backend is held against it.

With ``k_v = (z_v / cap)^2`` (0 without a cap) and ``r_v`` the weight of v's block (1 for the exact gradient), the
gradient of a row's capped logits, scale apart, is

    dz_v = r_v (1 - k_v) p_v (a + b (z_v - z0)) - (1 - k_v) c [v = target] - (1 - r_v k_v) d s_v

which for r = 1 is the form of ``Coefficients`` times the chain factor of the cap. Memory is that of the
two-stage pipeline and more; of the schedule, only whether the gradient is sampled matters.

A scan in fewer bits knows logits y instead of z. Blocks are kept by their mass under y, and what is known of them in
full corrects its sums, as a control variate does:

    Z = Z_y + sum_b r_b (sum_{v in b} e^{z_v} - sum_{v in b} e^{y_v})      E[Z] = sum_v e^{z_v}

but never below what the listed blocks alone hold; logsumexp is log Z.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from logitless.backends.contract import (
    AffineCoefficients,
    Coefficients,
    Gradients,
    Problem,
    Schedule,
    Shape,
    Statistics,
    TensorForm,
)
from logitless.fp8 import left_operand, mean_row, outlier_channels, right_operand
from logitless.options import BLOCK
from logitless.sampling import block_sums, inclusion_weights, mix_in_smoothing

READS_MATRIX = False


def unsupported(shape: Shape) -> str | None:
    """None: it serves every problem."""
    del shape
    return None


def workspace(shape: Shape, schedule: Schedule) -> int:
    """Twelve tensors of logits' size, and the operands in the statistics dtype, bound what a pass holds."""
    del schedule
    n, d, v = shape.tokens, shape.hidden, shape.vocabulary
    return shape.statistics_dtype.itemsize * (12 * n * v + 4 * n * d + 4 * v * d) + 256 * (n + v)


def window_multiple(shape: Shape) -> int:
    """It has no windows."""
    del shape
    return 1


def cost(shape: Shape, schedule: Schedule) -> float | None:
    """None: the planner's order of preference decides."""
    del shape, schedule


def saved_forms(shape: Shape, schedule: Schedule) -> list[TensorForm]:
    """Nothing is left."""
    del shape, schedule
    return []


def recomputed(problem: Problem, schedule: Schedule) -> tuple[torch.Tensor, ...]:
    """Nothing."""
    del problem, schedule
    return ()


def _operands(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and weight as they enter the products: rounded to the compute dtype, held wider."""
    shape = problem.shape
    return (
        problem.hidden_rows(slice(0, shape.tokens)).to(shape.compute_dtype).to(shape.statistics_dtype),
        problem.weight.to(shape.compute_dtype).to(shape.statistics_dtype),
    )


def _logits(problem: Problem) -> torch.Tensor:
    """[N, V] logits after scale, bias and cap."""
    hidden, weight = _operands(problem)
    return _after_product(problem, hidden @ weight.T)


def _scanned_logits(problem: Problem) -> torch.Tensor:
    """[N, V] the logits that the scan knows."""
    if not problem.shape.estimated:
        return _logits(problem)
    hidden, weight = _operands(problem)
    channels, mean = outlier_channels(hidden), mean_row(weight)
    return _after_product(problem, left_operand(hidden, channels, mean) @ right_operand(weight, channels, mean).T)


def _after_product(problem: Problem, products: torch.Tensor) -> torch.Tensor:
    z = problem.head.logit_scale * products
    if problem.bias is not None:
        z = z + problem.bias.to(z.dtype)
    if problem.head.softcap is not None:
        z = problem.head.softcap * torch.tanh(z / problem.head.softcap)
    return z


def forward(problem: Problem, schedule: Schedule, ahead: AffineCoefficients | None) -> Statistics:
    """Statistics from full logits."""
    del ahead
    z = _logits(problem)
    if schedule.strategy == "sampled" and problem.shape.estimated:
        return _estimated(problem, z)
    wanted = problem.shape.statistics
    target_logit = z.gather(1, problem.target[:, None])
    peak, log_sum = _log_sum_exp(z)
    above = target_logit if problem.rank_above is None else problem.rank_above[:, None]
    mean_gap = None
    if "mean_gap" in wanted:
        below = z - peak[:, None]
        mean_gap = -_weighted((below - log_sum[:, None]).exp(), below).sum(1)
    return Statistics(
        peak=peak,
        log_sum=log_sum,
        target_logit=target_logit[:, 0],
        mean_gap=mean_gap,
        smooth_logit=_smooth_logit(problem, z, peak),
        prediction=z.argmax(1) if "prediction" in wanted else None,
        target_rank=(z > above).sum(1) if "target_rank" in wanted else None,
    )


def _log_sum_exp(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N] peak and [N] log-sum of logits [N, V], as ``Statistics`` has them."""
    peak = z.amax(1)
    peak = torch.where(peak == -torch.inf, 0, peak)
    return peak, (z - peak[:, None]).exp().sum(1).log()


def _weighted(p: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The product, and 0 where p is, whatever is infinite there."""
    return torch.where(p == 0, 0.0, p * values)


def _smooth_logit(problem: Problem, z: torch.Tensor, peak: torch.Tensor) -> torch.Tensor | None:
    """[N] sum of the logits [N, V] less the peak, weighted by the smoothing, where there is one."""
    return None if problem.smoothing is None else ((z - peak[:, None]) * problem.smoothing).sum(1)


def _estimated(problem: Problem, z: torch.Tensor) -> Statistics:
    """Statistics from a scan in fewer bits, corrected by the blocks that are kept; of logits z."""
    y, r = _scanned_logits(problem), _block_weights(problem)
    peak, log_sum = _log_sum_exp(y)
    sums, scanned = (block_sums(((logits - peak[:, None]) - log_sum[:, None]).exp()) for logits in (z, y))
    total = 1 + (r * (sums - scanned)).sum(1)
    listed = (r > 0).scatter(1, problem.target[:, None] // BLOCK, True)
    total = torch.maximum(total, torch.where(listed, sums, 0.0).sum(1))
    smooth = _smooth_logit(problem, z, peak)  # without a cap one vector product, so exact
    if problem.smoothing is not None and problem.head.softcap is not None:
        sums, scanned = (block_sums((logits - peak[:, None]) * problem.smoothing) for logits in (z, y))
        smooth = (scanned + r * (sums - scanned)).sum(1)
    return Statistics(
        peak=peak,
        log_sum=log_sum + total.log(),
        target_logit=z.gather(1, problem.target[:, None])[:, 0],
        smooth_logit=smooth,
    )


def _block_weights(problem: Problem, statistics: Statistics | None = None) -> torch.Tensor:
    """[N, B] weight of each block in the sampled gradient, 0 where it is left out; by these or the scan's own sums."""
    threshold, uniforms = problem.shape.threshold, problem.uniforms
    assert threshold is not None
    assert uniforms is not None
    y = _scanned_logits(problem)
    peak, log_sum = _log_sum_exp(y) if statistics is None else (statistics.peak, statistics.log_sum)
    p = ((y - peak[:, None]) - log_sum[:, None]).exp()
    masses = block_sums(p)
    if problem.smoothing is not None and problem.head.softcap is not None:
        masses = mix_in_smoothing(masses, problem.smoothing, problem.shape.vocabulary)
    return inclusion_weights(masses, threshold, uniforms).to(p.dtype)


def backward(problem: Problem, schedule: Schedule, statistics: Statistics, coefficients: Coefficients) -> Gradients:
    """Gradients from full logits, recomputed."""
    shape, head = problem.shape, problem.head
    hidden, weight = _operands(problem)
    z = _logits(problem)
    below = z - statistics.peak[:, None]
    p = (below - statistics.log_sum[:, None]).exp()
    k = torch.zeros_like(z) if head.softcap is None else (z / head.softcap).square()
    r = torch.ones_like(z)
    if schedule.strategy == "sampled":
        whole = None if shape.estimated else statistics
        r = _block_weights(problem, whole).repeat_interleave(BLOCK, 1)[:, : shape.vocabulary]

    dz = p * coefficients.a[:, None]
    if coefficients.b is not None:
        dz = dz + _weighted(p, below) * coefficients.b[:, None]
    dz = r * dz
    dz.scatter_add_(1, problem.target[:, None], -coefficients.c[:, None])
    dz = dz * (1 - k)
    if coefficients.d is not None:
        assert problem.smoothing is not None
        dz = dz - (1 - r * k) * (coefficients.d[:, None] * problem.smoothing)
    if problem.valid_mask is not None:
        dz = dz.masked_fill(~problem.valid_mask[:, None], 0)  # a bias that is not finite reaches every row

    weight_gradient = head.logit_scale * (dz.T @ hidden[:, shape.trained_columns]) if shape.weight_gradient else None
    if problem.main_grad is not None and weight_gradient is not None:
        problem.main_grad.add_(weight_gradient)
        weight_gradient = None
    return Gradients(
        hidden=head.logit_scale * (dz @ weight) if shape.hidden_gradient else None,
        weight=weight_gradient,
        bias=dz.sum(0) if shape.bias_gradient else None,
    )


def finish(problem: Problem, schedule: Schedule, statistics: Statistics, upstream: torch.Tensor) -> Gradients:
    """Never asked for: no schedule of this backend prepares gradients."""
    raise NotImplementedError


def forward_with_gradients(
    problem: Problem, schedule: Schedule, ahead: AffineCoefficients
) -> tuple[Statistics, Gradients]:
    """One pass after the other."""
    statistics = forward(problem, schedule, ahead)
    whole = statistics
    if problem.merge is not None:
        merged = problem.merge(statistics, slice(0, problem.shape.tokens))()
        whole = replace(statistics, peak=merged.peak, log_sum=merged.log_sum)
    return statistics, backward(problem, schedule, whole, ahead.at(whole))
