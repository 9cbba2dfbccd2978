"""``patch``: the loss and gradients of a model's own logits, everything else as before, and what is refused."""

from __future__ import annotations

import copy
import inspect
import io
import itertools
import json
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from small_models import (  # noqa: E402
    HIDDEN,
    MODELS,
    VOCABULARY,
    InDouble,
    batch,
    check,
    computed,
    counted,
    exact_results,
    llama,
    results,
    seen,
)
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

import logitless  # noqa: E402
from allocations import LargestTensor  # noqa: E402
from logitless.integrations.deferred import DeferredLogits, Record, Term, real  # noqa: E402
from logitless.integrations.moment import Backward, Moment, Since, parameters_of  # noqa: E402
from tolerance import FACTOR, Results, floor  # noqa: E402

# Of transformers about itself.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def compare(model: nn.Module, arguments: dict[str, Any], **options: Any) -> logitless.Patched:
    """Patch, and assert the loss and gradients of the model's own logits, with none computed."""
    exact, plain = exact_results(model, arguments), results(model, arguments)
    report = logitless.patch(model, **options)
    with computed() as reasons:
        ours = results(model, arguments)
    assert reasons == []
    check(ours, plain, exact)
    return report


# --- what a patched model computes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name):
    compare(MODELS[name]().eval(), batch())


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_gradient_checkpointing(tied):
    model = llama(tied).train()
    exact, plain = exact_results(model, batch()), results(model, batch())
    model.gradient_checkpointing_enable()
    logitless.patch(model)
    with computed() as reasons:
        check(results(model, batch()), plain, exact)
    assert reasons == []


@pytest.mark.parametrize(
    "change",
    [
        {"num_items_in_batch": 7},
        {"num_items_in_batch": torch.tensor(7)},
        {"ignore_index": 250, "labels": batch()["labels"].clamp(min=0).masked_fill(batch()["labels"] < 0, 250)},
        {"shift_labels": batch(seed=3)["labels"]},
        {"attention_mask": torch.tensor([[0, 0, *[1] * 10], [1] * 12])},
        {"output_hidden_states": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_arguments_of_the_loss(change):
    """What the model's own loss function takes reaches it."""
    compare(llama(), {**batch(), **change})


def test_labels_by_place():
    model, arguments = llama(), batch()
    place = list(inspect.signature(model.forward).parameters).index("labels")
    before = model(**arguments).loss
    logitless.patch(model)
    with computed() as reasons:
        output = model(arguments["input_ids"], *[None] * (place - 1), arguments["labels"])
    torch.testing.assert_close(output.loss, before, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    assert isinstance(output.logits, DeferredLogits)
    assert reasons == []


def test_output_as_a_tuple():
    model = llama()
    logitless.patch(model)
    loss, logits = model(**batch(), return_dict=False)[:2]
    assert loss.requires_grad
    assert isinstance(logits, DeferredLogits)


def test_without_gradients():
    """In evaluation the loss is that of training, and the logits are those of a call without labels."""
    model, arguments = llama(), batch()
    logitless.patch(model)
    training = model(**arguments).loss
    model.eval()
    with torch.no_grad():
        output = model(**arguments)
        assert not output.loss.requires_grad
        torch.testing.assert_close(output.loss, training.detach(), rtol=4 * torch.finfo(torch.float32).eps, atol=0)
        assert torch.equal(output.logits.argmax(-1), model(arguments["input_ids"]).logits.argmax(-1))


def test_options_reach_the_loss():
    """z-loss and label smoothing are those of ``linear_cross_entropy``."""
    model, arguments = llama(), batch()
    logits = model(input_ids=arguments["input_ids"]).logits[:, :-1].reshape(-1, VOCABULARY)
    target = arguments["labels"][:, 1:].reshape(-1)
    plain = F.cross_entropy(logits, target, label_smoothing=0.1)
    expected = plain + 0.01 * logits.logsumexp(-1)[target != -100].square().mean()
    logitless.patch(model, z_loss=0.01, label_smoothing=0.1, workspace="1MiB")
    ours = model(**arguments).loss
    torch.testing.assert_close(ours, expected, rtol=8 * torch.finfo(torch.float32).eps, atol=0)


def test_sampled_gradient():
    """An exact loss, and a gradient that another seed changes."""
    model, arguments = llama(vocab_size=1000), batch()
    before = model(**arguments).loss
    logitless.patch(model, gradient=logitless.Sampled(threshold=0.5))
    torch.testing.assert_close(model(**arguments).loss, before, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(results(model, arguments)["lm_head.weight"])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_no_tensor_of_the_logits_size():
    wide = {"vocab_size": 4131, "hidden_size": 8, "intermediate_size": 16, "head_dim": 2}
    arguments = batch(8, 48)
    logits = 8 * 48 * 4131

    def largest(model: nn.Module) -> LargestTensor:
        with LargestTensor(*model.parameters()) as counter:
            model(**arguments).loss.backward()
        return counter

    model = llama(**wide)
    assert largest(model).elements >= logits
    logitless.patch(model, workspace=400_000)
    counter = largest(model)
    assert counter.elements <= 8 * 4131, counter.operation


# --- what stays as it was ---------------------------------------------------------------------------------------------


def test_calls_without_labels_are_the_same_bits():
    model, twin = llama().eval(), llama().eval()
    logitless.patch(model)
    tokens = batch()["input_ids"]
    ours = model(input_ids=tokens).logits
    assert type(ours) is Tensor
    assert torch.equal(ours, twin(input_ids=tokens).logits)
    assert torch.equal(model(input_ids=tokens, labels=None).logits, ours)
    ours.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"do_sample": True, "top_k": 9},
    ],
    ids=["greedy", "beam", "no cache", "static cache", "sampled"],
)
def test_generation(options):
    model, twin = llama().eval(), llama().eval()
    logitless.patch(model)
    tokens = []
    for each in (model, twin):
        torch.manual_seed(3)
        tokens.append(each.generate(batch()["input_ids"], max_new_tokens=6, **{"do_sample": False, **options}))
    assert torch.equal(*tokens)


def test_generation_after_a_step():
    """A call with labels leaves nothing behind, not even one that fails."""
    model = llama()
    logitless.patch(model)
    results(model, batch())
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), VOCABULARY), labels=torch.zeros(1, 3, dtype=torch.long))
    assert type(model(input_ids=batch()["input_ids"]).logits) is Tensor


