"""Writes docs/architectures.md: what ``logitless.patch`` says of every model type that `transformers` has.

python tests/integrations/support_table.py
"""

from __future__ import annotations

import argparse
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import tiny_models
import torch
import transformers
from tiny_models import CAUSAL, ENCODER_DECODER, INPUTS, KINDS, MULTIMODAL, Kwargs

import logitless
from logitless.integrations.causal_lm import Patched

FILE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEADINGS = {
    CAUSAL: "Causal language models",
    MULTIMODAL: "Multimodal models",
    ENCODER_DECODER: "Encoder-decoder and speech models",
}
# Types that no tiny model runs of, with or without its logits.
NOT_BUILT: dict[tuple[str, str], str] = {
    (CAUSAL, "gemma3n"): "needs the package timm",
    (MULTIMODAL, "gemma3n"): "needs the package timm",
    (MULTIMODAL, "fast_vlm"): "needs the package timm",
    (MULTIMODAL, "perception_lm"): "needs the package timm",
    (MULTIMODAL, "inkling_mm_model"): "needs the package scipy",
    (MULTIMODAL, "llama4"): "its own forward fails on text alone",
    (MULTIMODAL, "blip-2"): "needs pictures",
    (MULTIMODAL, "instructblip"): "needs pictures",
    (MULTIMODAL, "instructblipvideo"): "needs videos",
    (MULTIMODAL, "pp_formulanet"): "needs pictures",
    (ENCODER_DECODER, "voxtral_realtime"): "needs sound",
}
if int(transformers.__version__.split(".")[0]) < 5:
    NOT_BUILT |= {
        (CAUSAL, "apertus"): "cannot be counted on the meta device",
        (CAUSAL, "phi4_multimodal"): "needs a configuration of pictures",
        (CAUSAL, "qdqbert"): "needs the package pytorch-quantization",
        (CAUSAL, "recurrent_gemma"): "keeps the graph of one pass for the next",
        (CAUSAL, "speech_to_text_2"): "fails with this PyTorch",
        (CAUSAL, "transfo-xl"): "has an adaptive softmax",
        (ENCODER_DECODER, "gptsan-japanese"): "its own forward fails",
    }
_NO_LOSS = "must take labels in its forward"
_BIAS_BUFFER = r"it needs its logits for \+"
# Types that ``patch`` refuses, and what its message must hold.
REFUSED: dict[tuple[str, str], str] = {
    (CAUSAL, "dory"): "lm_head must be a torch.nn.Linear, got a DoryLMHead",
    (CAUSAL, "gemma4_assistant"): _NO_LOSS,
    (CAUSAL, "gemma4_unified_assistant"): _NO_LOSS,
    (CAUSAL, "inkling_text"): "Target .* is out of bounds",
    (CAUSAL, "musicgen"): "it has 4 heads",
    (CAUSAL, "musicgen_melody"): "it has 4 heads",
    (CAUSAL, "open-llama"): "got nothing: head unknown",
    (CAUSAL, "xlm-prophetnet"): "it needs its logits for transpose",
    (CAUSAL, "prophetnet"): "it needs its logits for transpose",
    (MULTIMODAL, "blip"): "got nothing: head unknown",
    (MULTIMODAL, "chameleon"): "it needs its logits for __setitem__",
    (MULTIMODAL, "diffusion_gemma"): _NO_LOSS,
    (MULTIMODAL, "idefics"): "lm_head must be a torch.nn.Linear, got a IdeficsDecoupledLinear",
    (MULTIMODAL, "nemotron_h_omni"): "got nothing: head unknown",
    (MULTIMODAL, "pi0"): _NO_LOSS,
    (ENCODER_DECODER, "fsmt"): "its head must be a torch.nn.Linear, got a Embedding",
    (ENCODER_DECODER, "xlm-prophetnet"): "it needs its logits for is_contiguous",
    (ENCODER_DECODER, "prophetnet"): "it needs its logits for is_contiguous",
    **{
        (ENCODER_DECODER, model_type): _BIAS_BUFFER
        for model_type in (
            *("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "led", "marian", "mbart", "mvp", "pegasus"),
            "plbart",
        )
    },
}


@dataclass(frozen=True)
class Row:
    """Of the table: a type, its class, what its head has, and whether loss and gradients are right without logits."""

    model_type: str
    name: str
    head: str
    verdict: str
    error: str = ""

    def start(self) -> str:
        """As Markdown, without the error."""
        return str(self).rsplit("|", 2)[0]

    def __str__(self) -> str:
        """As Markdown."""
        return f"| `{self.model_type}` | {self.name} | {self.head} | {self.verdict} | {self.error} |"


def head_of(report: Patched) -> str:
    """Facts of a head in words; the numbers are a tiny model's own."""
    facts = ["tied" if report.tied else "own weight"]
    facts += ["bias"] * report.bias + ["softcap"] * (report.softcap is not None) + ["scale"] * (report.logit_scale != 1)
    return ", ".join(facts)


def refusal(error: Exception) -> str:
    """A message of ``patch`` without the class's name, which has a column of its own."""
    text = " ".join(str(error).split())
    return re.sub(r"^\w+: |; (pass|patch|call) .*$", "", text).replace("|", "\\|")


def example_of(model_type: str, batch: Kwargs) -> Kwargs | None:
    """What to try a patch on, where tokens are not enough."""
    return batch if model_type in INPUTS else None


def row(kind: str, model_type: str) -> Row:
    """Build it, patch it, compare all its gradients with those from its logits."""
    name = tiny_models.names(kind)[model_type]
    if (kind, model_type) in NOT_BUILT:
        return Row(model_type, name, "", f"not tried: {NOT_BUILT[kind, model_type]}")
    model = tiny_models.build(kind, model_type)
    batch = tiny_models.batch(model_type, model.config)
    try:
        report = logitless.patch(model, example=example_of(model_type, batch))
    except (TypeError, ValueError) as error:
        return Row(model_type, name, "", f"refused: {refusal(error)}")
    ours = tiny_models.loss_and_gradients(model, batch)
    logitless.unpatch(model)
    plain = tiny_models.loss_and_gradients(model, batch)
    difference = sum((ours[name] - plain[name]).norm().item() ** 2 for name in plain if name != "loss") ** 0.5
    size = sum(plain[name].norm().item() ** 2 for name in plain if name != "loss") ** 0.5
    return Row(model_type, name, head_of(report), "yes", f"{difference / size:.0e}")


def table() -> str:
    """The whole file."""
    rows = {kind: [row(kind, model_type) for model_type in tiny_models.names(kind)] for kind in KINDS}
    every = [entry for entries in rows.values() for entry in entries]
    count = {word: sum(entry.verdict.startswith(word) for entry in every) for word in ("yes", "refused", "not tried")}
    parts = [
        "# Architectures",
        "`logitless.patch` on a tiny random model of every type of language model in transformers "
        f"{transformers.__version__}, in fp32: {count['yes']} work, {count['refused']} are refused, "
        f"{count['not tried']} do not run here\nwith or without logits. The error is the relative difference of the "
        "gradients of all parameters, taken together, to those of the\nmodel's own code from its logits. A refusal is "
        "an error that `patch` raises, with this reason; the model is then as it was.",
        "Written by `python tests/integrations/support_table.py`; `tests/integrations/test_architectures.py` compares "
        "it with what\nthe installed version gives.",
    ]
    for kind in KINDS:
        head = "| type | class | head | without logits | error |\n| --- | --- | --- | --- | --- |"
        parts += [f"## {HEADINGS[kind]}", "\n".join([head, *map(str, rows[kind])])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    FILE.write_text(table())
