"""Whether what the ranks of a group found is what one process finds with the whole head.

Bounds are those of ``tolerance``, with the single-process result, on the same kind of device, in the place of plain
PyTorch: a parallel result may be as far from fp64 as that one is, and a few roundings of another order of summation.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

import torch
import workers
from sharded import Call, on
from workers import CPU, Outcome

import logitless
import plain
from logitless.options import INTEGER_OUTPUTS, TOKEN_OUTPUTS
from test_sampled import assert_unbiased
from tolerance import Baseline, Results, accumulation_dtype, loss_baseline, statistics_baseline


def token_errors(call: Call, device: torch.device) -> float:
    """What the errors of the tokens' losses in one process, and four ulps of each, add up to in a reduced loss.

    As in ``loss_baseline``: where they cancel in one process, they need not in several.
    """
    problem = call.problem()
    divisor = plain.denominator(
        problem.target,
        weight=problem.options.get("weight"),
        reduction=call.case.reduction,
        normalizer=problem.options.get("normalizer"),
    )
    tokens = problem.with_options(reduction="none", normalizer=None)
    with torch.no_grad():
        losses = tokens.call(on(device, logitless.linear_cross_entropy), backend=call.implementation.backend)
        exact = tokens.to(torch.float64).call(plain.linear_cross_entropy)
    ulps = 4 * torch.finfo(accumulation_dtype(problem)).eps * exact.abs()
    return ((losses.double() - exact).abs() + ulps).sum().item() / divisor if divisor else 0.0


@lru_cache
def single_process(call: Call, device: torch.device) -> Baseline:
    """Plain PyTorch in fp64, and one process with the whole weight, whose error is the bound."""
    problem, ours = call.problem(), call.alone(device)
    known = loss_baseline(problem) if call.function == "loss" else statistics_baseline(problem)
    names = [name for name in known.exact if name in ours]
    # A logit of -inf is no term of the sums that the other form takes; this one has the same dtype.
    accumulated = known.accumulated if call.masked_shard is None else known.plain
    reduced = call.function == "loss" and call.case.reduction != "none"
    return Baseline(
        exact={name: known.exact[name] for name in names},
        plain={name: ours[name] for name in names},
        accumulated={name: accumulated[name] for name in names},
        plain_error={"loss": token_errors(call, device)} if reduced else {},
    )


def baseline_of(call: Call, device: torch.device = CPU) -> Baseline:
    """That of a call does not depend on how it is sharded, but for the shard that is masked."""
    masked = call.masked_shard is not None
    whole = replace(call, shares=call.shares if masked else (1,), token_shares=None, workspace=None)
    return single_process(whole, device)


OUTPUTS = ("loss", *TOKEN_OUTPUTS)


def assert_same_bits(results: list[Results]) -> None:
    """All ranks have the same outputs."""
    for name in OUTPUTS:
        if name not in results[0]:
            continue
        for rank, result in enumerate(results):
            assert torch.equal(result[name], results[0][name]), f"{name} differs between rank 0 and rank {rank}"


def joined(call: Call, results: list[Results], rank: int) -> Results:
    """A rank's results, with the gradients of what is sharded put together again."""
    sharded = ["linear_weight", "linear_bias", *(["input"] if call.token_shares else [])]
    together = {name: torch.cat([result[name] for result in results]) for name in sharded if name in results[0]}
    return {name: value for name, value in {**results[rank], **together}.items() if name not in INTEGER_OUTPUTS}


def check(call: Call, outcomes: list[Outcome], device: torch.device = CPU) -> None:
    """The same outputs on all ranks, and outputs and gradients of each as exact as those of one process."""
    results = workers.values(outcomes)
    assert_same_bits(results)
    for rank in range(len(results)):
        baseline_of(call, device).check(joined(call, results, rank))


def check_integers(call: Call, result: Results) -> None:
    """The prediction has the largest logit and the rank counts the larger logits, up to rounding of two logits."""
    problem = call.problem()
    exact = problem.to(torch.float64)
    logits = plain.logits(exact.input, exact.linear_weight, **exact.options).detach()
    target, kept = problem.target.flatten(), problem.target.flatten() != -100
    prediction, rank = result["prediction"].flatten(), result["target_rank"].flatten()
    assert result["prediction"].shape == result["target_rank"].shape == problem.target.shape
    assert prediction.dtype == rank.dtype == torch.int64
    assert (prediction[~kept] == -1).all()
    assert (rank[~kept] == -1).all()
    logits, target, prediction, rank = logits[kept], target[kept], prediction[kept], rank[kept]
    # Product, bias, scale and cap are each rounded at most once, to an ulp of the dtype.
    slack = 4 * torch.finfo(call.case.dtype).eps * logits.abs().amax(1, keepdim=True)
    assert (logits.gather(1, prediction[:, None]) >= logits.amax(1, keepdim=True) - slack).all()
    at_target = logits.gather(1, target[:, None])
    assert ((logits > at_target + slack).sum(1) <= rank).all()
    assert (rank <= (logits > at_target - slack).sum(1)).all()


def check_unbiased(call: Call, results: list[Results], device: torch.device = CPU) -> None:
    """The mean of K draws comes closer to the exact gradient as 1 / sqrt(K), for K up to 256: see ``test_sampled``."""
    exact = baseline_of(call, device).exact
    for which in call.problem().leaves():
        whole_on_each = which == "input" and not call.token_shares
        draws = results[0][which] if whole_on_each else torch.cat([result[which] for result in results], 1)
        assert_unbiased(draws.double(), exact[which].double())


def check_drawn_loss(call: Call, results: list[Results], device: torch.device = CPU) -> None:
    """The loss of draws has the exact loss's error and does not depend on the draw."""
    for result in results:
        assert (result["loss"] == results[0]["loss"][0]).all()
    baseline = baseline_of(call, device)
    only_loss = {kind: {"loss": getattr(baseline, kind)["loss"]} for kind in ("exact", "plain", "accumulated")}
    replace(baseline, **only_loss).check({"loss": results[0]["loss"][0]})


def check_refusal(outcomes: list[Outcome], patterns: list[str], soon: float) -> None:
    """A ValueError on all ranks, soon, that names what is wrong."""
    for rank, outcome in enumerate(outcomes):
        assert "ValueError" in outcome.kinds, f"rank {rank}: {outcome.trace or 'no error'}"
        missing = unnamed(outcome.message, patterns)
        assert not missing, f"rank {rank}: {missing} not in {outcome.message!r}"
        assert outcome.seconds < soon, f"rank {rank}"


def unnamed(message: str, patterns: list[str]) -> list[str]:
    """The patterns that do not stand in the message as words, or numbers, of their own."""
    return [pattern for pattern in patterns if not re.search(rf"(?<![\w.-])(?:{pattern})(?!\w)", message)]
