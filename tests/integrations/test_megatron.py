"""The loss of Megatron-core's own layers and models, without logits, is Megatron's.

Processes with gloo on the CPU run Megatron-core's ``ColumnParallelLinear``, ``GPTModel`` and data parallelism, each
once with its own loss and once with ours; both are compared with fp64 in one process. Bounds are those of
``tolerance``, with Megatron's result in the place of plain PyTorch.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("megatron.core")
sys.path.append(str(Path(__file__).parents[1] / "distributed"))

import workers
from megatron_cases import (
    BATCH,
    MISTAKES,
    Draws,
    Head,
    Mistake,
    Model,
    OneRankErrs,
    SameDraw,
    SampledModel,
    Single,
    Untouched,
    evaluated,
    stages,
)
from workers import Outcome

import plain
from test_sampled import assert_unbiased
from tolerance import Baseline, Results, loss_and_gradients

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"),
]

# Seconds after which the processes are killed, and in which a mistake must be found.
LIMIT = 150
SOON = 5

BARE = {
    "fp32": Head(1),
    "bf16": Head(1, dtype=torch.bfloat16),
    "bias": Head(1, bias=True),
    "tied": Head(1, tied=True),
    "peaked": Head(1, data="peaked"),
    "frozen weight": Head(1, frozen=("linear_weight",)),
    "frozen input": Head(1, frozen=("input",)),
    "main_grad": Head(1, fusion=True),
    "main_grad, tied, bf16": Head(1, fusion=True, tied=True, dtype=torch.bfloat16),
    "main_grad, frozen weight": Head(1, fusion=True, frozen=("linear_weight",)),
}
# What Megatron's loss does not have.
WITH_OPTIONS = {
    "z-loss and softcap": Head(1, options=(("z_loss", 2.0**-7), ("softcap", 5.0))),
    "label smoothing": Head(1, options=(("label_smoothing", 0.125),)),
    "logit scale": Head(1, bias=True, options=(("logit_scale", 0.75),)),
    "ignored": Head(1, ignored=True),
    "reference": Head(1, options=(("backend", "reference"),)),
}
MODELS = {
    "untied": Model(1),
    "tied": Model(1, tied=True),
    "two heads": Model(1, mtp=True),
    "two heads, tied": Model(1, mtp=True, tied=True),
    "DDP": Model(1, data_parallel="plain", micro_batches=2),
    "DDP, main_grad": Model(1, fusion=True, data_parallel="plain", micro_batches=2),
    "DDP, main_grad, tied": Model(1, fusion=True, tied=True, data_parallel="plain", micro_batches=2),
    "DDP, main_grad, overlap": Model(1, fusion=True, data_parallel="overlapping", micro_batches=2),
    "DDP, main_grad, tied, two heads, overlap": Model(
        1, fusion=True, tied=True, mtp=True, data_parallel="overlapping", micro_batches=2
    ),
}
# (T, whether sequence parallel): in one process, in two.
LAYOUTS = {"one rank": (1, False), "two ranks": (2, False), "two ranks, sequence parallel": (2, True)}


def laid_out(cases: dict, size: int) -> dict[str, Head | Model]:
    return {
        f"{name}, {layout}": replace(case, ranks=ranks, sequence_parallel=sequence_parallel)
        for name, case in cases.items()
        for layout, (ranks, sequence_parallel) in LAYOUTS.items()
        if ranks == size
    }


HEADS = {size: laid_out({**BARE, **WITH_OPTIONS}, size) for size in (1, 2)}
WHOLE = {size: laid_out(MODELS, size) for size in (1, 2)}
# Two ranks with batches of their own, and the whole vocabulary each.
REPLICAS = {name: MODELS[name] for name in MODELS if name.startswith("DDP")}
SAMPLES = {"two ranks": Draws(2), "two ranks, sequence parallel": Draws(2, True)}


def single_of(case: Model, replicas: int = 1) -> tuple[str, Single]:
    """What the case is held to, by what it depends on."""
    batches = case.micro_batches * replicas
    words = [f"{batches} batches", *(word for word in ("tied", "mtp") if getattr(case, word))]
    return f"single {' '.join(words)} / {replicas}", Single(case, replicas)


def cases_of(size: int) -> dict[str, workers.Case]:
    """All that processes of one world do."""
    known: dict[str, workers.Case] = {f"head {name}": case for name, case in HEADS[size].items()}
    known |= {f"model {name}": case for name, case in WHOLE[size].items()}
    known |= {"untouched": Untouched(size), "stages": stages, "evaluated": evaluated}
    if size == 1:
        known |= dict(single_of(case) for case in MODELS.values())
        known |= dict(single_of(case, 2) for case in REPLICAS.values())
        known |= {f"mistake {name}": Mistake(name) for name in MISTAKES}
        return known
    known |= {f"draws {name}": case for name, case in SAMPLES.items()}
    known |= {f"same draw {sequence_parallel}": SameDraw(2, sequence_parallel) for sequence_parallel in (False, True)}
    known |= {f"sampled model {sequence}": SampledModel(2, sequence) for sequence in (False, True)}
    known |= {f"one rank errs {sequence}": OneRankErrs(sequence) for sequence in (False, True)}
    return known | {f"replicas {name}": case for name, case in REPLICAS.items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, list[Outcome]]]:
    """Outcomes of a world size, whose processes start when first asked for."""
    known: dict[int, dict[str, list[Outcome]]] = {}

    def outcomes(size: int) -> dict[str, list[Outcome]]:
        if size not in known:
            known[size] = workers.run(cases_of(size), size, tmp_path_factory.mktemp(f"ranks{size}"), LIMIT)
        return known[size]

    return outcomes


def each(cases: dict[int, dict]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("size", "name"), [(size, name) for size in cases for name in cases[size]])


def assert_same_bits(results: list[Results]) -> None:
    for result in results:
        assert torch.equal(result["loss"], results[0]["loss"])


def assert_of_the_same_problem(baseline: Baseline, dtype: torch.dtype = torch.float32) -> None:
    """Megatron's own error has half the digits of its dtype at least: that of another problem would be no bound."""
    for name, exact in baseline.exact.items():
        error = (baseline.plain[name].double() - exact).norm()
        assert error <= torch.finfo(dtype).eps ** 0.5 * exact.norm(), name


