"""A head sharded over the ranks of a group gives what one process with the whole head gives.

The processes of one world size are started once and run all its cases; each test then looks at one of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
import workers
from comparison import (
    baseline_of,
    check,
    check_drawn_loss,
    check_integers,
    check_refusal,
    check_unbiased,
    joined,
)
from sharded import (
    SHARES,
    Arguments,
    Call,
    Counted,
    Draws,
    Halves,
    Mistake,
    Ties,
    bounds,
    in_step,
    sleep,
    stumble,
    world_group,
)
from torch import Tensor
from workers import Member, Outcome

import logitless
from implementations import (
    CHUNKED,
    LOSS_ONLY,
    REFERENCE,
    REFERENCE_SAMPLED,
    SAMPLED,
    STORED,
    TORCH,
    WINDOWED,
    Implementation,
)
from logitless.options import BLOCK, TOKEN_OUTPUTS
from problems import LOSS_FACTORS, STATISTICS_FACTORS, Case, all_pairs
from test_sampled import DRAWS
from tolerance import Results

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

WORLDS = (2, 3, 4)
# Seconds after which the processes of a world are killed, and in which a mistake must be found.
LIMIT = 150
SOON = 5

AUTO = Implementation("auto", "auto")
NATURAL = Implementation("torch", "torch")

BUSY = Case(
    dtype=torch.float32,
    bias=True,
    class_weight=True,
    token_weight=True,
    ignored=True,
    label_smoothing=0.125,
    z_loss=2.0**-7,
    softcap=5.0,
)


# --- cases ------------------------------------------------------------------------------------------------------------


def served(choice: dict[str, object]) -> dict[str, object]:
    """A choice of factors as the call takes it: a normaliser is no reduction, and chunks need a reduced loss."""
    if choice["reduction"] == "normalizer":
        return {**choice, "reduction": "mean", "normalizer": 7.5}
    if choice["reduction"] == "none" and not choice["implementation"].any_upstream:
        return {**choice, "reduction": "sum"}
    return choice


def paired(size: int, factors: dict[str, tuple], implementations: tuple[Implementation, ...], function: str) -> list:
    """Calls in which every pair of values of two factors occurs, backend, strategy and both shardings among them."""
    layouts = tuple(SHARES[size])
    calls = []
    for choice in all_pairs(
        {**factors, "implementation": implementations, "shares": layouts, "tokens": (None, *layouts)}
    ):
        choice = served(choice) if function == "loss" else dict(choice)
        implementation = choice.pop("implementation")
        shares, tokens = SHARES[size][choice.pop("shares")], SHARES[size].get(choice.pop("tokens"))
        calls.append(Call(Case(**choice), shares, implementation, function, tokens))
    return calls


def strategies(size: int) -> dict[str, Call]:
    """Every strategy with every sharding of the vocabulary."""
    return {
        f"{implementation}, {layout}": Call(BUSY, shares, implementation)
        for layout, shares in SHARES[size].items()
        for implementation in (*TORCH, LOSS_ONLY, AUTO, NATURAL)
    }


def sequences(size: int) -> dict[str, Call]:
    """Every strategy with every sharding of the tokens."""
    return {
        f"{implementation}, {layout}, tokens {token_layout}": Call(BUSY, shares, implementation, token_shares=tokens)
        for layout, shares in SHARES[size].items()
        for token_layout, tokens in SHARES[size].items()
        for implementation in (*TORCH, LOSS_ONLY)
    }


ONE = Case(dtype=torch.float32)
FEATURES = {
    "mean": Call(ONE, ()),
    "sum": Call(replace(ONE, reduction="sum"), ()),
    "none": Call(replace(ONE, reduction="none"), ()),
    "float64": Call(Case(), ()),
    "bfloat16": Call(Case(dtype=torch.bfloat16), ()),
    "float16": Call(Case(dtype=torch.float16), ()),
    "peaked": Call(replace(ONE, data="peaked"), ()),
    "larger": Call(replace(ONE, vocabulary=1237, leading=(48,)), ()),
    "bias": Call(replace(ONE, bias=True), ()),
    "class weights": Call(replace(ONE, class_weight=True), ()),
    "class weights, none": Call(replace(ONE, class_weight=True, reduction="none"), ()),
    "token weights": Call(replace(ONE, token_weight=True), ()),
    "label smoothing": Call(replace(ONE, label_smoothing=0.125), ()),
    "label smoothing and softcap": Call(replace(ONE, label_smoothing=0.125, softcap=5.0), ()),
    "label smoothing and class weights": Call(replace(ONE, label_smoothing=0.125, class_weight=True), ()),
    "nothing but smoothing": Call(replace(ONE, label_smoothing=1.0, class_weight=True), ()),
    "z-loss": Call(replace(ONE, z_loss=2.0**-7), ()),
    "softcap": Call(replace(ONE, softcap=5.0), ()),
    "logit scale": Call(replace(ONE, logit_scale=0.75, bias=True), ()),
    "ignored": Call(replace(ONE, ignored=True), ()),
    "normaliser": Call(replace(ONE, normalizer=7.5), ()),
    "normaliser, tensor": Call(replace(ONE, normalizer=7.5), (), tensor_normalizer=True),
    "normaliser and class weights": Call(replace(ONE, normalizer=7.5, class_weight=True), ()),
    "frozen weight": Call(replace(ONE, frozen=("linear_weight",)), ()),
    "frozen weight, bias": Call(replace(BUSY, frozen=("linear_weight",)), ()),
    "frozen input": Call(replace(ONE, frozen=("input",)), ()),
    "frozen input and bias": Call(replace(BUSY, frozen=("input", "linear_bias")), ()),
    "all frozen": Call(replace(BUSY, frozen=("input", "linear_weight", "linear_bias")), ()),
    "leading shape, mean": Call(replace(BUSY, leading=(3, 4)), ()),
    "leading shape, none": Call(replace(BUSY, leading=(3, 4), reduction="none"), ()),
    "one token without a leading shape": Call(replace(BUSY, leading=()), ()),
    "main_grad": Call(BUSY, (), main_grad=True),
    "main_grad, bfloat16": Call(replace(BUSY, dtype=torch.bfloat16), (), main_grad=True),
    "main_grad, frozen input": Call(replace(BUSY, frozen=("input",)), (), main_grad=True),
    "shard without mass": Call(replace(ONE, bias=True), (), masked_shard=1),
    "backward twice": Call(BUSY, (), backwards=2),
}
# By strategies that leave something different for a second pass.
RETAINED = tuple(Call(BUSY, (), implementation, backwards=2) for implementation in (STORED, CHUNKED, WINDOWED, SAMPLED))
ADDED = tuple(Call(BUSY, (), implementation, main_grad=True) for implementation in (STORED, WINDOWED, SAMPLED))


def features(size: int) -> dict[str, Call]:
    """One option at a time, on both backends."""
    shares = SHARES[size]["uneven"]
    named = {
        f"{name}, {implementation}": replace(call, shares=shares, implementation=implementation)
        for name, call in FEATURES.items()
        for implementation in (NATURAL, REFERENCE)
    }
    others = {str(call): call for call in (replace(call, shares=shares) for call in (*RETAINED, *ADDED))}
    masked = {
        f"shard without mass, {implementation}": replace(FEATURES["shard without mass"], implementation=implementation)
        for implementation in (CHUNKED, WINDOWED, SAMPLED)
    }
    return {**named, **others, **{name: replace(call, shares=shares) for name, call in masked.items()}}


def empty_batches(size: int) -> dict[str, Call]:
    """No token counts."""
    shares, tokens = SHARES[size]["uneven"], SHARES[size]["empty"]
    calls = {}
    for implementation in (*TORCH, NATURAL):
        for token_shares in (None, tokens):
            ways = {
                "all ignored": Call(BUSY, shares, all_ignored=True),
                "no tokens": Call(replace(BUSY, leading=(0,)), shares),
            }
            for way, call in ways.items():
                where = "" if token_shares is None else ", sequence parallel"
                calls[f"{way}, {implementation}{where}"] = replace(
                    call, implementation=implementation, token_shares=token_shares
                )
    return calls


def by_text(calls: list[Call]) -> dict[str, Call]:
    return {str(call): call for call in calls}


LOSSES = {
    size: {
        **strategies(size),
        **sequences(size),
        **by_text(paired(size, LOSS_FACTORS, (*TORCH, LOSS_ONLY), "loss")),
        **(features(size) if size == 3 else {}),
    }
    for size in WORLDS
}
STATISTICS = {
    size: {
        **by_text(
            paired(
                size,
                STATISTICS_FACTORS,
                (REFERENCE, REFERENCE_SAMPLED, STORED, WINDOWED, SAMPLED, LOSS_ONLY),
                "statistics",
            )
        ),
        "leading shape": Call(replace(BUSY, leading=(3, 4)), SHARES[size]["uneven"], NATURAL, "statistics"),
        "all ignored": Call(BUSY, SHARES[size]["even"], NATURAL, "statistics", all_ignored=True),
    }
    for size in WORLDS
}
EMPTY = {size: empty_batches(size) for size in WORLDS}

TIES = (REFERENCE, STORED, WINDOWED, SAMPLED, LOSS_ONLY)

# Forward collectives, backward ones, and what is called.
SIMPLE = Case(dtype=torch.float32)
WEIGHTED = replace(SIMPLE, class_weight=True)
FROZEN = replace(SIMPLE, frozen=("input",))
SAMPLED_WHOLE = replace(SAMPLED, rows=32)  # more than all tokens
REDUCED, SCATTERED = ["all-reduce"], ["reduce-scatter"]
Count = tuple[int, list[str], Call, tuple[str, ...]]
COUNTS: dict[str, Count] = {
    **{str(way): (1, REDUCED, Call(SIMPLE, (), way), ("nll",)) for way in (REFERENCE, STORED, WINDOWED, SAMPLED_WHOLE)},
    "torch-sampled, rows in parts": (1, REDUCED, Call(SIMPLE, (), SAMPLED), ("nll",)),
    "one chunk": (1, REDUCED, Call(SIMPLE, (), replace(CHUNKED, rows=17)), ("nll",)),
    "four chunks": (4, REDUCED, Call(SIMPLE, (), CHUNKED), ("nll",)),
    "four chunks, class weights": (5, REDUCED, Call(WEIGHTED, (), CHUNKED), ("nll",)),
    "no gradient": (1, [], Call(SIMPLE, (), replace(LOSS_ONLY, rows=17)), ("nll",)),
    "frozen input": (1, [], Call(FROZEN, (), STORED), ("nll",)),
    "frozen weight": (1, REDUCED, Call(replace(SIMPLE, frozen=("linear_weight",)), (), STORED), ("nll",)),
    "bias, softcap, z-loss, token weights": (
        1,
        REDUCED,
        Call(replace(BUSY, class_weight=False, label_smoothing=0.0), (), STORED),
        ("nll",),
    ),
    "label smoothing": (1, REDUCED, Call(replace(SIMPLE, label_smoothing=0.125), (), STORED), ("nll",)),
    "class weights": (2, REDUCED, Call(WEIGHTED, (), STORED), ("nll",)),
    "class weights and label smoothing": (
        2,
        REDUCED,
        Call(replace(WEIGHTED, label_smoothing=0.125), (), STORED),
        ("nll",),
    ),
    "statistics": (1, REDUCED, Call(SIMPLE, (), STORED, "statistics"), ("nll", "entropy", "logsumexp", "prediction")),
    "target rank": (2, REDUCED, Call(SIMPLE, (), STORED, "statistics"), TOKEN_OUTPUTS),
    "sequence parallel, frozen input": (2, [], Call(FROZEN, (), STORED), ("nll",)),
    **{
        f"sequence parallel, {way}": (2, SCATTERED, Call(SIMPLE, (), way), ("nll",))
        for way in (REFERENCE, STORED, WINDOWED, SAMPLED_WHOLE)
    },
    "sequence parallel, uneven": (2, SCATTERED, Call(SIMPLE, (), STORED), ("nll",)),
    "sequence parallel, target rank": (3, SCATTERED, Call(SIMPLE, (), STORED, "statistics"), TOKEN_OUTPUTS),
}


def counted(size: int, counts: dict[str, Count] = COUNTS) -> dict[str, Counted]:
    """Seventeen tokens are never even: sequence parallel cases have the next number that is, such as eighteen."""
    cases = {}
    for name, (_, _, call, outputs) in counts.items():
        call = replace(call, shares=SHARES[size]["uneven"])
        if name.startswith("sequence parallel"):
            layout = "uneven" if "uneven" in name else "even"
            tokens = 17 + -17 % size
            call = replace(call, token_shares=SHARES[size][layout], case=replace(call.case, leading=(tokens,)))
        cases[f"later call, {name}"] = Counted(call, outputs)
        cases[f"first call, {name}"] = Counted(call, outputs, first=True)
    return cases


SAMPLE = replace(SIMPLE, vocabulary=BLOCK * 9 + 85, leading=(16,))
THRESHOLD = 1 / 8
SAMPLED_SHARES = (3, 4, 2)
DRAWN = {
    "torch": Call(replace(SAMPLE, bias=True, label_smoothing=0.25, softcap=3.0), SAMPLED_SHARES, NATURAL),
    "reference": Call(replace(SAMPLE, data="mixed"), SAMPLED_SHARES, REFERENCE),
    "sequence parallel": Call(replace(SAMPLE, data="mixed"), SAMPLED_SHARES, NATURAL, token_shares=(2, 1, 1)),
}
SEEDS = {"own seeds": (1, 2, 3), "one seed": (4, 4, 4)}


def drawn() -> dict[str, Draws]:
    cases = {f"{name}, own seeds": Draws(call, THRESHOLD, DRAWS, SEEDS["own seeds"]) for name, call in DRAWN.items()}
    return {**cases, "torch, one seed": Draws(DRAWN["torch"], THRESHOLD, DRAWS, SEEDS["one seed"])}


AGAIN = Draws(DRAWN["torch"], THRESHOLD, 2, SEEDS["own seeds"])


DTYPES = [r"(torch\.)?float32", r"(torch\.)?bfloat16"]
# What one rank passes that the others do not, and words of the message, as patterns.
ODD: dict[str, tuple[Arguments, list[str]]] = {
    "tokens": (Arguments(tokens=25), ["tokens|input|target", "24", "25"]),
    "one token": (Arguments(tokens=1), ["tokens|input|target", "24", "1"]),
    "no tokens": (Arguments(tokens=0), ["tokens|input|target", "24", "0"]),
    "hidden size": (Arguments(hidden=17), ["hidden|input", "16", "17"]),
    "dtype": (Arguments(dtype=torch.bfloat16), DTYPES),
    "dtype of the weight": (
        Arguments(weight_dtype=torch.bfloat16),
        ["linear_weight", *DTYPES],
    ),
    "softcap": (Arguments(options={"softcap": 5.0}), ["softcap", "5.0", "None"]),
    "logit_scale": (Arguments(options={"logit_scale": 0.75}), ["logit_scale", "0.75", "1.0"]),
    "label_smoothing": (Arguments(options={"label_smoothing": 0.125}), ["label_smoothing", "0.125", "0.0"]),
    "z_loss": (Arguments(options={"z_loss": 0.25}), ["z_loss", "0.25", "0.0"]),
    "reduction": (Arguments(options={"reduction": "sum"}), ["reduction", "sum", "mean"]),
    "ignore_index": (Arguments(options={"ignore_index": -1}), ["ignore_index", "-1", "-100"]),
    "gradient": (Arguments(options={"gradient": logitless.Sampled()}), ["gradient", "exact", "[Ss]ampled"]),
    "sequence_parallel": (Arguments(options={"sequence_parallel": True}), ["sequence_parallel", "True", "False"]),
    "function": (Arguments(function="statistics"), []),
    "target": (Arguments(target=1), ["target"]),
    "target beyond all shards": (Arguments(target=999), ["target"]),
}
SAMPLED_MORE, SAMPLED_LESS = (Arguments(options={"gradient": logitless.Sampled(t)}) for t in (1 / 8, 1 / 4))
STATISTIC = Arguments(function="statistics", options={"outputs": ("nll", "entropy")})


def odd(size: int, rank: int, arguments: Arguments, usual: Arguments | None = None) -> Mistake:
    usual = usual or Arguments()
    return Mistake(tuple(arguments if other == rank else usual for other in range(size)))


def shared_mistakes(size: int) -> dict[str, tuple[Mistake, list[str]]]:
    """Mistakes that no rank can see in another rank's arguments alone."""
    entries = 30 * size
    fp8 = logitless.Sampled(scan="fp8")
    alike = {
        "target too large": (Arguments(target=entries), ["target", str(entries), "23"]),
        "target far too large": (Arguments(target=2**40), ["target", str(2**40), "23"]),
        "target negative": (Arguments(target=-3), ["target", "-3", "23"]),
        "target too large, statistics": (
            Arguments(target=entries, function="statistics"),
            ["target", str(entries), "23"],
        ),
        "target too large, reference": (
            Arguments(target=entries, options={"backend": "reference"}),
            ["target", str(entries), "23"],
        ),
        "all shards empty": (Arguments(entries=0), ["linear_weight", "0|no|none|empty"]),
        "fp8": (Arguments(options={"gradient": fp8}), ["fp8", "group"]),
        "sequence parallel, rows missing": (
            Arguments(rows=10, options={"sequence_parallel": True}),
            ["24", str(10 * size)],
        ),
    }
    return {name: (Mistake((arguments,) * size), named) for name, (arguments, named) in alike.items()}