def test_unpatch_leaves_nothing():
    model = llama()
    before, state = seen(model), copy.deepcopy(model.state_dict())
    logitless.patch(model)
    assert seen(model) != before
    logitless.unpatch(model)
    assert seen(model) == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert isinstance(model(**batch()).logits, Tensor)
    logitless.patch(model)


def test_unpatch_restores_a_forward_of_the_instance():
    model = llama()
    plain = model.forward
    model.forward = lambda *args, labels=None, **kwargs: plain(*args, labels=labels, **kwargs)
    own = model.forward
    logitless.patch(model)
    logitless.unpatch(model)
    assert model.forward is own


def test_patching_touches_nothing_else():
    model = llama().train()
    model.model.layers[0].eval()
    state = torch.get_rng_state()
    modes = {name: mode for name, (_, mode) in seen(model).items()}
    logitless.patch(model)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: mode for name, (_, mode) in seen(model).items()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_kept():
    model = llama()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    logitless.patch(model)
    assert all((parameter.grad == 3).all() for parameter in model.parameters())


@pytest.mark.parametrize("frozen", ["all", "head", "body"])
def test_frozen_parameters(frozen):
    model = llama()
    model.requires_grad_(frozen == "head")
    model.lm_head.requires_grad_(frozen == "body")
    if frozen == "all":
        before = model(**batch()).loss
        logitless.patch(model)
        assert model(**batch()).loss.item() == pytest.approx(before.item(), rel=1e-6)
    else:
        compare(model, batch())
    assert model.lm_head.weight.requires_grad == (frozen == "body")


def test_signature_and_name():
    model, twin = llama(), llama()
    logitless.patch(model)
    assert inspect.signature(model.forward) == inspect.signature(twin.forward)


def test_deep_copy_is_a_model_of_its_own():
    model = llama()
    logitless.patch(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert other(**batch()).loss.item() == pytest.approx(torch.tensor(VOCABULARY).log().item(), rel=1e-6)
    assert model(**batch()).loss.item() != other(**batch()).loss.item()
    logitless.unpatch(model)
    assert isinstance(other(**batch()).logits, DeferredLogits)
    logitless.unpatch(other)
    assert isinstance(other(**batch()).logits, Tensor)


def test_save_and_load(tmp_path: Path):
    model = llama()
    logitless.patch(model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_new_head_computes_its_logits():
    """A head that is replaced later is not patched: the loss is right, from real logits, which is said once."""
    model = patched()
    model.resize_token_embeddings(VOCABULARY + 9)
    twin = copy.deepcopy(model)
    logitless.unpatch(twin)
    with pytest.warns(UserWarning, match="formed its logits in a call with labels: it did not call lm_head;") as said:
        output = model(**batch())
    assert said[0].filename == __file__
    assert isinstance(output.logits, Tensor)
    assert output.loss.item() == twin(**batch()).loss.item()
    with warnings.catch_warnings(action="error"):
        model(**batch())


def resized(model: Any, rows: int) -> None:
    """By hand: the layer's attributes stay."""
    torch.manual_seed(4)
    model.lm_head.weight = nn.Parameter(torch.randn(rows, HIDDEN) / 8)
    model.config.vocab_size = rows


@pytest.mark.parametrize("rows", [VOCABULARY - 40, VOCABULARY + 7])
@pytest.mark.parametrize("when", ["before", "after"])
def test_weight_replaced_by_hand(when, rows):
    """What counts is the shape of the weight."""
    model, twin, arguments = llama(), llama(), batch()
    arguments = {name: value.clamp(max=rows - 1) for name, value in arguments.items()}
    resized(twin, rows)
    exact, plain = exact_results(twin, arguments), results(twin, arguments)
    if when == "before":
        resized(model, rows)
    report = logitless.patch(model)
    if when == "before":
        assert report.heads == (("lm_head", (rows, HIDDEN)),)
    else:
        resized(model, rows)
    with computed() as reasons:
        check(results(model, arguments), plain, exact)
        assert model(**arguments).logits.shape == (2, 12, rows)
    assert reasons == []


@pytest.mark.parametrize(
    ("change", "back"),
    [
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
        (lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_dtype(torch.float32)),
        (lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)),
    ],
    ids=["meta", "bf16", "fp64"],
)
def test_another_default_device_or_dtype(change, back):
    """Tensors say where they are and what they are of: the same numbers, also where the patch is tried."""
    model, twin, arguments = llama(), llama(), batch()
    exact, plain = exact_results(twin, arguments), results(twin, arguments)
    with torch.no_grad():
        logits = twin(**arguments).logits
    expected = logitless.patch(twin)
    with torch.device("cpu"):
        target = torch.arange(24)
    change()
    try:
        report = logitless.patch(model)
        ours = results(model, arguments)
        with torch.no_grad():
            evaluated = model(**arguments).logits
            loss = F.cross_entropy(evaluated.flatten(0, 1), target)
            values = torch.tensor(evaluated[:, 1:], device="cpu")
    finally:
        back()
    check(ours, plain, exact)
    assert report.loss_error == pytest.approx(expected.loss_error, abs=4 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(values, logits[:, 1:])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), target))


@pytest.mark.parametrize("earlier", [False, True], ids=["first", "after one with labels"])
def test_training_without_labels_is_said(earlier):
    """Once, unless the model is trained with labels too."""
    model = patched().train()
    if earlier:
        model(**batch())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            model(input_ids=batch()["input_ids"]).logits.sum().backward()
        with torch.no_grad():
            model(input_ids=batch()["input_ids"])
    texts = [str(one.message) for one in said]
    assert len(texts) == (0 if earlier else 1)
    assert all("called in training without labels" in text for text in texts)
    assert all(one.filename == __file__ for one in said)


def test_no_word_where_nothing_is_trained():
    model = patched().eval()
    with warnings.catch_warnings(action="error"):
        model(input_ids=batch()["input_ids"])
        model.model(input_ids=batch()["input_ids"])
        model.train()
        with torch.no_grad():
            model(input_ids=batch()["input_ids"])
            model.model(input_ids=batch()["input_ids"])


