"""One suite that every backend and every strategy must pass, against plain PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import logitless
import plain
from implementations import ANY_UPSTREAM, DEVICE, ESTIMATES, FORWARD_ONLY, IMPLEMENTATIONS, REFERENCE, Implementation
from problems import (
    Case,
    Problem,
    all_pairs,
    generator,
    loss_cases,
    make_problem,
    random_problem,
    smollm2_problem,
    statistics_cases,
    widen,
)
from tolerance import (
    Baseline,
    loss_and_gradients,
    loss_baseline,
    statistics_and_gradients,
    statistics_baseline,
    upstream_for,
)

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
each_any_upstream = pytest.mark.parametrize("implementation", ANY_UPSTREAM, ids=str)

# Used where one combination of options is enough: all that change the arithmetic.
BUSY = Case(
    bias=True, class_weight=True, token_weight=True, ignored=True, label_smoothing=0.125, z_loss=2.0**-7, softcap=5.0
)


@lru_cache
def baseline_of(case: Case) -> Baseline:
    return loss_baseline(case.problem())


@lru_cache
def statistics_baseline_of(case: Case) -> Baseline:
    return statistics_baseline(case.head_problem())


def skip_unless_serves(implementation: Implementation, reduction: str) -> None:
    if reduction == "none" and not implementation.any_upstream:
        pytest.skip("this strategy needs a reduced loss")


# --- values -----------------------------------------------------------------------------------------------------------


def test_cases_cover_all_pairs():
    factors = {"a": (1, 2, 3), "b": (1, 2), "c": (1, 2, 3, 4)}
    choices = all_pairs(factors)
    assert len(choices) < 3 * 2 * 4
    for first, second in (("a", "b"), ("a", "c"), ("b", "c")):
        assert {(c[first], c[second]) for c in choices} == {(i, j) for i in factors[first] for j in factors[second]}


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *ESTIMATES], ids=str)
@pytest.mark.parametrize("case", loss_cases(), ids=str)
def test_loss_and_gradients(implementation, case):
    skip_unless_serves(implementation, case.reduction)
    baseline_of(case).check(loss_and_gradients(implementation.linear_cross_entropy, case.problem()))


@pytest.mark.parametrize("implementation", FORWARD_ONLY, ids=str)
@pytest.mark.parametrize("case", loss_cases(), ids=str)
def test_loss_without_gradients(implementation, case):
    with torch.no_grad():
        loss = case.problem().call(implementation.linear_cross_entropy)
    assert not loss.requires_grad
    baseline = baseline_of(case)
    only_loss = {name: {"loss": getattr(baseline, name)["loss"]} for name in ("exact", "plain", "accumulated")}
    replace(baseline, **only_loss).check({"loss": loss})


@each_any_upstream
@pytest.mark.parametrize("case", statistics_cases(), ids=str)
def test_statistics_and_gradients(implementation, case):
    """All float statistics with their own upstream gradients at the same time."""
    problem = case.head_problem()
    statistics_baseline_of(case).check(statistics_and_gradients(implementation.float_statistics, problem))


@pytest.mark.parametrize("implementation", [*ANY_UPSTREAM, *FORWARD_ONLY], ids=str)
def test_prediction_of_rows_that_hold_nan(implementation):
    """An index as ``torch.argmax`` gives it, never one beyond the vocabulary."""
    problem = random_problem(9, 24, 203).to(torch.float32)
    hidden, bias = problem.input.detach().clone(), torch.zeros(203)
    hidden[4, 1] = torch.nan
    for nan_entries in ([], [130, 202]):
        bias[nan_entries] = torch.nan
        with implementation.grad_mode():
            given = implementation.token_statistics(
                hidden, problem.linear_weight, problem.target, outputs=("prediction",), linear_bias=bias
            )
        expected = (hidden @ problem.linear_weight.detach().T + bias).argmax(1)
        assert torch.equal(given.prediction, expected)


@pytest.mark.parametrize("implementation", [*ANY_UPSTREAM, *FORWARD_ONLY], ids=str)
@pytest.mark.parametrize("case", statistics_cases(), ids=str)
def test_integer_statistics(implementation, case):
    """The prediction has the largest logit and the rank counts the larger logits, up to rounding of two logits."""
    problem = case.head_problem()
    with implementation.grad_mode():
        statistics = problem.call(implementation.token_statistics, outputs=logitless.options.TOKEN_OUTPUTS)
    exact = problem.to(torch.float64)
    options = dict(exact.options)
    logits = plain.logits(exact.input, exact.linear_weight, **options).detach()
    ignored = (problem.target == -100).flatten()
    # Each logit is off by an ulp or two of the dtype: its product, bias, scale and cap are each rounded at most once.
    slack = 4 * torch.finfo(case.dtype).eps * logits.abs().amax(1)
    prediction, rank = statistics.prediction.flatten(), statistics.target_rank.flatten()
    assert prediction.dtype == rank.dtype == torch.int64
    assert statistics.prediction.shape == statistics.target_rank.shape == problem.target.shape
    assert (prediction[ignored] == -1).all()
    assert (rank[ignored] == -1).all()
    kept = ~ignored
    predicted = logits[kept].gather(1, prediction[kept, None]).squeeze(1)
    assert (predicted >= logits[kept].amax(1) - slack[kept]).all()
    at_target = logits[kept].gather(1, problem.target.flatten()[kept, None]).squeeze(1)
    above = (logits[kept] > (at_target + slack[kept])[:, None]).sum(1)
    near = (logits[kept] > (at_target - slack[kept])[:, None]).sum(1)
    assert (above <= rank[kept]).all()
    assert (rank[kept] <= near).all()


@pytest.mark.parametrize("implementation", [*ANY_UPSTREAM, *FORWARD_ONLY], ids=str)
def test_rank_of_equal_logits(implementation):
    """The rank counts strictly larger logits only, and never the target itself."""
    scores = torch.tensor([[3.0, 1.0, 3.0, 2.0, 1.0]])
    weight = scores.T.contiguous().requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 4])
    with implementation.grad_mode():
        statistics = implementation.token_statistics(
            torch.ones(5, 1), weight, target, outputs=("prediction", "target_rank")
        )
    assert statistics.target_rank.tolist() == [0, 3, 0, 2, 3]
    assert set(statistics.prediction.tolist()) <= {0, 2}


@each_any_upstream
def test_only_what_is_asked_for(implementation):
    problem = Case(dtype=torch.float32).head_problem()
    for name in logitless.options.TOKEN_OUTPUTS:
        statistics = problem.call(implementation.token_statistics, outputs=(name,))
        given = {field for field, value in vars_of(statistics).items() if value is not None}
        assert given == {name}


def vars_of(statistics: logitless.TokenStatistics) -> dict[str, torch.Tensor | None]:
    return {name: getattr(statistics, name) for name in logitless.options.TOKEN_OUTPUTS}


@each_any_upstream
@pytest.mark.parametrize("name", ["nll", "logsumexp", "entropy"])
def test_one_statistic_used_of_three(implementation, name):
    """Outputs that take no part in the loss have no upstream gradient, which counts as zero."""
    problem = replace(BUSY, dtype=torch.float32).head_problem()

    def used(function):
        def only(*args, **options):
            return {name: function(*args, **options)[name]}

        return only

    baseline = Baseline(
        exact=statistics_and_gradients(used(plain.token_statistics), problem.to(torch.float64)),
        plain=statistics_and_gradients(used(plain.token_statistics), problem),
        accumulated=statistics_and_gradients(used(plain.token_statistics), problem, form="statistics"),
        plain_error={},
    )
    baseline.check(statistics_and_gradients(used(implementation.float_statistics), problem))


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [576, 640])
def test_trained_head(implementation, dtype, hidden):
    """The head of a trained language model on its own hidden states, as it is and at a larger hidden size."""
    implementation = replace(implementation, window=implementation.window and 1000)
    problem = smollm2_problem(24, vocabulary=4096 + 37)
    problem = (widen(problem, hidden) if hidden != 576 else problem).to(dtype)
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, problem))


def test_trained_head_is_trained():
    """The data is read right: the whole head predicts its labels far better than chance (log V = 10.8)."""
    problem = smollm2_problem(256)
    with torch.no_grad():
        loss = problem.call(logitless.linear_cross_entropy, workspace="8MiB")
    assert loss < 5


# --- dtypes and shapes of results -------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(implementation, reduction, dtype):
    """The loss is fp32 (fp64 for fp64), a gradient has the dtype of its tensor."""
    skip_unless_serves(implementation, reduction)
    problem = replace(BUSY, dtype=dtype, reduction=reduction, leading=(3, 4)).problem()
    results = loss_and_gradients(implementation.linear_cross_entropy, problem)
    assert results["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert results["loss"].shape == (problem.target.shape if reduction == "none" else ())
    for name, leaf in problem.leaves().items():
        assert results[name].dtype == leaf.dtype
        assert results[name].shape == leaf.shape


@each_implementation
@pytest.mark.parametrize("leading", [(), (1,), (2, 3, 2), (4, 0), (0,)], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_leading_shapes(implementation, leading, reduction):
    skip_unless_serves(implementation, reduction)
    problem = replace(BUSY, leading=leading, reduction=reduction, dtype=torch.float32).problem()
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, problem))


@each_any_upstream
@pytest.mark.parametrize("leading", [(), (2, 3, 2), (4, 0)], ids=str)
def test_leading_shapes_of_statistics(implementation, leading):
    problem = replace(BUSY, leading=leading, dtype=torch.float32).head_problem()
    statistics_baseline(problem).check(statistics_and_gradients(implementation.float_statistics, problem))


STRIDED = {
    "transposed": lambda t: t.mT.contiguous().mT if t.ndim > 1 else t.repeat_interleave(2)[::2],
    "every second": lambda t: t.repeat_interleave(2, dim=-1)[..., ::2],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
}


@each_implementation
@pytest.mark.parametrize("stride", STRIDED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strides(implementation, stride, reduction):
    """Inputs, weight, bias and target in any layout give what their contiguous copies give."""
    skip_unless_serves(implementation, reduction)
    problem = replace(BUSY, leading=(3, 4), dtype=torch.float32, reduction=reduction).problem()
    strided = replace(problem.map(STRIDED[stride]), target=STRIDED[stride](problem.target))
    assert strided.input.stride() != problem.input.stride() or strided.input.storage_offset()
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, strided))


@each_implementation
def test_expanded_input(implementation):
    """One hidden state expanded over the tokens (stride 0): its gradient is the sum over the tokens."""
    problem = Case(dtype=torch.float32, reduction="sum").problem()

    def of_one_row(function):
        def call(input, linear_weight, target, **options):
            return function(input[:1].expand_as(input), linear_weight, target, **options)

        return call

    exact, accumulated = problem.to(torch.float64), problem
    baseline = Baseline(
        exact=loss_and_gradients(of_one_row(plain.linear_cross_entropy), exact),
        plain=loss_and_gradients(of_one_row(plain.linear_cross_entropy), problem),
        accumulated=loss_and_gradients(of_one_row(plain.linear_cross_entropy), accumulated, form="statistics"),
        plain_error={},
    )
    baseline.check(loss_and_gradients(of_one_row(implementation.linear_cross_entropy), problem))


@each_implementation
def test_upstream_gradient_of_any_stride(implementation):
    """``loss.sum().backward()`` hands over an expanded upstream gradient, a transposed loss a transposed one."""
    skip_unless_serves(implementation, "none")
    problem = replace(BUSY, leading=(3, 4), reduction="none", dtype=torch.float32).problem()

    def summed(function):
        return lambda *args, **options: function(*args, **options).sum().reshape(())

    def transposed(function):
        return lambda *args, **options: function(*args, **options).mT

    for change in (summed, transposed):
        baseline = Baseline(
            exact=loss_and_gradients(change(plain.linear_cross_entropy), problem.to(torch.float64)),
            plain=loss_and_gradients(change(plain.linear_cross_entropy), problem),
            accumulated=loss_and_gradients(change(plain.linear_cross_entropy), problem, form="statistics"),
            plain_error={},
        )
        baseline.check(loss_and_gradients(change(implementation.linear_cross_entropy), problem))


@each_implementation
def test_int32_target(implementation):
    problem = Case(dtype=torch.float32, ignored=True).problem()
    problem = replace(problem, target=problem.target.int())
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, problem))


@each_implementation
@pytest.mark.parametrize("rows", [1, 16, 17, 100])
@pytest.mark.parametrize("window", [1, 202, 203, 1000])
def test_tile_sizes(implementation, rows, window):
    """One, one less than all, exactly all, more than all."""
    if implementation.strategy not in ("chunked", "windowed", "sampled"):
        pytest.skip("has no tiles")
    if implementation.strategy == "windowed":
        implementation = replace(implementation, window=window)
    elif window != 1:
        pytest.skip("has no windows")
    case = replace(BUSY, dtype=torch.float32)
    baseline_of(case).check(loss_and_gradients(replace(implementation, rows=rows).linear_cross_entropy, case.problem()))


# --- nothing to do ----------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("how", ["no tokens", "all ignored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_token_counts(implementation, reduction, how, dtype):
    skip_unless_serves(implementation, reduction)
    leading = (0,) if how == "no tokens" else (7,)
    problem = replace(BUSY, dtype=dtype, reduction=reduction, leading=leading).problem()
    problem.target.fill_(-100)
    for value in loss_and_gradients(implementation.linear_cross_entropy, problem).values():
        assert torch.equal(value, torch.zeros_like(value))


@each_any_upstream
@pytest.mark.parametrize("how", ["no tokens", "all ignored"])
def test_no_token_has_statistics(implementation, how):
    problem = replace(BUSY, dtype=torch.float32, leading=(0,) if how == "no tokens" else (7,)).head_problem()
    problem.target.fill_(-100)
    for value in statistics_and_gradients(implementation.float_statistics, problem).values():
        assert torch.equal(value, torch.zeros_like(value))


@each_implementation
@pytest.mark.parametrize("normalizer", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
def test_normalizer_of_zero(implementation, normalizer):
    """Zero tokens by the caller's own count: loss 0 and gradients 0."""
    problem = replace(BUSY, dtype=torch.float32, normalizer=normalizer).problem()
    for value in loss_and_gradients(implementation.linear_cross_entropy, problem).values():
        assert torch.equal(value, torch.zeros_like(value))


