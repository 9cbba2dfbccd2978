"""``patch`` on a tiny model of every type that `transformers` has: the same loss and gradients as with its logits.

The exact result is that of the model's own code, all in fp64, its casts to fp32 included.
"""

# What needs transformers is imported after it is known to be there.
# ruff: noqa: E402

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

transformers = pytest.importorskip("transformers")

import support_table
import tiny_models
from tiny_models import CAUSAL, ENCODER_DECODER, Kwargs, loss_and_gradients

from logitless import Sampled, patch, unpatch
from logitless.integrations.causal_lm import Patched
from test_sampled import DRAWS, THRESHOLD, assert_unbiased
from tolerance import FACTOR

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

ULP = torch.finfo(torch.float32).eps
# Count of labels that a trainer gives, another than that of the batch.
ITEMS = 7
NEW_TOKENS = 4

Results = dict[str, Tensor]


class InDouble(TorchFunctionMode):
    """Where code asks for fp32 it gets fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        widened = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        return func(*widened, **named)


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

    @cached_property
    def largest_logit(self) -> float:
        """The largest product of the head."""
        sizes = []
        head = self.model.get_output_embeddings()
        handle = head.register_forward_hook(lambda module, given, output: sizes.append(output.abs().max().item()))
        self.model(**self.batch)
        handle.remove()
        return max(sizes)

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


def check(ours: Results, plain: Results, truth: Results, largest_logit: float) -> None:
    """At most 1.1 times the error of the model's own code, plus a floor under which no luck of that one counts.

    A logit is off by four roundings of at most the largest logit's ulp, which moves its share of the softmax, and so a
    gradient, by as much. Where a gradient vanishes but for rounding (a bias of keys), what is rounded are terms as
    large as the gradients of other parameters: an ulp of all of these.
    """
    assert ours.keys() == plain.keys() == truth.keys()
    everything = sum(value.norm().item() ** 2 for value in truth.values()) ** 0.5
    failures = []
    for name, value in truth.items():
        error = (ours[name].double() - value).norm().item()
        own_error = (plain[name].double() - value).norm().item()
        floor = 4 * ULP * (1 + largest_logit) * value.norm().item() + ULP * everything
        if not error <= FACTOR * own_error + floor:
            failures.append(f"{name}: error {error:.3e}, of its own {own_error:.3e}, size {value.norm():.3e}")
    assert not failures, "; ".join(failures)


def state_of(model: nn.Module) -> dict[str, tuple[list[str], bool]]:
    """Names of the attributes of each module, and its mode."""
    return {path: (sorted(vars(module)), module.training) for path, module in model.named_modules()}


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
        plain = loss_and_gradients(case.model, batch)
    except TypeError as error:
        assert items is not None
        pytest.skip(f"it does not take num_items_in_batch: {error}")
    truth = exact(case.wide, batch)
    with case.patched(verify=False):
        ours = loss_and_gradients(case.model, batch)
    check(ours, plain, truth, case.largest_logit)


def test_sampled_gradient_that_keeps_everything(case: Case) -> None:
    with case.patched(verify=False, gradient=Sampled(threshold=1e-30)):
        ours = loss_and_gradients(case.model, case.batch)
    check(ours, loss_and_gradients(case.model, case.batch), exact(case.wide, case.batch), case.largest_logit)


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


def test_patch_and_unpatch_leave_nothing_behind(case: Case, committed: dict[str, list[str]]) -> None:
    """Also: what the patch finds is what the documentation says."""
    model, before = case.model, state_of(case.model)
    head = model.get_output_embeddings()
    with case.patched() as report:
        assert model.forward.__func__ is not type(model).forward
    assert state_of(model) == before
    assert model.forward.__func__ is type(model).forward
    assert head.forward.__func__ is nn.Linear.forward
    assert all(parameter.grad is None for parameter in model.parameters())
    row = support_table.Row(case.model_type, type(model).__name__, support_table.head_of(report), "yes")
    assert any(line.startswith(row.start()) for line in committed[support_table.HEADINGS[case.kind]]), row


@pytest.mark.parametrize(("kind", "model_type"), REFUSED)
def test_refusal(kind: str, model_type: str, committed: dict[str, list[str]]) -> None:
    model = tiny_models.build(kind, model_type)
    batch, before = tiny_models.batch(model_type, model.config), state_of(model)
    with pytest.raises((TypeError, ValueError), match=support_table.REFUSED[kind, model_type]) as caught:
        patch(model, example=support_table.example_of(model_type, batch))
    assert state_of(model) == before
    assert model.forward.__func__ is type(model).forward
    row = support_table.Row(model_type, type(model).__name__, "", f"refused: {support_table.refusal(caught.value)}")
    assert str(row) in committed[support_table.HEADINGS[kind]]


@pytest.mark.parametrize("kind", tiny_models.KINDS)
def test_the_table_has_all_types(kind: str, committed: dict[str, list[str]]) -> None:
    lines = committed[support_table.HEADINGS[kind]]
    assert [line.split("`")[1] for line in lines] == list(tiny_models.names(kind))


@pytest.mark.parametrize(("kind", "model_type"), [(CAUSAL, "gemma2"), (CAUSAL, "cohere"), (ENCODER_DECODER, "t5")])
def test_sampled_gradient_is_unbiased(kind: str, model_type: str) -> None:
    """Of the head and of the first layer, through a softcap, a scale, and an encoder."""
    case = Case(kind, model_type)
    with case.patched(verify=False):
        expected = loss_and_gradients(case.model, case.batch)
    sampled = Sampled(threshold=THRESHOLD, generator=torch.Generator().manual_seed(0))
    with case.patched(verify=False, gradient=sampled):
        draws = [loss_and_gradients(case.model, case.batch) for _ in range(DRAWS)]
    first, *_ = (name for name, parameter in case.model.named_parameters() if "norm" in name)
    for name in (first, "model.embed_tokens.weight" if kind == CAUSAL else "shared.weight"):
        assert_unbiased(torch.stack([draw[name] for draw in draws]).double(), expected[name].double())