def mistakes(size: int) -> dict[str, tuple[Mistake, list[str]]]:
    found = {name: (odd(size, size - 1, arguments), named) for name, (arguments, named) in ODD.items()}
    for name in ("tokens", "softcap"):
        arguments, named = ODD[name]
        found[f"{name}, first rank"] = (odd(size, 0, arguments), named)
    other = replace(STATISTIC, options={"outputs": ("nll", "logsumexp")})
    found["outputs"] = (odd(size, size - 1, STATISTIC, other), ["outputs", "entropy", "logsumexp"])
    found["threshold"] = (odd(size, size - 1, SAMPLED_LESS, SAMPLED_MORE), ["gradient", "0.125", "0.25"])
    whole, longer = (Arguments(tokens=n, rows=24 // size, options={"sequence_parallel": True}) for n in (24, 25))
    found["sequence parallel, tokens"] = (odd(size, size - 1, longer, whole), ["24", "25"])
    deep = Arguments(rows=24 // size, hidden=17, options={"sequence_parallel": True})
    found["sequence parallel, hidden size"] = (odd(size, size - 1, deep, whole), ["16", "17"])
    return {**found, **shared_mistakes(size)}


# What one rank passes that the others do not, where neither a result nor a refusal is wrong, but waiting is.
UNLIKE = {
    "input without gradient": Arguments(input_gradient=False),
    "linear_bias": Arguments(given=("linear_bias",)),
    "weight": Arguments(given=("weight",)),
    "token_weight": Arguments(given=("token_weight",)),
    "main_grad": Arguments(given=("main_grad",)),
    "normalizer": Arguments(options={"normalizer": 24.0}),
    "backend": Arguments(options={"backend": "reference"}),
    "workspace": Arguments(options={"workspace": "1GiB"}),
}

MISTAKES = {size: mistakes(size) for size in WORLDS}

# From too little for anything to enough for all logits, with shards whose plans would differ.
LARGER = replace(BUSY, vocabulary=1237, leading=(60,))
PLANNED = {
    size: {
        f"{2**power} bytes": Call(LARGER, (1, *[30] * (size - 1)), NATURAL, workspace=2**power)
        for power in range(10, 22)
    }
    for size in WORLDS
}
HALVES = tuple(Call(replace(BUSY, data=data), SHARES[2]["uneven"], NATURAL) for data in ("random", "peaked"))


def cases_of(size: int) -> dict[str, workers.Case]:
    """All that the processes of one world run, the most trusted first."""
    return {
        "stumble": stumble,
        "in step": in_step,
        "world group": world_group,
        **({"halves": Halves(HALVES)} if size == 4 else {}),
        **{f"loss {name}": call for name, call in LOSSES[size].items()},
        **{f"statistics {name}": call for name, call in STATISTICS[size].items()},
        **{f"empty {name}": call for name, call in EMPTY[size].items()},
        **{f"ties {implementation}": Ties(implementation, size) for implementation in TIES},
        **{f"workspace {name}": call for name, call in PLANNED[size].items()},
        **{f"count {name}": case for name, case in counted(size).items()},
        **({f"draws {name}": case for name, case in drawn().items()} if size == 3 else {}),
        **({"draws again": AGAIN} if size == 3 else {}),
        "target elsewhere": Mistake((Arguments(target=30 * size - 1),) * size),
        **{f"mistake {name}": mistake for name, (mistake, _) in MISTAKES[size].items()},
        **{f"unlike {name}": odd(size, size - 1, arguments) for name, arguments in UNLIKE.items()},
        "in step at the end": in_step,
    }


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[Outcome]]]:
    """The outcomes of one world's cases by name and rank; its processes run at the first call."""

    @lru_cache
    def run(size: int) -> dict[str, list[Outcome]]:
        return workers.run(cases_of(size), size, tmp_path_factory.mktemp(f"world{size}"), LIMIT)

    return run


def each(names: dict[int, dict[str, object]]) -> pytest.MarkDecorator:
    cases = [(size, name) for size in names for name in names[size]]
    return pytest.mark.parametrize(("size", "name"), cases, ids=[f"{size}:{name}" for size, name in cases])


each_world = pytest.mark.parametrize("size", WORLDS)


# --- values -----------------------------------------------------------------------------------------------------------


@each(LOSSES)
def test_loss_and_gradients(ran, size, name):
    check(LOSSES[size][name], ran(size)[f"loss {name}"])


def test_check_can_fail(ran):
    """A bit of one rank's loss, and a hundred-thousandth of one rank's gradient, are found."""
    call, outcomes = LOSSES[2]["torch-stored, even"], ran(2)["loss torch-stored, even"]
    check(call, outcomes)

    def with_changed(name: str, change: Callable[[Tensor], Tensor]) -> list[Outcome]:
        result = outcomes[1].result
        return [outcomes[0], replace(outcomes[1], result={**result, name: change(result[name])})]

    with pytest.raises(AssertionError, match="loss differs between rank 0 and rank 1"):
        check(call, with_changed("loss", lambda loss: loss.nextafter(torch.tensor(0.0))))
    for name in call.problem().leaves():
        with pytest.raises(AssertionError, match=f"{name}: error"):
            check(call, with_changed(name, lambda gradient: gradient * (1 + 1e-5)))


@each(STATISTICS)
def test_statistics_and_gradients(ran, size, name):
    """All statistics at the same time, the floats with their own upstream gradients."""
    call, outcomes = STATISTICS[size][name], ran(size)[f"statistics {name}"]
    check(call, outcomes)
    check_integers(call, workers.values(outcomes)[0])


@each(EMPTY)
def test_no_token_counts(ran, size, name):
    """Loss and gradients are zeros, of the shapes they have otherwise."""
    call = EMPTY[size][name]
    results = workers.values(ran(size)[f"empty {name}"])
    whole = call.alone()
    for rank in range(size):
        result = joined(call, results, rank)
        assert result.keys() == whole.keys()
        for which, value in result.items():
            assert torch.equal(value, torch.zeros_like(whole[which])), which


@each_world
@pytest.mark.parametrize("implementation", TIES, ids=str)
def test_ties_between_shards(ran, size, implementation):
    """Of equal logits in different shards the first rank's is predicted, and the rank counts strictly larger ones."""
    case = Ties(implementation, size)
    scores, target = case.scores(), case.target()
    larger = (scores > scores.gather(1, (target % case.each)[:, None])).sum(1) * size
    for result in workers.values(ran(size)[f"ties {implementation}"]):
        assert torch.equal(result["prediction"], scores.argmax(1))
        assert torch.equal(result["target_rank"], larger)


@each_world
def test_shards_have_the_gradients_shapes(ran, size):
    """A rank's gradients are as its own arguments are, on ranks without entries or tokens too."""
    for name, call in LOSSES[size].items():
        if not ran(size)[f"loss {name}"][0].failed and call.implementation.strategy != "loss_only":
            ends = bounds(call.case.vocabulary, call.shares)
            for rank, result in enumerate(workers.values(ran(size)[f"loss {name}"])):
                for which in ("linear_weight", "linear_bias"):
                    assert which not in result or len(result[which]) == ends[rank + 1] - ends[rank], name


@each_world
def test_default_group(ran, size):
    check(Call(ONE, SHARES[size]["uneven"]), ran(size)["world group"])


def test_groups_side_by_side(ran):
    """Ranks are those in the group: two groups of two work on different batches at the same time."""
    outcomes = ran(4)["halves"]
    check(HALVES[0], outcomes[:2])
    check(HALVES[1], outcomes[2:])


@each(PLANNED)
def test_any_workspace(ran, size, name):
    """Ranks with one entry and with many follow plans that go together, or all refuse the workspace."""
    outcomes = ran(size)[f"workspace {name}"]
    if all("ValueError" in outcome.kinds for outcome in outcomes):
        assert all("workspace" in outcome.message for outcome in outcomes)
    else:
        check(PLANNED[size][name], outcomes)


@each_world
def test_some_workspace_serves(ran, size):
    """The largest is far more than all logits need."""
    workers.values(ran(size)[f"workspace {list(PLANNED[size])[-1]}"])


# --- collectives ------------------------------------------------------------------------------------------------------


def check_counts(outcomes: list[Outcome], count: Count) -> None:
    forward, backward, *_ = count
    for kinds in workers.values(outcomes):
        assert len(kinds["forward"]) == forward, kinds
        assert "all-gather" in kinds["forward"], kinds
        assert kinds["backward"] == backward, kinds


@each_world
@pytest.mark.parametrize("name", COUNTS)
def test_collectives(ran, size, name):
    check_counts(ran(size)[f"count later call, {name}"], COUNTS[name])


@each_world
@pytest.mark.parametrize("name", COUNTS)
def test_collectives_of_a_first_call(ran, size, name):
    check_counts(ran(size)[f"count first call, {name}"], COUNTS[name])


# --- samples ----------------------------------------------------------------------------------------------------------

each_draw = pytest.mark.parametrize("name", drawn())
each_whole_draw = pytest.mark.parametrize(
    "name", [name for name, case in drawn().items() if not case.call.token_shares]
)


def draws_of(ran: Callable, name: str) -> tuple[Call, list[Results]]:
    return drawn()[name].call, workers.values(ran(3)[f"draws {name}"])


@each_draw
def test_sampled_gradient_is_unbiased(ran, name):
    check_unbiased(*draws_of(ran, name))


@each_draw
def test_sampled_loss_is_exact(ran, name):
    check_drawn_loss(*draws_of(ran, name))


@each_whole_draw
def test_ranks_agree_on_the_hidden_gradient(ran, name):
    """It is the sum of all ranks' samples on every rank, up to the order of a sum of three."""
    _, results = draws_of(ran, name)
    for result in results:
        torch.testing.assert_close(result["input"], results[0]["input"])


def test_seeds_decide_the_gradient(ran):
    """The same seeds give the same blocks; draw after draw gives others."""
    _, first = draws_of(ran, "torch, own seeds")
    for once, again in zip(first, workers.values(ran(3)["draws again"]), strict=True):
        for name, draws in again.items():
            torch.testing.assert_close(draws, once[name][:2])
        assert (again["input"][0] - again["input"][1]).norm() > 1e-2 * again["input"][0].norm()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@each(MISTAKES)
def test_mistakes(ran, size, name):
    check_refusal(ran(size)[f"mistake {name}"], MISTAKES[size][name][1], SOON)


@each_world
def test_target_in_another_shard(ran, size):
    """The last entry of the whole vocabulary is a target like any other, beyond each rank's own number of entries."""
    workers.values(ran(size)["target elsewhere"])


@each_world
@pytest.mark.parametrize("name", UNLIKE)
def test_nothing_waits_in_vain(ran, size, name):
    """Where one rank is given less or more to do than the others, all serve the call or all refuse it."""
    outcomes = ran(size)[f"unlike {name}"]
    if not all("ValueError" in outcome.kinds for outcome in outcomes):
        workers.values(outcomes)
    assert all(outcome.seconds < SOON for outcome in outcomes)


# --- a group of one ---------------------------------------------------------------------------------------------------


@pytest.fixture
def group_of_one() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("implementation", TORCH, ids=str)
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_group_of_one(group_of_one, implementation, sequence_parallel):
    call = Call(BUSY, (1,), implementation, token_shares=(1,) if sequence_parallel else None)
    baseline_of(call).check(call(Member(0, 1, group_of_one)))


def test_compile_is_refused(group_of_one):
    hidden, weight = torch.ones(4, 8), torch.ones(11, 8)
    target = torch.zeros(4, dtype=torch.int64)

    def loss() -> Tensor:
        return logitless.linear_cross_entropy(hidden, weight, target, group=group_of_one)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="group") as error:
        torch.compile(loss, fullgraph=True, backend="aot_eager")()
    torch._dynamo.reset()
    assert isinstance(error.value, NotImplementedError) or "NotImplementedError" in str(error.value)