@each_implementation
@pytest.mark.parametrize("normalizer", [7, 7.0, torch.tensor(7), torch.tensor(7.0)], ids=["int", "float", "i64", "f32"])
def test_normalizer_as_number_or_tensor(implementation, normalizer):
    problem = replace(BUSY, dtype=torch.float32, normalizer=7.0).problem()
    ours = loss_and_gradients(implementation.linear_cross_entropy, problem.with_options(normalizer=normalizer))
    loss_baseline(problem).check(ours)


@each_implementation
def test_target_of_any_strides(implementation):
    problem = replace(BUSY, dtype=torch.float32, leading=(7,), ignored=False).problem()
    strided = torch.full((7, 3), -7).index_copy_(1, torch.tensor([1]), problem.target[:, None])[:, 1]
    assert not strided.is_contiguous()
    given = loss_and_gradients(implementation.linear_cross_entropy, replace(problem, target=strided))
    loss_baseline(problem).check(given)


@each_implementation
@pytest.mark.parametrize("cap", [2.0**-6, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cap_that_saturates(implementation, reduction, dtype, cap):
    """Logits are many times the cap, whose derivative is next to nothing, but for a few."""
    skip_unless_serves(implementation, reduction)
    problem = replace(BUSY, dtype=dtype, reduction=reduction, softcap=cap).problem()
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, problem))


