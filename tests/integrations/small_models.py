"""Small random language models of `transformers`, batches, and how far a patched one may be from its own logits.

A model's loss and gradients are exact where everything runs in fp64: its parameters, and what its own code would cast
to fp32. A patched model in fp32 may be as far from that as the model with logits in fp32 is, by ``tolerance``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from logitless.integrations.deferred import DeferredLogits  # noqa: E402
from tolerance import FACTOR, Results, floor  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

VOCABULARY, HIDDEN = 301, 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def built(kind: str, config: str, **options: Any) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**{**SPECIAL, **options}))


def llama(tied: bool = False, **options: Any) -> Any:
    return built("LlamaForCausalLM", "LlamaConfig", **{**SIZES, "tie_word_embeddings": tied, **options})


def gpt2() -> Any:
    return built(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=VOCABULARY,
        n_embd=HIDDEN,
        n_layer=2,
        n_head=4,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )


def phi() -> Any:
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    model: Any = built("PhiForCausalLM", "PhiConfig", **sizes)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


def t5() -> Any:
    sizes = {"d_model": HIDDEN, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    return built("T5ForConditionalGeneration", "T5Config", vocab_size=VOCABULARY, decoder_start_token_id=0, **sizes)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama-tied": lambda: llama(tied=True),
    "gemma2": lambda: built("Gemma2ForCausalLM", "Gemma2Config", **SIZES, final_logit_softcapping=5.0),
    "gemma3": lambda: built("Gemma3ForCausalLM", "Gemma3TextConfig", **SIZES, final_logit_softcapping=20.0),
    "cohere": lambda: built("CohereForCausalLM", "CohereConfig", **SIZES, logit_scale=0.25),
    "granite": lambda: built("GraniteForCausalLM", "GraniteConfig", **SIZES, logits_scaling=8.0),
    "gpt2": gpt2,
    "phi": phi,
    "mixtral": lambda: built(
        "MixtralForCausalLM",
        "MixtralConfig",
        **SIZES,
        num_local_experts=4,
        experts_implementation="eager",  # grouped products know no fp64
        output_router_logits=True,
        router_aux_loss_coef=0.5,
    ),
    "t5": t5,
}


def batch(count: int = 2, length: int = 12, seed: int = 1) -> dict[str, Tensor]:
    """Random tokens; of each sequence another number of labels is ignored."""
    tokens = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    labels = tokens.clone()
    for row in range(count):
        labels[row, : 1 + (5 * row + seed) % (length - 3)] = -100
    return {"input_ids": tokens, "labels": labels}


def counted(given: dict[str, Tensor]) -> int:
    """How many labels count after the shift."""
    return int((given["labels"][:, 1:] != -100).sum())


class InDouble(TorchFunctionMode):
    """Casts to fp32 are casts to fp64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def wider(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        if func is Tensor.float:
            func = Tensor.double
        return func(*map(wider, args), **{name: wider(value) for name, value in (kwargs or {}).items()})


def results(model: nn.Module, given: dict[str, Any]) -> Results:
    """The loss and every gradient, by the parameter's name."""
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    named = {n.removeprefix("_orig_mod."): p for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in named.items() if p.grad is not None}}


def exact_results(model: nn.Module, given: dict[str, Any]) -> Results:
    """In fp64; the model given stays as it is."""
    wide = copy.deepcopy(model).double()
    with InDouble():
        return results(wide, given)


def check(ours: Results, plain: Results, exact: Results) -> None:
    """Assert that our errors are those of the model with logits in fp32."""
    assert ours.keys() == plain.keys() == exact.keys()
    failures = []
    for name, right in exact.items():
        assert ours[name].dtype == plain[name].dtype, name
        error = (ours[name].double() - right).norm().item()
        drawn = (plain[name].double() - right).norm().item()
        allowed = FACTOR * drawn + floor(right, plain[name], ours[name])
        if not error <= allowed:
            failures.append(f"{name}: error {error:.3e}, allowed {allowed:.3e}, size {right.norm():.3e}")
    assert not failures, "; ".join(failures)


@contextmanager
def computed() -> Iterator[list[str]]:
    """Why logits were computed meanwhile."""
    reasons: list[str] = []
    plain = DeferredLogits.tensor

    def tensor(self: DeferredLogits, reason: str = "tensor") -> Tensor:
        if self._tensor is None:
            reasons.append(reason)
        return plain(self, reason)

    DeferredLogits.tensor = tensor
    try:
        yield reasons
    finally:
        DeferredLogits.tensor = plain


def seen(model: nn.Module) -> dict[str, tuple[set[str], bool]]:
    """Names of every module's attributes, and its mode."""
    return {name: (set(vars(module)), module.training) for name, module in model.named_modules()}