def test_training_past_the_forward_is_said():
    """Once; of a copy of the model too, and no more once it is not patched."""
    model = patched().train()
    other = copy.deepcopy(model)
    logitless.unpatch(model)
    tokens = batch()["input_ids"]
    with warnings.catch_warnings(action="error"):
        model.model(input_ids=tokens)
    with pytest.warns(UserWarning, match=r"the patch is not used. Call logitless.integrations.trl.adapt\(trainer\)"):
        other.model(input_ids=tokens)
    with warnings.catch_warnings(action="error"):
        other.model(input_ids=tokens)


def test_dtype_changed_later():
    model = llama()
    logitless.patch(model)
    model.bfloat16()
    output = model(**batch())
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32
    # Logits of the size of 1 in bf16 are off by half an ulp, 2^-9, of which a mean over tokens is not.
    assert output.loss.item() == pytest.approx(llama()(**batch()).loss.item(), abs=2**-8)


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama", r"LlamaForCausalLM: lm_head \[301, 32\], untied; agrees with its logits: loss .*, gradients .*"),
        ("llama-tied", r"LlamaForCausalLM: lm_head \[301, 32\], tied; .*"),
        ("gemma2", r"Gemma2ForCausalLM: lm_head \[301, 32\], tied, softcap 5; .*"),
        ("cohere", r"CohereForCausalLM: lm_head \[301, 32\], tied, logit scale 0.25; .*"),
        ("granite", r"GraniteForCausalLM: lm_head \[301, 32\], untied, logit scale 0.125; .*"),
        ("phi", r"PhiForCausalLM: lm_head \[301, 32\], untied, bias; .*"),
    ],
)
def test_report(name, text):
    report = logitless.patch(MODELS[name]())
    assert re.fullmatch(text, str(report))
    assert report.heads == (("lm_head", (VOCABULARY, HIDDEN)),)
    assert 0 <= report.loss_error < 1e-6
    assert 0 <= report.gradient_error < 1e-5


def test_report_of_what_was_not_tried():
    report = logitless.patch(llama(), verify=False)
    assert str(report) == "LlamaForCausalLM: lm_head [301, 32], untied; not tried"
    assert report.loss_error is report.gradient_error is None


def test_report_says_how_well_bf16_agrees():
    report = logitless.patch(MODELS["gemma2"]().bfloat16())
    assert report.gradient_error <= torch.finfo(torch.bfloat16).eps


# --- what is refused --------------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """As models are wrapped for parallel training."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2)


class Int4(Tensor):
    """A weight as torchao's are: floating-point to those who ask, with products of its own."""

    @staticmethod
    def __new__(cls, packed: Tensor) -> Int4:
        shape = (packed.shape[0], 2 * packed.shape[1])
        return Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(func)


def with_weight(weight: Tensor) -> nn.Module:
    model = llama()
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    return model


def with_computed_weight(compute: Callable[[nn.Module], Any]) -> nn.Module:
    model = llama()
    compute(model.lm_head)
    return model


class Packed(nn.Module):
    """A head in four bits: bytes instead of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(VOCABULARY * HIDDEN // 2, 1, dtype=torch.uint8), requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return input.new_zeros(*input.shape[:-1], VOCABULARY)


def with_head(head: nn.Module) -> nn.Module:
    model = llama()
    model.lm_head = head
    return model


def patched() -> nn.Module:
    model = llama()
    logitless.patch(model)
    return model


def with_nan() -> nn.Module:
    model = llama()
    torch.nn.init.constant_(model.lm_head.weight, torch.nan)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return llama()


CONFIG = {"hidden_size": HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no module": (lambda: 3, TypeError, "model must be a torch.nn.Module of transformers, got int"),
    "no model": (lambda: nn.Linear(3, 3), TypeError, r"must have get_output_embeddings\(\), got a Linear$"),
    "compiled": (lambda: torch.compile(llama()), TypeError, "model is compiled, .*; patch the model before"),
    "wrapped": (lambda: Wrapped(llama()), TypeError, "got a Wrapped; patch the model before it is wrapped"),
    "no loss": (lambda: llama().model, TypeError, "must take labels in its forward, got a LlamaModel"),
    "no head": (
        lambda: transformers.LlamaForTokenClassification(llama().config),
        ValueError,
        "must be a linear layer, got nothing: head unknown",
    ),
    "patched twice": (patched, ValueError, r"patched already, got a LlamaForCausalLM; call logitless.unpatch\(model\)"),
    "no weight": (lambda: with_head(nn.Identity()), ValueError, r"with a weight \[V, D\], got a Identity"),
    "subclass": (lambda: with_head(Doubling(HIDDEN, VOCABULARY, bias=False)), ValueError, "lm_head .* got a Doubling"),
    "quantized": (
        lambda: with_head(Packed()),
        ValueError,
        r"with a weight \[V, D\], got a Packed whose weight is quantized, of torch.uint8: leave the head",
    ),
    "in eight bits": (
        lambda: with_weight(torch.zeros(VOCABULARY, HIDDEN).to(torch.float8_e4m3fn)),
        ValueError,
        "got a Linear whose weight is quantized, of torch.float8_e4m3fn: leave the head out of the quantization",
    ),
    "tensor of another kind": (
        lambda: with_weight(Int4(torch.zeros(VOCABULARY, HIDDEN // 2, dtype=torch.uint8))),
        ValueError,
        "got a Linear whose weight is a Int4, a subclass of torch.Tensor with products of its own",
    ),
    "flat weight": (lambda: with_weight(torch.zeros(9)), ValueError, r"got a Linear whose weight has shape \(9,\)"),
    "parametrized": (
        lambda: with_computed_weight(lambda head: nn.utils.parametrizations.weight_norm(head)),
        ValueError,
        "the weight of lm_head must be a parameter, got one that is computed anew at each use .*parametrize",
    ),
    "normalised": (
        lambda: with_computed_weight(lambda head: nn.utils.spectral_norm(head)),
        ValueError,
        "the weight of lm_head must be a parameter, got one that is computed anew at each use .*spectral_norm",
    ),
    "not a number": (with_nan, ValueError, "relative differences of nan"),
    "meta": (on_meta, ValueError, "must give a loss, got .*meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, kind, message = REFUSED[name]
    model = make()
    before = seen(model) if isinstance(model, nn.Module) else None
    state = torch.get_rng_state()
    with pytest.raises(kind, match=message):
        logitless.patch(model)
    assert torch.equal(state, torch.get_rng_state())
    if before is not None:
        assert seen(model) == before
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient": "rough"}, "gradient must be 'exact' or a logitless.Sampled, got 'rough'"),
        ({"workspace": -1}, "workspace must be greater than 0 bytes, got -1"),
        ({"workspace": 1.5}, "workspace must be an int"),
        ({"workspace": 10}, "workspace=10 bytes is too small"),
        ({"backend": "cuda"}, "backend must be one of"),
        ({"z_loss": -1}, "z_loss must be at least 0, got -1"),
        ({"z_loss": torch.tensor(0.1)}, "z_loss must be a number, got Tensor"),
        ({"label_smoothing": 2}, r"label_smoothing must be in \[0, 1\], got 2"),
        ({"example": {}}, "a batch of use_cache must give a loss, .*; pass example= with what its forward needs"),
        ({"example": {"input_ids": batch()["input_ids"]}}, "a batch with labels must give a loss from its head"),
    ],
    ids=str,
)
def test_refused_options(options, message):
    model = llama()
    before = seen(model)
    with pytest.raises((TypeError, ValueError), match=message):
        logitless.patch(model, **options)
    assert seen(model) == before


def test_unpatch_refuses():
    with pytest.raises(ValueError, match=r"must be one that logitless.patch was called on, got a LlamaForCausalLM"):
        logitless.unpatch(llama())
    with pytest.raises(TypeError, match="got int"):
        logitless.unpatch(3)


def test_refuses_hooks_of_accelerate(tmp_path: Path):
    """Hooks that move a head's weight replace its ``forward``; those of the model as a whole do no harm."""
    accelerate = pytest.importorskip("accelerate")
    model = llama()
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "disk"}, offload_dir=tmp_path, force_hooks=True)
    with pytest.raises(ValueError, match="forward of lm_head is replaced already"):
        logitless.patch(model)
    model = llama()
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    hooked = model.forward
    compare(model, batch())
    logitless.unpatch(model)
    assert model.forward is hooked