@each_implementation
def test_ignored_rows_may_hold_anything(implementation):
    """A hidden state that is not finite at an ignored token reaches neither the loss nor any gradient."""
    problem = replace(BUSY, dtype=torch.float32).problem()
    spoiled = problem.map(torch.clone)
    with torch.no_grad():
        spoiled.input[problem.target == -100] = torch.nan
    loss_baseline(problem).check(loss_and_gradients(implementation.linear_cross_entropy, spoiled))


# --- numbers that are not finite --------------------------------------------------------------------------------------


def normal(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=generator(seed))


def spoilt_row(value: float, bias: float = 0.0) -> Callable[[Tensor, Tensor, Tensor], None]:
    """One hidden state of one row is not finite; beside it one entry of the bias is large."""

    def spoil(hidden: Tensor, weight: Tensor, entries: Tensor) -> None:
        del weight
        hidden[2, 3], entries[7] = value, bias

    return spoil


def spoilt_entry(value: float) -> Callable[[Tensor, Tensor, Tensor], None]:
    """One weight of an entry of the vocabulary, and the bias of another."""

    def spoil(hidden: Tensor, weight: Tensor, entries: Tensor) -> None:
        del hidden
        weight[7, 3] = entries[200] = value

    return spoil


def masked_entries(hidden: Tensor, weight: Tensor, entries: Tensor) -> None:
    del hidden, weight
    entries[:130], entries[200] = -torch.inf, -torch.inf