# --- the head ---------------------------------------------------------------------------------------------------------


def joined_head(case: Head, results: list[Results], rank: int) -> Results:
    """A rank's results, with shards put together, and the hidden states' gradient [B, S, D] as in the whole problem."""
    whole = dict(results[rank])
    for name in ("linear_weight", "linear_bias"):
        if name in whole:
            whole[name] = torch.cat([result[name] for result in results])
    if "input" in whole:
        parts = [result["input"] for result in results] if case.sequence_parallel else [whole["input"]]
        whole["input"] = torch.cat(parts).transpose(0, 1)
    return whole


def baseline_of_head(case: Head, megatron: Results) -> Baseline:
    """The bound is Megatron's error, or plain PyTorch's: with options that Megatron's loss does not have, and of a
    weight in bf16 with ``main_grad``, since on a CPU the library's product of two bf16 matrices has a result in bf16.
    """
    problem = case.problem().with_options()
    problem.options.pop("backend", None)
    in_torch = loss_and_gradients(plain.linear_cross_entropy, problem)
    own = in_torch if case.options or case.ignored else megatron
    if case.fusion and case.dtype == torch.bfloat16:
        own = {**megatron, "linear_weight": in_torch["linear_weight"]}
    return Baseline(
        exact=loss_and_gradients(plain.linear_cross_entropy, problem.to(torch.float64)),
        plain=own,
        accumulated=loss_and_gradients(plain.linear_cross_entropy, problem.to(torch.float32), form="statistics"),
        plain_error={},
    )


@each(HEADS)
def test_head(ran, size, name):
    """Loss and gradients of a ``ColumnParallelLinear`` are as exact as with Megatron's loss, on every rank."""
    case, results = HEADS[size][name], workers.values(ran(size)[f"head {name}"])
    assert_same_bits([result["ours"] for result in results])
    for rank in range(size):
        megatron, ours = (joined_head(case, [result[of] for result in results], rank) for of in ("megatron", "ours"))
        baseline = baseline_of_head(case, megatron)
        assert_of_the_same_problem(baseline, case.dtype)
        baseline.check(ours)
        assert ours["loss"].dtype == torch.float32
        assert ours["loss"].is_contiguous()


def test_padding_has_mass(ran):
    """As in Megatron's softmax: the loss is not that of the vocabulary without its padding."""
    case, (result,) = HEADS[1]["fp32, one rank"], workers.values(ran(1)["head fp32, one rank"])
    problem = case.problem().to(torch.float64)
    unpadded = replace(problem, linear_weight=problem.linear_weight[:203])
    assert (result["ours"]["loss"] - unpadded.call(plain.linear_cross_entropy) > 1e-3).all()