def test_example():
    """What the patch is tried on instead, twice, for models that need more."""
    model, given = llama(), []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    report = logitless.patch(model, example=batch())
    assert report.loss_error is not None
    assert len(given) == 2
    assert all(torch.equal(tokens, batch()["input_ids"]) for tokens in given)


# --- models that do something of their own with logits ----------------------------------------------------------------


class Fake(transformers.LlamaForCausalLM):
    """A model whose logits and loss a test writes."""

    def __init__(self, config: Any, tail: Callable[..., tuple[Any, Tensor]], bias: bool) -> None:
        super().__init__(config)
        self.tail, self.calls = tail, 0
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias)
        self.other = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.temperature = nn.Parameter(torch.tensor(1.5))
        nn.init.normal_(self.lm_head.weight, std=0.2)

    def forward(self, input_ids=None, attention_mask=None, labels=None, use_cache=None):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits, loss = self.lm_head(hidden), None
        if labels is not None:
            logits, loss = self.tail(self, hidden, logits, labels)
        return CausalLMOutput(loss=loss, logits=logits)


def fake(tail: Callable[..., tuple[Any, Tensor]], bias: bool = False) -> Fake:
    torch.manual_seed(0)
    return Fake(llama().config, tail, bias).eval()


def entropy(logits: Any, labels: Tensor) -> Tensor:
    flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
    return F.cross_entropy(flat, labels[:, 1:].reshape(-1))