def all_masked(hidden: Tensor, weight: Tensor, entries: Tensor) -> None:
    del hidden, weight
    entries.fill_(-torch.inf)


SPOILT = {
    "nan row": spoilt_row(torch.nan),
    "infinite row": spoilt_row(torch.inf),
    "infinite row, large bias": spoilt_row(-torch.inf, bias=1e30),
    "nan row, large bias": spoilt_row(torch.nan, bias=1e30),
    "nan entries": spoilt_entry(torch.nan),
    "infinite entries": spoilt_entry(torch.inf),
    "masked entries": masked_entries,
    "all entries masked": all_masked,
}


def kinds(tensor: Tensor) -> Tensor:
    """Finite, NaN, infinite, minus infinite."""
    return torch.stack([tensor.isnan(), tensor == torch.inf, tensor == -torch.inf])


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, *ESTIMATES], ids=str)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.0, None), (0.75, 5.0), (0.0, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("spoiler", SPOILT)
def test_what_is_not_finite_poisons_what_it_does_in_plain_pytorch(spoiler, dtype, scale, softcap, implementation):
    """Zero times NaN is NaN, whether it is the scale, the slope of a cap that saturates, or a library's shortcut.

    A scan in eight bits has no number for what is infinite: more may be NaN there, and nothing less.
    """
    leaves = [normal(6, 16, seed=0), normal(300, 16, seed=1) / 4, normal(300, seed=2)]
    SPOILT[spoiler](*leaves)
    leaves = [leaf.to(dtype) for leaf in leaves]
    target = torch.randint(210, 300, (6,), generator=generator(3))
    plain = [leaf.clone().requires_grad_() for leaf in leaves]
    z = scale * (plain[0] @ plain[1].T) + plain[2]
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    expected = F.cross_entropy(z, target, reduction="sum")
    ours = [leaf.clone().requires_grad_() for leaf in leaves]
    given = implementation.linear_cross_entropy(
        *ours[:2], target, linear_bias=ours[2], reduction="sum", logit_scale=scale, softcap=softcap
    )
    found = (given.detach(), *torch.autograd.grad(given, ours))
    right = (expected.detach(), *torch.autograd.grad(expected, plain))
    for name, value, plainly in zip(("loss", "hidden", "weight", "bias"), found, right, strict=True):
        if implementation in ESTIMATES:
            assert not (value.isfinite() & ~plainly.isfinite()).any(), name
        else:
            assert torch.equal(kinds(value), kinds(plainly)), name


@each_any_upstream
def test_entropy_of_a_row_that_is_not_finite(implementation):
    """NaN, as are the gradients that it reaches."""
    hidden, weight = normal(6, 16, seed=0), normal(300, 16, seed=1).requires_grad_()
    hidden[2, 3] = torch.nan
    target = torch.randint(300, (6,), generator=generator(3))
    entropy = implementation.token_statistics(hidden.requires_grad_(), weight, target, outputs=("entropy",)).entropy
    assert entropy.isnan().nonzero().tolist() == [[2]]
    of_hidden, of_weight = torch.autograd.grad(entropy.sum(), (hidden, weight))
    assert of_hidden[2].isnan().all()
    assert not of_hidden[[0, 1, 3, 4, 5]].isnan().any()
    assert of_weight.isnan().all()


# --- what is differentiated -------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("only", ["input", "linear_weight", "linear_bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_gradient_wanted(implementation, only, reduction):
    """Head-only and bias-only training get their gradient; what is frozen gets none."""
    skip_unless_serves(implementation, reduction)
    problem = replace(BUSY, dtype=torch.float32, reduction=reduction).problem()
    problem = problem.freeze(*(problem.leaves().keys() - {only}))
    results = loss_and_gradients(implementation.linear_cross_entropy, problem)
    assert results.keys() == {"loss", only}
    loss_baseline(problem).check(results)
    problem.call(implementation.linear_cross_entropy, reduction="sum").backward()
    for tensor in (problem.input, problem.linear_weight, problem.options["linear_bias"]):
        assert (tensor.grad is not None) == tensor.requires_grad


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("gradient", ["exact", logitless.Sampled()], ids=["exact", "sampled"])
def test_no_gradient_wanted(backend, gradient):
    """Nothing requires a gradient, or the caller is in no_grad or inference mode: the loss alone, without a graph."""
    problem = replace(BUSY, dtype=torch.float32).problem()
    baseline = loss_baseline(problem)
    frozen = problem.freeze(*problem.leaves())
    losses = [frozen.call(logitless.linear_cross_entropy, backend=backend, gradient=gradient)]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            losses.append(problem.call(logitless.linear_cross_entropy, backend=backend, gradient=gradient))
    for loss in losses:
        assert not loss.requires_grad
        loss_only = {name: {"loss": getattr(baseline, name)["loss"]} for name in ("exact", "plain", "accumulated")}
        replace(baseline, **loss_only).check({"loss": loss.clone()})


@each_implementation
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
    ids=str,
)
def test_mixed_dtypes(implementation, dtypes):
    """Hidden states and weight of two dtypes are computed with in the wider one."""
    problem = mixed_dtypes(dtypes)
    results = loss_and_gradients(implementation.linear_cross_entropy, problem)
    for name, leaf in problem.leaves().items():
        assert results[name].dtype == leaf.dtype
    loss_baseline(problem).check(results)


