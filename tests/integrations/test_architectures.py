"""``patch`` on a tiny model of every type that `transformers` has: the same loss and gradients as with its logits.

The exact result is that of the model's own code, all in fp64, its casts to fp32 included.
"""

# What needs transformers is imported after it is known to be there.
# ruff: noqa: E402

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

import support_table
import tiny_models
from small_models import InDouble, seen
from tiny_models import Kwargs, loss_and_gradients

from logitless import Sampled, patch, unpatch
from logitless.backends.torch import sampled as torch_sampled
from logitless.integrations.causal_lm import Patched
from logitless.sampling import inclusion_weights
from tolerance import Baseline, Results

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

# Count of labels that a trainer gives, another than that of the batch.
ITEMS = 7
# Labels that count in each sequence, where many gradients are summed.
COUNTED = 3
NEW_TOKENS = 4


@contextmanager
def in_double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        with InDouble():
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@dataclass
class Case:
    """One model, unpatched between tests, and what it does with its logits."""

    kind: str
    model_type: str
    model: nn.Module = field(init=False)
    wide: nn.Module = field(init=False)
    batch: Kwargs = field(init=False)

    def __post_init__(self) -> None:
        self.model = tiny_models.build(self.kind, self.model_type)
        self.wide = copy.deepcopy(self.model)
        self.batch = tiny_models.batch(self.model_type, self.model.config)

    def patch(self, **options: Any) -> Patched:
        """Tried on the batch of the test only where the default one does not do."""
        return patch(self.model, example=support_table.example_of(self.model_type, self.batch), **options)

    @contextmanager
    def patched(self, **options: Any) -> Iterator[Patched]:
        report = self.patch(**options)
        try:
            yield report
        finally:
            unpatch(self.model)

    def baseline(self, batch: Kwargs) -> Baseline:
        """What plain PyTorch makes of it, three times.

        The loss of a likely token is a small difference of the log-sum-exp and the target's logit, which a fused
        operator has rounded: an ulp of the former, once for each token that the loss is a sum of.
        """
        plain, right = loss_and_gradients(self.model, batch), exact(self.wide, batch)
        rounding = torch.finfo(torch.float32).eps * self.logits().detach().logsumexp(-1).abs().max().item()
        tokens = (
            (batch["labels"] >= 0).sum().item() / batch["num_items_in_batch"] if "num_items_in_batch" in batch else 1
        )
        errors = {"loss": (plain["loss"] - right["loss"]).abs().item() + rounding * tokens}
        return Baseline(right, plain, reordered(self.model, batch), errors)

    def logits(self) -> Tensor:
        """Without labels."""
        given = {name: value for name, value in self.batch.items() if name != "labels"}
        if self.model.config.is_encoder_decoder:
            given["decoder_input_ids"] = self.batch["labels"].clamp_min(0)
        return self.model(**given).logits

    def generated(self) -> Tensor:
        """A few tokens, the likeliest each time."""
        given = {name: value for name, value in self.batch.items() if name not in ("labels", "use_cache")}
        if hasattr(self.model.config.get_text_config(), "output_router_logits"):
            given["output_router_logits"] = False  # with a mask of more than one step, its own loss of these fails
        return self.model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False)


def exact(model: nn.Module, batch: Kwargs) -> Results:
    """Of a model that is its own, which becomes one in fp64."""
    wide = model.double()
    if hasattr(wide, "set_experts_implementation"):
        wide.set_experts_implementation("eager")  # grouped products of PyTorch are not for fp64
    given = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    with in_double():
        return loss_and_gradients(wide, given)


def reordered(model: nn.Module, batch: Kwargs) -> Results:
    """Of the model's own code, the sums of the head's products taken from their end."""

    def product(head: nn.Linear, given: tuple[Tensor], logits: Tensor) -> Tensor:
        return F.linear(given[0].flip(-1), head.weight.flip(-1), head.bias)

    handle = model.get_output_embeddings().register_forward_hook(product)
    try:
        return loss_and_gradients(model, batch)
    finally:
        handle.remove()


def types_of(tested: Callable[[str, str], bool]) -> list[Any]:
    return [
        pytest.param((kind, model_type), id=f"{kind}-{model_type}")
        for kind in tiny_models.KINDS
        for model_type in tiny_models.names(kind)
        if tested(kind, model_type)
    ]


def is_supported(kind: str, model_type: str) -> bool:
    return (kind, model_type) not in support_table.REFUSED and (kind, model_type) not in support_table.NOT_BUILT


REFUSED = [pair for pair in support_table.REFUSED if pair[1] in tiny_models.names(pair[0])]


@pytest.fixture(scope="module", params=types_of(is_supported))
def case(request: pytest.FixtureRequest) -> Case:
    return Case(*request.param)


@pytest.fixture(scope="module")
def committed() -> dict[str, list[str]]:
    """The rows of docs/architectures.md, by heading, if it is of the version installed."""
    text = support_table.FILE.read_text()
    if f"transformers {transformers.__version__}" not in text:
        pytest.skip(f"docs/architectures.md is not of transformers {transformers.__version__}")
    sections = text.split("\n## ")[1:]
    return {section.splitlines()[0]: section.splitlines()[4:] for section in sections}