def scaling(change: Callable[[Any], Any]) -> Callable[..., tuple[Any, Tensor]]:
    """The model's loss is cross-entropy of changed logits."""

    def tail(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
        logits = change(logits)
        return logits, entropy(logits, labels)

    return tail


def of_counted_rows(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    rows = labels[:, 1:] != -100
    picked = model.lm_head(hidden[:, :-1][rows])
    return picked, F.cross_entropy(picked, labels[:, 1:][rows])


FOLLOWED: dict[str, Callable[..., tuple[Any, Tensor]]] = {
    "nothing": scaling(lambda logits: logits),
    "negative scale": scaling(lambda logits: logits * -2),
    "scale and unscale": scaling(lambda logits: 3 * logits / 0.5),
    "cap": scaling(lambda logits: torch.tanh(logits / 2) * 2),
    "scale after cap": scaling(lambda logits: torch.tanh(logits / 2) * 6),
    "scale in cap": scaling(lambda logits: (logits * 4).tanh() * 10),
    "a sum of two calls": lambda m, h, x, y: (x + m.lm_head(0.3 * h), entropy(x + m.lm_head(0.3 * h), y)),
    "two losses of the head": lambda m, h, x, y: (x, entropy(x, y) + entropy(m.lm_head(0.5 * h), y)),
    "another head's loss": lambda m, h, x, y: (x, entropy(x, y) + entropy(m.other(h), y)),
    "rows that count": of_counted_rows,
    "penalty of hidden states": lambda m, h, x, y: (x, entropy(x, y) + h.square().mean()),
    "penalty of the weight": lambda m, h, x, y: (x, entropy(x, y) + m.lm_head.weight.square().mean()),
}


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name, bias):
    compare(fake(FOLLOWED[name], bias), batch())


def masked_in_place(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    logits[..., 290:] = -1e4
    return logits, entropy(logits, labels)


def head_of_something_else(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    others = model.lm_head(model.model.embed_tokens(labels.clamp(0)))
    return logits, entropy(logits, labels) + others.square().mean()


def log_softmax_first(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    likely = F.log_softmax(logits[:, :-1], -1)
    return logits, F.nll_loss(likely.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def without_its_head(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    logits = F.linear(hidden, model.lm_head.weight)
    return logits, entropy(logits, labels)


UNKNOWN: dict[str, tuple[Callable[..., tuple[Any, Tensor]], str]] = {
    "masked": (scaling(lambda x: x.masked_fill(torch.arange(VOCABULARY) > 290, -1e4)), "needs its logits for masked"),
    "masked in place": (masked_in_place, "needs its logits for __setitem__"),
    "two heads": (lambda m, h, x, y: (x, entropy(x + m.other(h), y)), r"needs its logits for \+"),
    "bias of its own": (scaling(lambda x: x + torch.arange(VOCABULARY) / 100), r"needs its logits for \+"),
    "learnable temperature": (lambda m, h, x, y: (x, entropy(x * m.temperature, y)), r"needs its logits for \*"),
    "cap after cap": (scaling(lambda x: torch.tanh(torch.tanh(x / 2) * 2)), "needs its logits for tanh"),
    "negative cap": (scaling(lambda x: -2 * torch.tanh(x / 2)), "needs its logits for cross_entropy"),
    "mean square": (lambda m, h, x, y: (x, x.square().mean()), "needs its logits for square"),
    "log-softmax": (log_softmax_first, "needs its logits for log_softmax"),
    "head of something else": (head_of_something_else, "needs its logits for square"),
    "without its head": (without_its_head, "its loss is not a cross-entropy of the logits of lm_head"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_is_refused_and_not_tried_is_right(name):
    tail, message = UNKNOWN[name]
    model = fake(tail)
    exact, plain, before = exact_results(model, batch()), results(model, batch()), seen(model)
    with pytest.raises(ValueError, match=message):
        logitless.patch(model)
    assert seen(model) == before
    logitless.patch(model, verify=False)
    check(results(model, batch()), plain, exact)


def scaled_where_deferred(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    return logits, entropy(logits if isinstance(logits, Tensor) else logits * 1.01, labels)


def gradient_lost_where_deferred(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    if isinstance(logits, Tensor):
        return logits, entropy(logits, labels)
    return logits, entropy(logits, labels).detach() + 0 * entropy(logits, labels)


def another_each_time(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    model.calls += 1
    return logits, entropy(logits * model.calls, labels)


def at_random(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    return logits, entropy(logits * (1 + torch.rand(()).item()), labels)


@pytest.mark.parametrize(
    "tail",
    [scaled_where_deferred, gradient_lost_where_deferred, another_each_time, at_random],
    ids=lambda f: f.__name__,
)
def test_differences_are_noticed(tail):
    model = fake(tail)
    before, state = seen(model), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"must agree with the model's own to .* it does something unknown"):
        logitless.patch(model)
    assert torch.equal(state, torch.get_rng_state())
    assert seen(model) == before


def test_what_training_mode_alone_does_is_right():
    """The trial is in evaluation mode; in training this model needs its logits, and gets them."""

    def tail(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
        if model.training:
            logits = logits.masked_fill(torch.arange(VOCABULARY) > 290, -1e4)
        return logits, entropy(logits, labels)

    model = fake(tail).train()
    exact, plain = exact_results(model, batch()), results(model, batch())
    logitless.patch(model)
    with computed() as reasons, pytest.warns(UserWarning, match="the model needed them for masked_fill, which cannot"):
        check(results(model, batch()), plain, exact)
    assert reasons == ["masked_fill"]


# --- deferred logits --------------------------------------------------------------------------------------------------

SHAPE = (2, 5)


@dataclass(frozen=True)
class Leaves:
    """What logits are made of, in one dtype."""

    hidden: Tensor
    head: nn.Linear

    @classmethod
    def drawn(cls, bias: bool) -> Leaves:
        torch.manual_seed(2)
        head = nn.Linear(HIDDEN, VOCABULARY, bias)
        return cls(torch.randn(*SHAPE, HIDDEN).requires_grad_(), head)

    def double(self) -> Leaves:
        return Leaves(self.hidden.detach().double().requires_grad_(), copy.deepcopy(self.head).double())

    def deferred(self) -> DeferredLogits:
        moment = Moment.now(parameters_of([self.head]), Since(Backward()))
        return DeferredLogits(
            (Term(self.hidden, self.head, self.head.out_features),), self.hidden.dtype, {}, Record(), moment
        )

    def gradients(self, value: Tensor) -> list[Tensor]:
        """Of a sum whose weights differ."""
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).view(value.shape).to(value.dtype)
        leaves = [self.hidden, *self.head.parameters()]
        return list(torch.autograd.grad((value * weights).sum(), leaves))


# Each keeps V as the last dimension. Those that are followed, and those that need the logits.
KEPT: dict[str, Callable[[Any], Any]] = {
    "float": lambda x: x.float(),
    "to dtype": lambda x: x.to(torch.float32),
    "to device": lambda x: x.to("cpu"),
    "contiguous": lambda x: x.contiguous(),
    "view": lambda x: x.contiguous().view(-1, VOCABULARY),
    "view by size": lambda x: x.contiguous().view(x.shape),
    "reshape": lambda x: x.reshape(-1, 1, x.size(-1)),
    "flatten": lambda x: x.flatten(0, -2),
    "all but the last": lambda x: x[..., :-1, :] if x.shape[-2] > 1 else x,
    "all but the first": lambda x: x[1:] if x.shape[0] > 1 else x,
    "rows by number": lambda x: x[torch.tensor([0, 0, -1])],
    "rows by mask": lambda x: x[torch.arange(len(x)) % 3 != 1],
    "times": lambda x: x * 1.5,
    "times from the left": lambda x: -0.75 * x,
    "by": lambda x: x / 3,
    "cap": lambda x: 2 * torch.tanh(x / 2),
}
NEEDED: dict[str, Callable[[Any], Any]] = {
    "plus a number": lambda x: x + 1,
    "plus a tensor": lambda x: torch.arange(VOCABULARY) / VOCABULARY + x,
    "tensor less this": lambda x: torch.ones(()) - x,
    "times a tensor": lambda x: x * torch.full((VOCABULARY,), 0.5),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "masked": lambda x: x.masked_fill(torch.arange(VOCABULARY) % 2 == 0, 0.25),
    "new dimension": lambda x: x[None],
    "transposed": lambda x: x.transpose(0, -2),
    "stacked": lambda x: torch.cat([x, x], 0),
    "clone": lambda x: x.clone(),
    "itself": lambda x: x + x,
}
CHANGES = {**KEPT, **NEEDED}


@settings(deadline=None, max_examples=120, derandomize=True, database=None)
@given(chain=st.lists(st.sampled_from(sorted(CHANGES)), max_size=6), bias=st.booleans())
def test_any_chain_of_operations(chain, bias):
    """Shape and dtype at every step, and values and gradients at the end, are those of a tensor.

    Each operation rounds once more, and scales may be multiplied before the product.
    """
    leaves = Leaves.drawn(bias)
    wide = leaves.double()
    deferred, plain, exact = leaves.deferred(), leaves.head(leaves.hidden), wide.head(wide.hidden)
    for name in chain:
        deferred, plain = CHANGES[name](deferred), CHANGES[name](plain)
        with InDouble():
            exact = CHANGES[name](exact)
        for value in (plain, exact):
            assert deferred.shape == value.shape
            assert len(deferred) == len(value)
            assert deferred.dim() == deferred.ndim == value.ndim
        assert deferred.dtype == plain.dtype
    if set(chain) <= set(KEPT) and chain.count("cap") <= 1:
        assert isinstance(deferred, DeferredLogits)
    ours = real(deferred)
    pairs = zip(
        [ours.detach(), *leaves.gradients(ours)],
        [plain.detach(), *leaves.gradients(plain)],
        [exact.detach(), *wide.gradients(exact)],
        strict=True,
    )
    for mine, theirs, right in pairs:
        error, drawn = (mine.double() - right).norm(), (theirs.double() - right).norm()
        assert error <= FACTOR * drawn + (1 + len(chain)) * floor(right, theirs, mine)


@settings(deadline=None, max_examples=60, derandomize=True, database=None)
@given(chain=st.lists(st.sampled_from(sorted(KEPT)), max_size=5), reduction=st.sampled_from(["mean", "sum", "none"]))
def test_cross_entropy_after_any_chain(chain, reduction):
    leaves = Leaves.drawn(True)
    wide = leaves.double()
    outcomes = []
    for each, start in (
        (leaves, leaves.deferred()),
        (leaves, leaves.head(leaves.hidden)),
        (wide, wide.head(wide.hidden)),
    ):
        logits = start
        with InDouble() if each is wide else torch.enable_grad():
            for name in chain:
                logits = KEPT[name](logits)
            logits = logits.reshape(-1, VOCABULARY)
            target = (torch.arange(len(logits)) * 41) % VOCABULARY
            target[0] = -100 if len(logits) > 1 else 0
            loss = F.cross_entropy(logits, target, reduction=reduction)
        outcomes.append([loss.detach(), *each.gradients(loss)])
    for mine, theirs, right in zip(*outcomes, strict=True):
        error, drawn = (mine.double() - right).norm(), (theirs.double() - right).norm()
        assert error <= FACTOR * drawn + (1 + len(chain)) * floor(right, theirs, mine)


LOOKS: dict[str, Callable[[Any], Any]] = {
    "argmax": lambda x: x.argmax(-1),
    "torch.argmax": lambda x: torch.argmax(x, dim=-1),
    "topk": lambda x: x.topk(3).indices,
    "column": lambda x: x[:, :, 3],
    "one": lambda x: x[0, 0, 0],
    "entries by mask": lambda x: x[torch.arange(10 * VOCABULARY).view(*SHAPE, -1) % 3 == 0],
    "a column of masked rows": lambda x: x[torch.arange(10).view(SHAPE) % 3 == 0, 4],
    "first columns": lambda x: x[..., :5],
    "gather": lambda x: x.gather(-1, torch.zeros(*SHAPE, 1, dtype=torch.long)),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "einsum": lambda x: torch.einsum("bsv->bs", x),
    "numel": lambda x: torch.tensor(x.numel()),
    "size": lambda x: torch.tensor([x.size(-1), *x.size()]),
    "flat": lambda x: x.flatten(1),
    "rows by a mask of numpy": lambda x: x[np.arange(10).reshape(SHAPE) % 3 == 0],
    "rows by a mask of bytes": lambda x: x[(torch.arange(10).view(SHAPE) % 3 == 0).byte()],
    "rows by a list": lambda x: x[[1, 0]],
    "rows by a list of bools": lambda x: x[[True, False]],
    "a row by a number of numpy": lambda x: x[np.int64(1)],
    "rows by numbers of numpy": lambda x: x[:, np.array([3, 0])],
    "rows by range": lambda x: x[range(1)],
    "list": lambda x: torch.tensor(x.tolist()),
    "first of a loop": lambda x: next(iter(x)),
    "numpy": lambda x: torch.as_tensor(x.detach().numpy()),
    "like": torch.zeros_like,
    "in place": lambda x: x.mul_(2),
    "soft targets": lambda x: F.cross_entropy(x.reshape(-1, VOCABULARY), torch.full((10, VOCABULARY), 1 / VOCABULARY)),
    "two dimensions": lambda x: F.cross_entropy(x.transpose(1, 2), torch.zeros(SHAPE, dtype=torch.long)),
    "class weights": lambda x: F.cross_entropy(
        x.flatten(0, 1), torch.arange(10), torch.linspace(0.5, 2, VOCABULARY), label_smoothing=0.125
    ),
    "module": lambda x: nn.CrossEntropyLoss(ignore_index=3)(x.flatten(0, 1), torch.arange(10)),
    "old reduction": lambda x: F.cross_entropy(x.flatten(0, 1), torch.arange(10), reduce=False),
}


@pytest.mark.parametrize("name", LOOKS)
def test_looks_like_a_tensor(name):
    leaves = Leaves.drawn(True)
    ours, theirs = LOOKS[name](leaves.deferred()), LOOKS[name](leaves.head(leaves.hidden))
    assert type(ours) is type(theirs)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=8 * torch.finfo(torch.float32).eps, atol=1e-6)


def test_assignment_is_seen_afterwards():
    deferred = Leaves.drawn(False).deferred()
    deferred[..., 7] = 99.0
    assert (deferred.argmax(-1) == 7).all()
    assert F.cross_entropy(deferred.flatten(0, 1), torch.full((10,), 7)).item() == 0


def test_says_that_nothing_is_computed():
    with computed() as reasons:
        text = repr(Leaves.drawn(False).deferred())
    assert text == "DeferredLogits(shape=(2, 5, 301), dtype=torch.float32, device=cpu)"
    assert reasons == []


# --- corners ----------------------------------------------------------------------------------------------------------

OPERATORS: dict[str, Callable[[Any], Any]] = {
    "-": lambda x: x - 1,
    "r-": lambda x: 1 - x,
    "neg": lambda x: -x,
    "**": lambda x: x**2,
    "r/": lambda x: 1 / (x + 9),
    "%": lambda x: x % 2,
    "abs": abs,
    "<": lambda x: x < 0,
    ">": lambda x: x > 0,
    "==": lambda x: x == 0,
    "where": lambda x: torch.where(x > 0, x, 0 * x),
    "view of another dtype": lambda x: x.view(torch.int32),
    "reshape by name": lambda x: x.reshape(shape=(-1, VOCABULARY)),
    "memory format": lambda x: x.contiguous(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    leaves = Leaves.drawn(True)
    ours, theirs = OPERATORS[name](leaves.deferred()), OPERATORS[name](leaves.head(leaves.hidden))
    assert isinstance(ours, Tensor | DeferredLogits)
    assert torch.equal(real(ours), theirs)


def aliased(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    shifted = logits[:, :-1]
    logits[..., 290:] = -3.0
    return logits, F.cross_entropy(shifted.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))


def multiplied_in_place(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    scaled = logits
    scaled *= 2
    return logits, entropy(logits, labels)


def test_writing_into_logits_whose_rows_were_taken():
    """Rows would not see it: refused, and an error where that was not tried."""
    with pytest.raises(ValueError, match="cannot be followed"):
        logitless.patch(fake(aliased))
    model = fake(aliased)
    logitless.patch(model, verify=False)
    with pytest.raises(RuntimeError, match="cannot be followed"):
        model(**batch())


def test_scaling_in_place():
    """Whoever else has the logits sees it."""
    model = fake(multiplied_in_place)
    exact, plain = exact_results(model, batch()), results(model, batch())
    logitless.patch(model)
    check(results(model, batch()), plain, exact)


def test_logits_asked_for_first_without_gradients():
    model = patched()
    output = model(**batch())
    with torch.no_grad():
        output.logits.argmax(-1)
    assert output.logits.square().mean().requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_logits_asked_for_after_evaluation(mode):
    model = patched().eval()
    with mode():
        output = model(**batch())
    assert output.logits.cpu().numpy().shape == (2, 12, VOCABULARY)


DERIVED: dict[str, Callable[[Any], Tensor]] = {
    "themselves": lambda logits: logits.detach() + 0,
    "rows": lambda logits: logits[:, :-1].detach(),
    "scaled": lambda logits: (logits / 2).softmax(-1),
    "cast": lambda logits: logits.double().detach(),
    "shifted and flattened": lambda logits: logits[:, 1:].flatten(0, 1).argmax(-1),
    "cross-entropy": lambda logits: F.cross_entropy(logits.flatten(0, 1), torch.ones(24, dtype=torch.long)),
}
each_derived = pytest.mark.parametrize("derived", DERIVED.values(), ids=DERIVED)


def by_its_own_loss(model: nn.Module, output: Any) -> None:
    output.loss.backward()


def by_another_call(model: nn.Module, output: Any) -> None:
    model(**batch()).loss.backward()


def by_a_call_without_labels(model: nn.Module, output: Any) -> None:
    model(input_ids=batch()["input_ids"]).logits.square().mean().backward()


def by_other_logits(model: nn.Module, output: Any) -> None:
    model(**batch()).logits.square().mean().backward()


@each_derived
@pytest.mark.parametrize(
    ("recording", "trained"),
    [
        (True, by_its_own_loss),
        *itertools.product([True, False], [by_another_call, by_a_call_without_labels, by_other_logits]),
    ],
)
def test_logits_asked_for_after_a_step(derived, recording, trained):
    """An error; never those of the new weights, also where writes to these are not counted."""
    model = patched()
    with torch.set_grad_enabled(recording):
        output = model(**batch())
    trained(model, output)
    model.lm_head.weight.data.mul_(2)
    with pytest.raises(RuntimeError, match="a backward pass through the head has begun since they were deferred"):
        derived(output.logits)


def test_logits_of_a_frozen_head_asked_for_after_a_step():
    model = patched()
    model.lm_head.requires_grad_(False)
    output = model(**batch())
    before = model(input_ids=batch()["input_ids"]).logits.detach()
    output.loss.backward()
    torch.optim.SGD(model.parameters(), 1.0).step()
    torch.testing.assert_close(output.logits.detach(), before)


def test_logits_asked_for_after_the_step_before():
    """What happened before the call does not matter."""
    model = patched()
    for _ in range(2):
        output, before = model(**batch()), model(input_ids=batch()["input_ids"]).logits.detach()
        torch.testing.assert_close(output.logits.detach(), before)
        output.loss.backward()
        torch.optim.SGD(model.parameters(), 1.0).step()


def trained_within(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    model.calls += 1
    if model.calls == 1:
        model(**batch(seed=4)).loss.backward()
    return logits, entropy(logits, labels)


def test_backward_pass_of_another_call_while_one_runs():
    """As another thread's may be: it does not end the logits of the one that runs."""
    model, twin = fake(trained_within), fake(lambda model, hidden, logits, labels: (logits, entropy(logits, labels)))
    logitless.patch(model, verify=False)
    with computed() as reasons:
        assert model(**batch()).loss.item() == pytest.approx(
            twin(**batch()).loss.item(), rel=4 * torch.finfo(torch.float32).eps
        )
    assert reasons == []
    assert model.calls == 2


def by_parameter(model: nn.Module) -> Any:
    output = model(**batch())
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    return output


def by_load(model: nn.Module) -> Any:
    output = model(**batch())
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)
    return output


def by_functional_call(model: nn.Module) -> Any:
    others = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    return torch.func.functional_call(model, others, (), batch())


@each_derived
@pytest.mark.parametrize("replaced", [by_parameter, by_load, by_functional_call], ids=lambda f: f.__name__)
def test_logits_asked_for_after_the_weight_was_replaced(replaced, derived):
    output = replaced(patched())
    with pytest.raises(RuntimeError, match="weight has changed since they were deferred"):
        derived(output.logits)


def test_functional_call():
    """The loss and its gradients are those of the parameters given."""

    def called(model: nn.Module) -> Results:
        given = {name: (parameter.detach() * 2).requires_grad_() for name, parameter in model.named_parameters()}
        loss = torch.func.functional_call(model, given, (), batch()).loss
        loss.backward()
        return {"loss": loss.detach(), **{name: value.grad for name, value in given.items()}}

    with InDouble():
        exact = called(llama().double())
    check(called(patched()), called(llama()), exact)


def test_calls_in_another_thread():
    """One with labels does not make logits of one without deferred."""
    model, twin = patched().eval(), llama().eval()
    tokens = batch()["input_ids"]
    found: list[Any] = []
    others = threading.Thread(target=lambda: found.append(model(input_ids=tokens).logits))

    def meanwhile(module: nn.Module, inputs: Any) -> None:
        if not found and threading.current_thread() is not others:
            others.start()
            others.join()

    model.lm_head.register_forward_pre_hook(meanwhile)
    output = model(**batch())
    assert isinstance(output.logits, DeferredLogits)
    assert type(found[0]) is Tensor
    assert torch.equal(found[0], twin(input_ids=tokens).logits)


def recursive(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    model.calls += 1
    if model.calls % 2 == 0:
        return logits, entropy(logits, labels)
    inner = model(**batch(seed=4)).loss
    return logits, inner + entropy(model.lm_head(hidden), labels)


def test_call_within_a_call():
    """With labels, of the same model: the rest of the outer one has deferred logits still."""
    compare(fake(recursive), batch())


class Delegating(transformers.LlamaForCausalLM):
    """A model whose forward is another call of it."""

    def forward(self, input_ids=None, labels=None, again=True, **others):
        if again:
            return self.forward(input_ids=input_ids, labels=labels, again=False, **others)
        return super().forward(input_ids=input_ids, labels=labels, **others)


def test_inner_call_reaches_the_head_for_the_outer():
    """Nothing to warn of."""
    model = Delegating(llama().config)
    logitless.patch(model)
    with warnings.catch_warnings(action="error"):
        assert isinstance(model(**batch()).logits, DeferredLogits)


def test_call_of_another_model_within_a_call():
    """Without labels, of one that is patched too."""
    teacher, kinds = patched(), []

    def tail(model: Fake, hidden: Tensor, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
        kinds.append(type(teacher(input_ids=batch()["input_ids"]).logits))
        return logits, entropy(model.lm_head(hidden), labels)

    model = fake(tail)
    logitless.patch(model)
    with computed() as reasons:
        model(**batch())
    assert set(kinds) == {Tensor}
    assert reasons == []


@each_derived
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_made_of_evaluated_logits(mode, derived):
    """As of a tensor: no gradient, and the same values."""
    model = patched().eval()
    with mode():
        output, plain = model(**batch()), llama().eval()(**batch())
    found = derived(output.logits)
    assert not found.requires_grad
    torch.testing.assert_close(found, derived(plain.logits))


@pytest.mark.parametrize("when", ["before the patch", "after it"])
def test_hook_that_reads_the_heads_input(when):
    """It is called for the logits and for the loss, with hidden states."""
    model = patched()
    if when == "before the patch":
        logitless.unpatch(model)
    given: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: given.append(inputs[0].detach()))
    if when == "before the patch":
        logitless.patch(model)
    given.clear()
    model(**batch()).loss.backward()
    hidden = llama().model(batch()["input_ids"]).last_hidden_state
    assert len(given) == 2
    assert torch.equal(given[0], hidden)
    assert torch.equal(given[1].view(hidden.shape), hidden)


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_whole_model_into_a_file(how):
    """Refused when it is written, not when it is read."""
    with pytest.raises(TypeError, match=r"a patched model cannot be pickled; save its state_dict\(\)"):
        pickle.dumps(patched()) if how == "pickle" else torch.save(patched(), io.BytesIO())


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_a_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [through_pickle, through_a_file, copy.deepcopy, copy.copy], ids=lambda f: f.__name__)
@pytest.mark.parametrize("evaluated", [False, True], ids=["training", "evaluated"])
def test_outputs_are_copied_as_tensors(way, evaluated):
    """Also what cannot be copied: tensors with a history are not for ``deepcopy``."""
    model, twin = patched().eval(), llama().eval()
    with torch.set_grad_enabled(not evaluated):
        ours, plain = model(**batch()), twin(**batch())
    if way is copy.deepcopy and not evaluated:
        for output in (ours, plain):
            with pytest.raises(RuntimeError, match="Only Tensors created explicitly by the user"):
                way(output)
        return
    found = way(ours)
    torch.testing.assert_close(real(found.logits), way(plain).logits)
    assert found.loss.item() == ours.loss.item()


@pytest.mark.parametrize(
    "hook",
    [lambda module, inputs, output: output * 2, lambda module, inputs, output: output.clamp(-0.5, 0.5)],
    ids=["scale", "clamp"],
)
def test_hook_that_changes_what_the_head_returns(hook):
    """It changes the logits, and not what is made of them."""
    model, twin = patched(), llama()
    for each in (model, twin):
        each.lm_head.register_forward_hook(hook)
    ours, plain, exact = results(model, batch()), results(twin, batch()), exact_results(twin, batch())
    check(ours, plain, exact)


def test_hook_that_changes_what_the_head_is_given():
    """Once, before the logits are deferred."""
    model, twin = patched(), llama()
    for each in (model, twin):
        each.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    ours, plain, exact = results(model, batch()), results(twin, batch()), exact_results(twin, batch())
    check(ours, plain, exact)


def test_replica_of_data_parallel():
    with pytest.raises(TypeError, match=r"must not be in torch.nn.DataParallel, .* start one process for each device"):
        patched()._replicate_for_data_parallel()


def test_patching_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        logitless.patch(llama())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_patching_without_gradients(mode):
    model = llama()
    with mode():
        logitless.patch(model)
    assert isinstance(model(**batch()).logits, DeferredLogits)


def test_partitioned_weight_not_tried():
    """ZeRO-3 loads models with empty weights, whose shape is in ``ds_shape``."""
    model = llama()
    weight = model.lm_head.weight
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    assert logitless.patch(model, verify=False).heads == (("lm_head", (VOCABULARY, HIDDEN)),)


def test_counted_labels():
    """The batches of these tests have rows that count, of unequal number."""
    assert 0 < counted(batch()) < 22


def test_forward_that_was_put_around_stays():
    """As trainers do it: ours does nothing within it once the model is not patched, and it may be patched anew."""
    model, given = patched(), batch()
    ours, calls = model.forward, []
    model.forward = lambda *args, labels=None, **kwargs: (calls.append(1), ours(*args, labels=labels, **kwargs))[1]
    logitless.unpatch(model)
    assert isinstance(model(**given).logits, Tensor)
    logitless.patch(model)
    before = len(calls)
    assert isinstance(model(**given).logits, DeferredLogits)
    assert len(calls) == before + 1