@each_any_upstream
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_mixed_dtypes_of_statistics(implementation, dtypes):
    problem = replace(mixed_dtypes(dtypes), options={})
    statistics_baseline(problem).check(statistics_and_gradients(implementation.float_statistics, problem))


def mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype]) -> Problem:
    problem = Case(ignored=True).problem()
    return replace(
        problem,
        input=problem.input.detach().to(dtypes[0]).requires_grad_(),
        linear_weight=problem.linear_weight.detach().to(dtypes[1]).requires_grad_(),
    )


@each_implementation
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float32, torch.float32)],
    ids=str,
)
def test_autocast(implementation, dtypes):
    """Under autocast both are computed with in its dtype; gradients keep the dtypes of their tensors."""
    problem = mixed_dtypes(dtypes)

    def under_autocast(*args, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return implementation.linear_cross_entropy(*args, **options)

    results = loss_and_gradients(under_autocast, problem)
    assert results["loss"].dtype == torch.float32
    for name, leaf in problem.leaves().items():
        assert results[name].dtype == leaf.dtype
    loss_baseline(problem, torch.autocast("cpu", torch.bfloat16)).check(results)


def test_autocast_computes_in_its_dtype():
    """Operands are rounded to bf16 under autocast, so the loss is that of rounded operands in fp32."""
    problem = Case(dtype=torch.float32, reduction="sum").problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = problem.call(logitless.linear_cross_entropy, backend="reference")
    rounded = problem.to(torch.bfloat16)
    assert torch.equal(loss, rounded.call(logitless.linear_cross_entropy, backend="reference"))


# --- backward ---------------------------------------------------------------------------------------------------------


@each_implementation
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_again_through_the_same_graph(implementation, reduction):
    """``retain_graph``: each backward call gives the same gradient, and one already handed out stays as it is."""
    skip_unless_serves(implementation, reduction)
    problem = replace(BUSY, dtype=torch.float32, reduction=reduction).problem()
    leaves = list(problem.leaves().values())
    loss = problem.call(implementation.linear_cross_entropy)
    upstream = upstream_for(loss)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    for gradient in first:
        gradient.mul_(3)
    second = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    doubled = torch.autograd.grad(loss, leaves, 2 * upstream)
    for once, again, twice in zip(kept, second, doubled, strict=True):
        if DEVICE == "cpu":  # where nothing is added up in an order of its own
            assert torch.equal(again, once)
        torch.testing.assert_close(again, once)
        torch.testing.assert_close(twice, 2 * once)


@each_implementation
def test_backward_again_with_large_logits(implementation):
    """Rounded to 16 bits they are off by up to 0.5: a pass that does not round as the first would be off by e^0.5."""
    dtype = torch.float16 if implementation.any_upstream else torch.bfloat16
    problem = random_problem(13, 24, 203).to(dtype)
    leaves = [(64 * problem.input.detach()).requires_grad_(), problem.linear_weight]
    loss = implementation.linear_cross_entropy(leaves[0], leaves[1], problem.target)
    first = [gradient.float() for gradient in torch.autograd.grad(loss, leaves, retain_graph=True)]
    second = [gradient.float() for gradient in torch.autograd.grad(loss, leaves)]
    for once, again in zip(first, second, strict=True):
        assert (again - once).norm() <= 2.0**-9 * once.norm()


@each_implementation
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_accumulate(implementation, reduction):
    """Several backward calls, through one graph and through others, add up in ``.grad``."""
    skip_unless_serves(implementation, reduction)
    problem = replace(BUSY, dtype=torch.float32, reduction=reduction).problem()
    leaves = problem.leaves()
    once = loss_and_gradients(implementation.linear_cross_entropy, problem)
    loss = problem.call(implementation.linear_cross_entropy)
    upstream = upstream_for(loss)
    loss.backward(upstream, retain_graph=True)
    loss.backward(upstream)
    problem.call(implementation.linear_cross_entropy).backward(upstream)
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad, 3 * once[name])