# --- sampled ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLES)
def test_sampled_gradient_is_unbiased(ran, name):
    """The mean of K draws comes closer to the exact gradient as 1 / sqrt(K); the loss does not depend on the draw."""
    case, results = SAMPLES[name], workers.values(ran(2)[f"draws {name}"])
    exact = loss_and_gradients(plain.linear_cross_entropy, case.problem())
    for result in results:
        assert (result["loss"] == results[0]["loss"][0]).all()
    torch.testing.assert_close(results[0]["loss"][0], exact["loss"])
    assert_unbiased(torch.cat([result["linear_weight"] for result in results], 1), exact["linear_weight"])
    hidden = [result["input"] for result in results] if case.sequence_parallel else [results[0]["input"]]
    assert_unbiased(torch.cat(hidden, 1).transpose(1, 2), exact["input"])


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sampled_is_that_of_the_library(ran, sequence_parallel):
    """From the same seeds, the same blocks."""
    for result in workers.values(ran(2)[f"same draw {sequence_parallel}"]):
        for name, direct in result["direct"].items():
            assert torch.equal(result["recipe"][name], direct), name


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_sampled_model(ran, sequence_parallel):
    """Losses are those with the exact gradient, to the bit; gradients depend on the seeds and on nothing else."""
    for exact, once, again, other in workers.values(ran(2)[f"sampled model {sequence_parallel}"]):
        assert torch.equal(once["loss"], exact["loss"])
        for name in exact:
            torch.testing.assert_close(once[name], again[name])
        weight = "embedding.word_embeddings.weight"
        for drawn in (exact, other):
            assert (once[weight] - drawn[weight]).norm() > 1e-3 * exact[weight].norm()


# --- models -----------------------------------------------------------------------------------------------------------


def joined_model(outcomes: list[dict], of: str, rank: int) -> Results:
    """A rank's results, with sharded gradients put together, and summed where each rank has a part of the sequence."""
    results, dimensions = [outcome[of] for outcome in outcomes], outcomes[0]["dimensions"]
    whole = {"loss": results[rank]["loss"]}
    for name, dimension in dimensions.items():
        parts = [result[name] for result in results]
        if dimension >= 0:
            whole[name] = torch.cat(parts, dimension)
        else:
            whole[name] = sum(parts) if name in outcomes[0]["summed"] else parts[rank]
    return whole


def baseline_of_model(single: dict[str, Results], megatron: Results) -> Baseline:
    return Baseline(exact=single["exact"], plain=megatron, accumulated=single["accumulated"], plain_error={})


@each(WHOLE)
def test_model(ran, size, name):
    """Losses of a patched ``GPTModel`` and the gradients of all its parameters are as exact as Megatron's."""
    case, outcomes = WHOLE[size][name], workers.values(ran(size)[f"model {name}"])
    (single,) = workers.values(ran(1)[single_of(case)[0]])
    assert_same_bits([outcome["ours"] for outcome in outcomes])
    for rank in range(size):
        baseline = baseline_of_model(single, joined_model(outcomes, "megatron", rank))
        assert_of_the_same_problem(baseline)
        baseline.check(joined_model(outcomes, "ours", rank))


@pytest.mark.parametrize("name", REPLICAS)
def test_replicas(ran, name):
    """Megatron's data parallelism averages our gradients, in ``main_grad`` and not, as it does its own."""
    outcomes = workers.values(ran(2)[f"replicas {name}"])
    (single,) = workers.values(ran(1)[single_of(REPLICAS[name], 2)[0]])
    whole = {
        of: {**outcomes[0][of], "loss": torch.cat([outcome[of]["loss"] for outcome in outcomes])}
        for of in ("megatron", "ours")
    }
    for outcome in outcomes:
        for parameter in outcome["dimensions"]:
            assert torch.equal(outcome["ours"][parameter], outcomes[0]["ours"][parameter])
    baseline = baseline_of_model(single, whole["megatron"])
    assert_of_the_same_problem(baseline)
    baseline.check(whole["ours"])


@pytest.mark.parametrize("size", [1, 2])
def test_what_stays(ran, size):
    """Without labels the logits are Megatron's to the bit; with labels the layer is called, but has none."""
    for result in workers.values(ran(size)["untouched"]):
        assert torch.equal(result["theirs"], result["before"])
        assert torch.equal(result["theirs"], result["after"])
        assert result["has logits"] == [True, False, False, True]
        assert result["layer is as it was"]
        assert result["same state"]
        torch.testing.assert_close(result["uncapped"], result["loss"])
        assert (result["capped"] - result["loss"]).abs().max() > 1e-2
        assert result["capped"].shape[0] == BATCH


