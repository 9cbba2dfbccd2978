"""How far a result may lie from the exact one. Derived from plain PyTorch on the same problem, never chosen.

A result of ours passes if its error is at most 1.1 times that of plain PyTorch in the same dtype plus a floor. Errors
are distances (Euclidean norm over the whole tensor) to plain PyTorch in fp64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import plain
from problems import UPSTREAM, Problem, coarse

Results = dict[str, Tensor]

FACTOR = 1.1


def accumulation_dtype(problem: Problem) -> torch.dtype:
    """The precision in which products accumulate and statistics are kept."""
    return torch.promote_types(torch.promote_types(problem.input.dtype, problem.linear_weight.dtype), torch.float32)


def floor(exact: Tensor, accumulated: Tensor, ours: Tensor) -> float:
    """The error no implementation can be asked to stay under, however lucky plain PyTorch is.

    Three parts:

    - One rounding to the dtype of the result, at most half an ulp of each element (half the spacing of subnormals for
      the smallest). Both sides round, but not to the same side.
    - Four times the error of ``accumulated``: the same quantity from full logits in the accumulation precision, formed
      relative to the largest logit as a fused operator must, nothing ever rounded to the input's dtype. Its error
      is one draw from the distribution of rounding errors under one order of summation. Four roundings stand between
      operands and result (product, exponential, its sum, second product), and another order draws each anew: their
      magnitudes add up to no more than four such draws.
    - Four ulps of the accumulation precision, relative to the result, for where that one draw happens to be zero.
    """
    norm = exact.norm().item()
    if not ours.is_floating_point():
        return 0.0
    info = torch.finfo(ours.dtype)
    rounding = info.eps / 2 * norm + info.smallest_normal * info.eps / 2 * exact.numel() ** 0.5
    drawn = (accumulated.double() - exact).norm().item()
    return rounding + 4 * drawn + 4 * torch.finfo(accumulated.dtype).eps * norm


@dataclass(frozen=True)
class Baseline:
    """What plain PyTorch makes of one problem: in fp64, in its own dtype, and in the accumulation precision."""

    exact: Results
    plain: Results
    accumulated: Results
    # Errors that replace the distance between plain and exact: see `loss_baseline`.
    plain_error: dict[str, float]

    def check(self, ours: Results) -> None:
        """Assert that results have the right names, shapes and errors."""
        assert ours.keys() == self.exact.keys()
        failures = []
        for name, exact in self.exact.items():
            assert ours[name].shape == exact.shape, f"{name}: shape {ours[name].shape} instead of {exact.shape}"
            error = (ours[name].double() - exact).norm().item()
            allowed = FACTOR * self._plain_error(name) + floor(exact, self.accumulated[name], ours[name])
            if not error <= allowed:
                failures.append(f"{name}: error {error:.3e}, allowed {allowed:.3e}, size {exact.norm():.3e}")
        assert not failures, "; ".join(failures)

    def _plain_error(self, name: str) -> float:
        if name in self.plain_error:
            return self.plain_error[name]
        return (self.plain[name].double() - self.exact[name]).norm().item()


def gradients(outputs: list[Tensor], upstream: list[Tensor], problem: Problem) -> Results:
    """Gradients of everything in the problem that requires one, by argument name."""
    leaves = problem.leaves()
    if not leaves:
        return {}
    return dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), upstream), strict=True))


def upstream_for(output: Tensor, seed: int = 5) -> Tensor:
    """Upstream gradient that is neither one nor equal for all tokens, and exact in every dtype."""
    if output.ndim == 0:
        return torch.full_like(output, UPSTREAM)
    return coarse(*output.shape, low=-2, high=2, seed=seed).to(output.dtype)


def loss_and_gradients(function: Callable, problem: Problem, **overrides) -> Results:
    loss = problem.call(function, **overrides)
    if not loss.requires_grad:
        return {"loss": loss}
    return {"loss": loss.detach(), **gradients([loss], [upstream_for(loss)], problem)}


def statistics_and_gradients(function: Callable[..., dict[str, Tensor]], problem: Problem, **overrides) -> Results:
    """Token statistics, and gradients with a different upstream gradient for each of them at the same time."""
    values = problem.call(function, **overrides)
    if not problem.leaves():
        return values
    upstream = [upstream_for(value, seed=5 + index) for index, value in enumerate(values.values())]
    return {
        **{name: value.detach() for name, value in values.items()},
        **gradients(list(values.values()), upstream, problem),
    }


def loss_baseline(problem: Problem, context: contextlib.AbstractContextManager | None = None) -> Baseline:
    """The baseline of ``linear_cross_entropy``; ``context`` (autocast) surrounds plain PyTorch in its own dtype.

    The error of a reduced loss is taken as the sum of its tokens' absolute errors: where they cancel in plain PyTorch,
    that is luck, and other roundings of the same size need not cancel. Likewise four ulps of a sum are four ulps of its
    terms: token weights of both signs make it smaller than these.
    """
    exact, accumulated = problem.to(torch.float64), problem.to(accumulation_dtype(problem))
    token_options = {k: v for k, v in problem.options.items() if k not in ("reduction", "normalizer")}
    tokens = Problem(problem.input, problem.linear_weight, problem.target, token_options)
    with context or contextlib.nullcontext():
        own = loss_and_gradients(plain.linear_cross_entropy, problem)
        token_losses = tokens.call(plain.token_losses)
    exact_tokens = tokens.to(torch.float64).call(plain.token_losses).detach()
    ulps = 4 * torch.finfo(accumulation_dtype(problem)).eps * exact_tokens.abs()
    token_errors = (token_losses.detach().double() - exact_tokens).abs() + ulps
    errors = {}
    if problem.options.get("reduction", "mean") != "none":
        names = ("weight", "reduction", "ignore_index", "normalizer")
        divisor = plain.denominator(problem.target, **{k: v for k, v in problem.options.items() if k in names})
        errors["loss"] = token_errors.sum().item() / divisor if divisor else 0.0
    return Baseline(
        exact=loss_and_gradients(plain.linear_cross_entropy, exact),
        plain=own,
        accumulated=loss_and_gradients(plain.linear_cross_entropy, accumulated, form="statistics"),
        plain_error=errors,
    )


def statistics_baseline(problem: Problem) -> Baseline:
    exact, accumulated = problem.to(torch.float64), problem.to(accumulation_dtype(problem))
    return Baseline(
        exact=statistics_and_gradients(plain.token_statistics, exact),
        plain=statistics_and_gradients(plain.token_statistics, problem),
        accumulated=statistics_and_gradients(plain.token_statistics, accumulated, form="statistics"),
        plain_error={},
    )