@each_implementation
def test_second_derivatives_are_refused(implementation):
    problem = Case(dtype=torch.float64, reduction="sum").problem()
    loss = problem.call(implementation.linear_cross_entropy)

    def differentiate_twice():
        (gradient,) = torch.autograd.grad(loss, problem.input, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="second derivatives"):
        differentiate_twice()


@each_any_upstream
def test_second_derivatives_of_statistics_are_refused(implementation):
    problem = Case(dtype=torch.float64).head_problem()
    loss = problem.call(implementation.float_statistics)["entropy"].sum()

    def differentiate_twice():
        (gradient,) = torch.autograd.grad(loss, problem.input, create_graph=True)
        gradient.square().sum().backward()

    with pytest.raises(RuntimeError, match="second derivatives"):
        differentiate_twice()


@each_implementation
def test_inputs_changed_before_backward(implementation):
    """Changing the weight in place before backward is an error, or has no effect where the gradient is made already."""
    problem = Case(dtype=torch.float32, reduction="sum").problem()
    expected = loss_and_gradients(implementation.linear_cross_entropy, problem)
    loss = problem.call(implementation.linear_cross_entropy)
    with torch.no_grad():
        problem.linear_weight.mul_(2)
    leaves = problem.leaves()
    given, refusal = (), ""
    try:
        given = torch.autograd.grad(loss, list(leaves.values()), upstream_for(loss))
    except RuntimeError as error:
        refusal = str(error)
    assert given or "modified by an inplace operation" in refusal
    for name, gradient in zip(leaves, given, strict=False):
        torch.testing.assert_close(gradient, expected[name])