# --- the processes themselves -----------------------------------------------------------------------------------------


@each_world
def test_an_exception_does_not_stop_the_others(ran, size):
    first, *others = ran(size)["stumble"]
    assert first.kinds[0] == "LookupError"
    assert "rank 0 stumbled" in first.trace
    assert not any(outcome.failed for outcome in others)
    with pytest.raises(AssertionError, match="rank 0 stumbled"):
        workers.values(ran(size)["stumble"])


@each_world
@pytest.mark.parametrize("name", ["in step", "in step at the end"])
def test_ranks_are_in_step(ran, size, name):
    totals = [float(result["total"]) for result in workers.values(ran(size)[name])]
    assert totals == [sum(range(size))] * size


@each_world
def test_nothing_warns(ran, size):
    """As everywhere in these tests, a warning is an error."""
    warned = {text for outcomes in ran(size).values() for outcome in outcomes for text in outcome.warned}
    assert not warned


def test_processes_are_killed(tmp_path):
    """A case that never ends costs no more than the limit, and leaves behind where it was."""
    start = time.monotonic()
    outcomes = workers.run({"in step": in_step, "sleep": sleep}, 2, tmp_path, limit=2)
    assert time.monotonic() - start < workers.START_LIMIT
    workers.values(outcomes["in step"])
    with pytest.raises(AssertionError, match="in sleep"):
        workers.values(outcomes["sleep"])