@pytest.mark.parametrize("size", [1, 2])
def test_evaluation(ran, size):
    for result in workers.values(ran(size)["evaluated"]):
        torch.testing.assert_close(result["ours"], result["megatron"])


@pytest.mark.parametrize("size", [1, 2])
def test_other_stages_are_left_alone(ran, size):
    assert all(workers.values(ran(size)["stages"]))


# --- mistakes ---------------------------------------------------------------------------------------------------------

EXPECTED: dict[str, tuple[str, list[str]]] = {
    "another layer": ("TypeError", ["output_layer", "ColumnParallelLinear", "RowParallelLinear"]),
    "a layer derived": ("TypeError", ["output_layer", "ColumnParallelLinear", "LoRALinear"]),
    "a plain layer": ("TypeError", ["output_layer", "ColumnParallelLinear", "Linear"]),
    "no group": ("TypeError", ["output_layer", "tp_group", "0.13"]),
    "experts": ("ValueError", ["output_layer", "is_expert"]),
    "no reduction": ("ValueError", ["output_layer", "disable_grad_reduce"]),
    "bias left to the caller": ("ValueError", ["output_layer", "skip_bias_add"]),
    "deferred": ("ValueError", ["output_layer", "defer_embedding_wgrad_compute"]),
    "no weight": ("ValueError", ["weight", "shared_embedding_or_output_weight"]),
    "shape of the weight": ("ValueError", ["weight", r"\(256, 32\)", r"\(255, 32\)"]),
    "kind of weight": ("TypeError", ["weight", "Lookalike"]),
    "Megatron-FSDP": ("TypeError", ["weight", "Megatron-FSDP"]),
    "no main_grad": ("ValueError", ["weight", "main_grad", "gradient_accumulation_fusion"]),
    "bf16 main_grad": ("ValueError", ["main_grad", "torch.float32", "torch.bfloat16", "grad_reduce_in_fp32"]),
    "labels not transposed": ("ValueError", ["labels", r"\(2, 8\)", r"\(8, 2\)"]),
    "hidden flattened": ("ValueError", ["hidden", r"\(16, 32\)"]),
    "unknown option": ("TypeError", ["language_model_loss", "zloss", "z_loss"]),
    "decided option": ("TypeError", ["language_model_loss", "reduction"]),
    "label outside": ("ValueError", ["target", "256"]),
    "patch, unknown option": ("TypeError", ["patch", "zloss", "z_loss"]),
    "patch, decided option": ("TypeError", ["patch", "group"]),
    "patch, another model": ("TypeError", ["model", "GPTModel", "Linear"]),
    "patch, wrapped": ("TypeError", ["model", "GPTModel", "DistributedDataParallel", "module"]),
    "patch, its own loss": ("ValueError", ["model", "compute_language_model_loss"]),
    "patch, its own forward": ("ValueError", ["model", "forward"]),
    "patch, layer's own forward": ("ValueError", ["model", "forward"]),
    "patch, mup": ("ValueError", ["model", "use_mup"]),
    "patch, overlap": ("ValueError", ["model", "overlap_moe_expert_parallel_comm"]),
    "patch, logger": ("ValueError", ["model", "config_logger_dir"]),
    "patch, graph": ("ValueError", ["model", "full_iteration"]),
    "patch, deferred": ("ValueError", ["output_layer", "defer_embedding_wgrad_compute"]),
    "patched, inference": ("ValueError", ["inference_context", "labels"]),
    "patched, logits": ("TypeError", ["compute_language_model_loss", "Tensor"]),
    "patched, arithmetic": ("TypeError", ["_LogitsNotComputed"]),
    "patched, method": ("TypeError", ["logits", "div", "logitless"]),
}


def test_every_mistake_has_its_words():
    assert EXPECTED.keys() == MISTAKES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_mistakes(ran, name):
    """An error that names what is wrong; never a number."""
    (outcome,) = ran(1)[f"mistake {name}"]
    kind, words = EXPECTED[name]
    assert kind in outcome.kinds, outcome.trace or "no error"
    missing = [word for word in words if not re.search(rf"(?<!\w){word}(?!\w)", outcome.message)]
    assert not missing, outcome.message


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_one_rank_errs(ran, sequence_parallel):
    """All ranks raise, soon."""
    for outcome in ran(2)[f"one rank errs {sequence_parallel}"]:
        assert "ValueError" in outcome.kinds, outcome.trace or "no error"
        assert "labels must have shape (2, 8)" in outcome.message
        assert outcome.seconds < SOON


def test_megatron_is_not_imported():
    script = "import sys, logitless.integrations.megatron; assert 'megatron' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)