@each_implementation
def test_arguments_are_left_alone(implementation):
    problem = replace(BUSY, dtype=torch.float32).problem()
    before = problem.map(torch.clone)
    target = problem.target.clone()
    loss_and_gradients(implementation.linear_cross_entropy, problem)
    assert torch.equal(problem.target, target)
    assert torch.equal(problem.input, before.input)
    assert torch.equal(problem.linear_weight, before.linear_weight)
    for name, value in before.options.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(problem.options[name], value)


# --- front doors ------------------------------------------------------------------------------------------------------


def test_module_is_the_function():
    problem = replace(BUSY, dtype=torch.float32).problem()
    tensors = {name: problem.options[name] for name in ("linear_bias", "token_weight")}
    fixed = {name: value for name, value in problem.options.items() if name not in tensors}
    module = logitless.LinearCrossEntropyLoss(**fixed, backend="torch")

    def call(input, linear_weight, target, **_):
        return module(input, linear_weight, target, normalizer=7.5, **tensors)

    ours = loss_and_gradients(call, problem)
    theirs = loss_and_gradients(logitless.linear_cross_entropy, problem, normalizer=7.5, backend="torch")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name])


def test_auto_is_an_exact_backend():
    problem = replace(BUSY, dtype=torch.float32).problem()
    loss_baseline(problem).check(loss_and_gradients(logitless.linear_cross_entropy, problem))