@pytest.mark.parametrize("items", [None, ITEMS], ids=["mean", "items"])
def test_loss_and_gradients(case: Case, items: int | None) -> None:
    batch = case.batch if items is None else {**case.batch, "num_items_in_batch": items}
    try:
        baseline = case.baseline(batch)
    except TypeError as error:
        assert items is not None
        pytest.skip(f"it does not take num_items_in_batch: {error}")
    with case.patched(verify=False):
        baseline.check(loss_and_gradients(case.model, batch))


def test_sampled_gradient_that_keeps_everything(case: Case) -> None:
    with case.patched(verify=False, gradient=Sampled(threshold=1e-30)):
        ours = loss_and_gradients(case.model, case.batch)
    case.baseline(case.batch).check(ours)


def test_sampled_gradient_in_expectation(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly: with one offset for all rows the gradient is constant between the uniforms where a row's block changes.

    It is summed over these intervals, each once, times their lengths. At a threshold of 1 a row keeps one block.
    """
    masses: list[Tensor] = []
    offset = 0.0

    def weights(mass: Tensor, threshold: float, uniforms: Tensor) -> Tensor:
        masses.append(mass.double().clone())
        return inclusion_weights(mass, threshold, torch.full_like(uniforms, offset))

    monkeypatch.setattr(torch_sampled, "inclusion_weights", weights)
    batch = {**case.batch, "labels": case.batch["labels"].clone()}
    batch["labels"][..., :-COUNTED] = -100
    with case.patched(verify=False):
        expected = joined(loss_and_gradients(case.model, batch))
    with case.patched(verify=False, gradient=Sampled(threshold=1.0)):
        loss_and_gradients(case.model, batch)
        changes = (1 - torch.cat(masses).cumsum(1)).clamp(0, 1).flatten().sort().values
        ends = [0.0, *changes.tolist(), 1.0]
        mean = torch.zeros_like(expected)
        for first, last in itertools.pairwise(ends):
            if last > first:
                offset = (first + last) / 2
                mean += (last - first) * joined(loss_and_gradients(case.model, batch))
    assert len(set(ends)) > 2, "there is one sample only"
    assert (mean - expected).norm() <= 1e-5 * expected.norm()


def joined(results: Results) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([value.double().flatten() for name, value in results.items() if name != "loss"])


def test_no_labels_no_change(case: Case) -> None:
    """Logits and what is generated from them, bit by bit."""
    before = case.logits()
    try:
        tokens = case.generated()
    except Exception as error:  # models that generate in a way of their own
        tokens = None
        reason = f"{type(error).__name__}: {error}"
    with case.patched(verify=False):
        after = case.logits()
        assert type(after) is Tensor
        assert torch.equal(after, before)
        if tokens is None:
            pytest.skip(f"it does not generate from tokens: {reason}")
        assert torch.equal(case.generated(), tokens)


def test_patch_and_unpatch_leave_nothing_behind(case: Case) -> None:
    model, before = case.model, seen(case.model)
    head = model.get_output_embeddings()
    with case.patched():
        assert model.forward.__func__ is not type(model).forward
    assert seen(model) == before
    assert model.forward.__func__ is type(model).forward
    assert head.forward.__func__ is nn.Linear.forward
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_table_has_what_is_found(case: Case, committed: dict[str, list[str]]) -> None:
    with case.patched() as report:
        found = support_table.head_of(report)
    row = support_table.Row(case.model_type, type(case.model).__name__, found, "yes")
    assert any(line.startswith(row.start()) for line in committed[support_table.HEADINGS[case.kind]]), row


@pytest.mark.parametrize(("kind", "model_type"), REFUSED)
def test_refusal(kind: str, model_type: str) -> None:
    """It says why, and leaves the model as it was."""
    model = tiny_models.build(kind, model_type)
    before = seen(model)
    assert re.search(support_table.REFUSED[kind, model_type], str(refusal_of(model, model_type)))
    assert seen(model) == before
    assert model.forward.__func__ is type(model).forward


@pytest.mark.parametrize(("kind", "model_type"), REFUSED)
def test_the_table_has_the_reason(kind: str, model_type: str, committed: dict[str, list[str]]) -> None:
    model = tiny_models.build(kind, model_type)
    reason = support_table.refusal(refusal_of(model, model_type))
    row = support_table.Row(model_type, type(model).__name__, "", f"refused: {reason}")
    assert str(row) in committed[support_table.HEADINGS[kind]]


def refusal_of(model: nn.Module, model_type: str) -> Exception:
    batch = tiny_models.batch(model_type, model.config)
    with pytest.raises((TypeError, ValueError)) as caught:
        patch(model, example=support_table.example_of(model_type, batch))
    return caught.value


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_the_table_has_all_types(kind: str, committed: dict[str, list[str]]) -> None:
    lines = committed[support_table.HEADINGS[kind]]
    assert [line.split("`")[1] for line in lines] == list(tiny_models.names(kind))