@pytest.mark.parametrize("strategy", ["stored", "chunked", "windowed"])
def test_forced_strategy_is_forced_inside_only(strategy):
    """Forcing ends with its block, so that one test cannot change another."""
    arguments = {"tokens": 64, "hidden": 8, "vocabulary": 515, "dtype": torch.float32}
    before = logitless.plan(**arguments).strategy
    with logitless.schedules.force_strategy(strategy):
        assert logitless.plan(**arguments).strategy == strategy
    assert logitless.plan(**arguments).strategy == before


# --- the suite itself -------------------------------------------------------------------------------------------------


def spoil(results: dict[str, torch.Tensor], name: str, relative: float) -> dict[str, torch.Tensor]:
    """One result off by a relative error of random sign at every element."""
    value = results[name]
    signs = torch.randn(value.shape, generator=generator(9), dtype=torch.float64).sign().to(value.dtype)
    return {**results, name: value * (1 + relative * signs)}


@pytest.mark.parametrize("name", ["loss", "input", "linear_weight", "linear_bias"])
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)], ids=str
)
def test_tolerance_can_fail(name, dtype, relative):
    problem = replace(BUSY, dtype=dtype, reduction="none").problem()
    results = loss_and_gradients(REFERENCE.linear_cross_entropy, problem)
    loss_baseline(problem).check(results)
    with pytest.raises(AssertionError, match=name):
        loss_baseline(problem).check(spoil(results, name, relative))


def test_make_problem_kinds():
    """Peaked is peaked and flat is flat."""
    confidence = {}
    for data in ("peaked", "flat"):
        problem = make_problem(data, 32, 24, 203)
        confidence[data] = plain.logits(problem.input, problem.linear_weight).softmax(-1).amax(1).median().item()
    assert confidence["peaked"] > 0.9
    assert confidence["flat"] < 0.02
