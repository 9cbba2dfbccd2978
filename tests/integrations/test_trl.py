"""TRL's trainers, adapted: the losses, parameters and metrics of its own head, without logits.

Each trainer runs three times from the same seed: with plain logits on a model in fp64, with TRL's own head in fp32, and
adapted in fp32. The adapted run may be as far from the first as TRL's is, by the rule of ``tolerance``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from trl.trainer import utils as trl_utils  # noqa: E402

import logitless  # noqa: E402
from logitless.integrations import trl as integration  # noqa: E402
from tolerance import FACTOR  # noqa: E402

# Of TRL, transformers and accelerate about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

VOCABULARY = 331
STEPS = 3
HIDDEN = 32
DEVICE = "cuda" if os.environ.get("LOGITLESS_TEST_DEVICE") == "cuda" else "cpu"
# The logits of the tokens of a batch do not fit beside the weight's gradient, of 42 KB; kernels take wider windows.
WORKSPACE = {"cpu": "96KiB", "cuda": "128KiB"}[DEVICE]
EPS = torch.finfo(torch.float32).eps
# What a ratio of a completion's probabilities in two passes may be off by: a pass with gradients sums in another order
# on a GPU, so that each token's log-probability, between 8 and 16, may have another last digit.
COMPLETION = 8
RATIO = COMPLETION * 2.0**-20 if DEVICE == "cuda" else 0.0


class PlainHead:
    """In the place of TRL's function: from the logits, in their own dtype."""

    @staticmethod
    def apply(hidden, weight, bias, targets, temperature, chunk_size, cap=None, scale=1.0, outputs=integration.GIVEN):
        del chunk_size, outputs
        logits = F.linear(hidden, weight, bias) * scale
        logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / temperature
        log_probs = logits.log_softmax(-1)
        chosen = log_probs.gather(-1, targets[:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return chosen, entropy, (2 * log_probs).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == targets


class Rows(TorchDispatchMode):
    """The most rows that the memory of any tensor [..., V] holds."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.shape[-1:] == (VOCABULARY,):
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.itemsize // VOCABULARY)
        return result


@functools.cache
def tokenizer() -> Any:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bare, **names)


@functools.cache
def checkpoint() -> Any:
    """A random model whose own operations keep to the dtype of its parameters, fp64 too."""
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.2,  # logits that differ from each other
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(config)


def model_of(dtype: torch.dtype, folder: Path) -> Any:
    """A copy, loaded from a folder, from where trainers load reference models too."""
    if not folder.exists():
        checkpoint().save_pretrained(folder)
    return transformers.GPTNeoXForCausalLM.from_pretrained(folder, dtype=dtype)


def words(count: int, length: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(VOCABULARY - 3, (count, length), generator=generator).tolist()
    shorter = [row[: length - i % 3] for i, row in enumerate(drawn)]
    return [" ".join(f"w{i}" for i in row) for row in shorter]


def lora() -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"], task_type="CAUSAL_LM")


def common(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "optim": "sgd",  # updates in proportion to gradients: as wrong as these, no more and no less
        "learning_rate": 0.3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": DEVICE == "cpu",
        "bf16": False,
        "tf32": False,  # on GPUs the default is on
        "disable_tqdm": True,
        "seed": 7,
        **options,
    }


def sft(model: Any, folder: Path, *, peft_config: Any = None, **options: Any) -> Any:
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**common(folder, max_length=32, gradient_accumulation_steps=2, **options)),
        train_dataset=datasets.Dataset.from_dict({"text": words(16, 20, seed=1)}),
        eval_dataset=datasets.Dataset.from_dict({"text": words(4, 12, seed=2)}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def preferences() -> Any:
    pairs = {"prompt": words(16, 8, 3), "chosen": words(16, 12, 4), "rejected": words(16, 12, 5)}
    return datasets.Dataset.from_dict(pairs)


def dpo(model: Any, folder: Path, *, peft_config: Any = None, **options: Any) -> Any:
    reference = None if peft_config is not None else copy.deepcopy(model)
    if reference is not None:  # one that differs from the model
        with torch.no_grad():
            reference.get_output_embeddings().weight.mul_(0.9)
    return trl.DPOTrainer(
        model,
        ref_model=reference,
        args=trl.DPOConfig(**common(folder, max_length=32, **options)),
        train_dataset=preferences(),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def kto(model: Any, folder: Path, *, peft_config: Any = None, **options: Any) -> Any:
    labels = [i % 3 > 0 for i in range(16)]
    examples = {"prompt": words(16, 8, 3), "completion": words(16, 12, 4), "label": labels}
    return trl.KTOTrainer(
        model,
        args=trl.KTOConfig(**common(folder, max_length=32, **options)),
        train_dataset=datasets.Dataset.from_dict(examples),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def reward(completions: list[str], **_: Any) -> list[float]:
    """Of words with an even number."""
    return [sum(int(word[1:]) % 2 == 0 for word in text.split() if word[0] == "w") / 8 for text in completions]


def online(kind: str, model: Any, folder: Path, *, peft_config: Any = None, **options: Any) -> Any:
    given = {"num_generations": 4, "max_completion_length": COMPLETION, "temperature": 0.8, "beta": 0.05, **options}
    return getattr(trl, f"{kind}Trainer")(
        model,
        reward_funcs=reward,
        args=getattr(trl, f"{kind}Config")(**common(folder, **given)),
        train_dataset=datasets.Dataset.from_dict({"prompt": words(8, 6, 6)}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


grpo, rloo = functools.partial(online, "GRPO"), functools.partial(online, "RLOO")


@dataclass
class Run:
    """One training.

    Attributes:
        losses: of each micro-batch.
        metrics: of each step, by name.
        update: of each parameter that is trained.
        texts: that were generated.
    """

    losses: list[float] = field(default_factory=list)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    update: dict[str, Tensor] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)


UNRELATED = ("runtime", "per_second", "step_time", "epoch", "learning_rate", "total_flos")


def trained(trainer: Any) -> Run:
    run, step = Run(), trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Tensor:
        loss = step(*args, **kwargs)
        run.losses.append(loss.item())
        return loss

    trainer.training_step = training_step
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    trainer.train()
    if trainer.eval_dataset is not None:
        trainer.evaluate()
    run.update = {name: parameters[name].detach() - start for name, start in before.items()}
    for entry in trainer.state.log_history:
        for name, value in entry.items():
            if not any(part in name for part in UNRELATED):
                run.metrics.setdefault(name, []).append(float(value))
    run.texts = list(getattr(trainer, "_logs", {}).get("completion", []))
    return run


def check(ours: Run, theirs: Run, exact: Run, ratio: float) -> None:
    """Assert that the adapted run is as close to the exact one as TRL's own is.

    TRL's own run is one draw of fp32's rounding errors, and the floor is that of ``tolerance``. What is rounded is of
    the size of the largest number that loss or metrics are made of: log-probabilities of a sequence, of which rewards
    and their margins are differences. What loss and gradients are multiplied by may be off by ``ratio``.
    """
    assert ours.texts == theirs.texts == exact.texts
    assert ours.metrics.keys() == theirs.metrics.keys() == exact.metrics.keys()
    magnitude = max(abs(v) for name, vs in exact.metrics.items() if "num_tokens" not in name for v in vs)
    failures = []

    def compare(name: str, mine: Any, own: Any, right: Any, size: float) -> None:
        mine, own, right = (torch.as_tensor(value, dtype=torch.float64) for value in (mine, own, right))
        error, allowed = (mine - right).norm(), (FACTOR + 4) * (own - right).norm() + 4 * EPS * size
        if not error <= allowed + ratio * right.norm():
            failures.append(f"{name}: error {error:.2e}, allowed {allowed:.2e}, size {right.norm():.2e}")

    compare("losses", ours.losses, theirs.losses, exact.losses, magnitude)
    for name, values in exact.metrics.items():
        compare(name, ours.metrics[name], theirs.metrics[name], values, magnitude)
    for name, right in exact.update.items():
        compare(name, ours.update[name], theirs.update[name], right, right.norm().item())
    assert not failures, "; ".join(failures)
    assert max(update.norm().item() for update in exact.update.values()) > 1e-3, "nothing was trained"


CASES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sft": (sft, {}),
    "sft lora": (sft, {"peft_config": lora}),
    "sft dft": (sft, {"loss_type": "dft"}),
    "dpo": (dpo, {"per_device_train_batch_size": 2, "use_weighting": True}),
    "dpo lora": (dpo, {"per_device_train_batch_size": 2, "peft_config": lora}),
    "grpo": (grpo, {"entropy_coef": 0.05, "num_iterations": 2, "top_entropy_quantile": 0.7}),
    "grpo lora": (grpo, {"peft_config": lora}),
    "kto": (kto, {}),
    "rloo": (rloo, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_training(case, tmp_path, monkeypatch):
    make, options = CASES[case]

    def trainer_of(dtype: torch.dtype) -> Any:
        """Seeds, too."""
        given = {name: value() if callable(value) else value for name, value in options.items()}
        return make(model_of(dtype, tmp_path / "model"), tmp_path, **given)

    theirs_rows, ours_rows = Rows(), Rows()
    trainer = trainer_of(torch.float32)
    with theirs_rows:
        theirs = trained(trainer)
    trainer = trainer_of(torch.float32)
    integration.adapt(trainer, workspace=WORKSPACE)
    with ours_rows:
        ours = trained(trainer)
    with monkeypatch.context() as patched:
        patched.setattr(trl_utils, integration.FUNCTION, PlainHead)
        exact = trained(trainer_of(torch.float64))
    assert ours_rows.most < theirs_rows.most
    # The transposed weight is [D, V] itself; windows of kernels are wider.
    assert DEVICE == "cuda" or ours_rows.most <= HIDDEN < theirs_rows.most
    if DEVICE == "cuda" and ours.texts == theirs.texts != exact.texts:
        pytest.skip("in fp64 a model draws other tokens on a GPU")
    check(ours, theirs, exact, RATIO if ours.texts else 0.0)


def without_own(monkeypatch) -> None:
    """From now on TRL's function raises."""

    def apply(*_: Any) -> None:
        raise AssertionError("TRL's own function was called")

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", apply)


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_mixed_precision(make, tmp_path, monkeypatch):
    """Forwards that accelerate has wrapped: the reference model's before, the model's afterwards."""
    theirs = trained(make(model_of(torch.float32, tmp_path / "model"), tmp_path, bf16=True))
    trainer = make(model_of(torch.float32, tmp_path / "model"), tmp_path, bf16=True)
    integration.adapt(trainer)
    with monkeypatch.context() as patched:
        without_own(patched)
        ours = trained(trainer)
        integration.restore(trainer)
        with pytest.raises(AssertionError, match="own function"):
            trainer.train()
    integration.adapt(trainer)
    without_own(monkeypatch)
    trainer.train()
    # Both draw the roundings of bf16 anew for each logit; the first step's loss has no others.
    magnitude = max(abs(v) for name, vs in theirs.metrics.items() if "num_tokens" not in name for v in vs)
    assert abs(ours.losses[0] - theirs.losses[0]) <= 4 * torch.finfo(torch.bfloat16).eps * magnitude


def test_restore(tmp_path, monkeypatch):
    trainer = dpo(model_of(torch.float32, tmp_path / "model"), tmp_path)
    before = [model.forward for model in (trainer.model, trainer.ref_model)]
    integration.adapt(trainer)
    assert [model.forward for model in (trainer.model, trainer.ref_model)] != before
    integration.restore(trainer)
    assert [model.forward for model in (trainer.model, trainer.ref_model)] == before
    assert not any(name.startswith("_logitless") for name in (*vars(trainer.model), *vars(trainer.ref_model)))
    without_own(monkeypatch)
    with pytest.raises(AssertionError, match="own function"):
        trainer.train()


def test_other_models_keep_their_head(tmp_path):
    ours = sft(model_of(torch.float32, tmp_path / "model"), tmp_path)
    own = trl_utils._ChunkedLogProbFunction
    integration.adapt(ours)
    tokens = torch.randint(VOCABULARY, (1, 5), device=DEVICE)
    assert trl_utils._ChunkedLogProbFunction is own
    ours.model(tokens, labels=tokens, fused_lm_head=True)
    assert trl_utils._ChunkedLogProbFunction is own
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="target"):
            ours.model(tokens, labels=tokens + VOCABULARY, fused_lm_head=True)
    else:
        assert ours.model(tokens, labels=tokens + VOCABULARY, fused_lm_head=True).loss.isnan()
    assert trl_utils._ChunkedLogProbFunction is own


def test_forward_without_labels_is_the_models_own(tmp_path):
    trainer = sft(model_of(torch.float32, tmp_path / "model"), tmp_path)
    tokens = torch.randint(VOCABULARY, (2, 5), device=DEVICE)
    expected, signature = trainer.model(tokens).logits, inspect.signature(trainer.model.forward)
    integration.adapt(trainer)
    assert inspect.signature(trainer.model.forward) == signature
    assert torch.equal(trainer.model(tokens).logits, expected)


def test_with_a_patched_model(tmp_path, monkeypatch):
    model = model_of(torch.float32, tmp_path / "model")
    logitless.patch(model)
    trainer = sft(model, tmp_path)
    integration.adapt(trainer)
    without_own(monkeypatch)
    assert len(trained(trainer).losses) == 2 * STEPS


@pytest.mark.parametrize("with_lora", [False, True], ids=["", "LoRA"])
@pytest.mark.parametrize("when", ["before the trainer", "after it"])
@pytest.mark.parametrize("make", [sft, dpo, kto, grpo, rloo], ids=["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_a_patch_that_is_not_used_is_said(make, when, with_lora, tmp_path):
    """Once in the first step; adapted, there is nothing to say."""
    for adapted in (False, True):
        model = model_of(torch.float32, tmp_path / "model")
        if when == "before the trainer":
            logitless.patch(model)
        trainer = make(model, tmp_path, peft_config=lora() if with_lora else None, max_steps=1)
        if when == "after it":
            logitless.patch(trainer.model)
        if adapted:
            integration.adapt(trainer)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train()
        texts = [text for text in (str(one.message) for one in said) if "patched model" in text]
        assert len(texts) == (0 if adapted else 1)
        assert all("Call logitless.integrations.trl.adapt(trainer)" in text for text in texts)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("changed", ["meta", torch.bfloat16, torch.float64], ids=str)
def test_another_default_device_or_dtype(changed, cap, tmp_path):
    """Of tensors that say where they are: the same numbers, and the check of TRL's function passes."""
    trainer = sft(model_of(torch.float32, tmp_path / "model"), tmp_path)
    torch.manual_seed(1)
    hidden, weight = (torch.randn(rows, 12, device=DEVICE, requires_grad=True) for rows in (9, 31))
    targets = torch.arange(9, device=DEVICE)

    def computed() -> list[Tensor]:
        given = (hidden, weight, None, targets, 0.9, 4, cap, 0.7, integration.GIVEN)
        values = integration._Head(trl_utils._ChunkedLogProbFunction, {}).apply(*given)
        gradients = torch.autograd.grad(values[0].sum() + values[1].sum(), (hidden, weight))
        return [*values, *gradients]

    expected = computed()
    if changed == "meta":
        torch.set_default_device(changed)
    else:
        torch.set_default_dtype(changed)
    try:
        integration.adapt(trainer)
        found = computed()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_sampled_gradient(tmp_path):
    """The loss of the first batch is exact, what is learnt from it is not."""
    runs = []
    for gradient in ("exact", logitless.Sampled(threshold=0.5)):
        trainer = sft(model_of(torch.float32, tmp_path / "model"), tmp_path)
        integration.adapt(trainer, gradient=gradient)
        runs.append(trained(trainer))
    exact, sampled = runs
    assert sampled.losses[0] == pytest.approx(exact.losses[0], rel=4 * EPS)
    exact_update, sampled_update = (torch.cat([u.flatten() for u in run.update.values()]) for run in runs)
    difference = (sampled_update - exact_update).norm() / exact_update.norm()
    assert 1e-3 < difference < 0.5


# --- the head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 9])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_head(tokens, bias, cap):
    """Outputs and gradients with every option, and what of each TRL asks for alone."""
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, 8), (40, 8), (40,))
    leaves = [torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]
    if not bias:
        leaves[2] = None
    targets = torch.randint(40, (tokens,), generator=generator)
    options = (targets, 0.7, 16, cap, 1.3)
    head = integration._Head(trl_utils._ChunkedLogProbFunction, {})
    results = []
    for function in (head, PlainHead):
        values = function.apply(*leaves, *options, integration.GIVEN)
        upstream = torch.arange(tokens) / 7 - 0.5
        loss = (values[0] * upstream).sum() + (values[1] * upstream.flip(0)).sum()
        results.append((values, torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])))
    (ours, our_gradients), (exact, gradients) = results
    for name, mine, right in zip(integration.GIVEN, ours, exact, strict=True):
        # TRL's own function, which the mean with a cap is from, is in fp32.
        single = name == "mean_logits" and cap is not None
        tolerance = 8 * torch.finfo(torch.float32 if single else torch.float64).eps * 10
        torch.testing.assert_close(mine.to(right.dtype), right, rtol=tolerance, atol=tolerance)
        assert name in ("log_probs", "entropy") or not mine.requires_grad
    for mine, right in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-13, atol=1e-13)
    for index, name in enumerate(integration.GIVEN):
        alone = head.apply(*leaves, *options, (name,))
        assert [value is None for value in alone[1:]] == [other != name for other in integration.GIVEN[1:]]
        torch.testing.assert_close(alone[index], ours[index])


def test_head_refuses_what_it_does_not_know():
    head = integration._Head(trl_utils._ChunkedLogProbFunction, {})
    hidden, weight, targets = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"outputs must be among log_probs, .*, got margin: unknown"):
        head.apply(hidden, weight, None, targets, 1.0, 4, outputs=("log_probs", "margin"))
    weight.ds_id = 0
    with pytest.raises(ValueError, match=r"one that DeepSpeed ZeRO-3 shards: use ZeRO-2 or FSDP"):
        head.apply(hidden, weight, None, targets, 1.0, 4)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trainer(tmp_path):
    return sft(model_of(torch.float32, tmp_path / "model"), tmp_path)


def refused(trainer: Any, error: type[Exception], message: str, **options: Any) -> None:
    forward = trainer.model.forward
    with pytest.raises(error, match=message):
        integration.adapt(trainer, **options)
    assert trainer.model.forward == forward


def test_refuses_to_adapt_twice(trainer):
    integration.adapt(trainer)
    refused(trainer, ValueError, r"adapted already, got a SFTTrainer; call logitless\.integrations\.trl\.restore")


def test_refuses_to_restore_what_is_not_adapted(trainer):
    with pytest.raises(ValueError, match=r"trl\.adapt was called on, got a SFTTrainer"):
        integration.restore(trainer)


def test_refuses_what_is_no_trainer():
    with pytest.raises(TypeError, match="trainer must be one of TRL, with a model and an accelerator, got a Linear"):
        integration.adapt(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "some"}, ValueError, "gradient"),
        ({"gradient": logitless.Sampled(scan="fp8")}, ValueError, "outputs='entropy' needs every logit in full"),
        ({"workspace": "much"}, ValueError, "workspace"),
        ({"backend": "cpu"}, ValueError, "backend"),
    ],
)
def test_refuses_options(trainer, options, error, message):
    refused(trainer, error, message, **options)


def test_refuses_losses_of_real_logits(tmp_path):
    model = model_of(torch.float32, tmp_path / "model")
    refused(
        sft(model, tmp_path, label_smoothing_factor=0.1), ValueError, r"label_smoothing_factor=0\.1: .* set it to 0"
    )
    trainer = sft(model_of(torch.float32, tmp_path / "model"), tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    refused(trainer, ValueError, r"got compute_loss_func: TRL gives it logits")


def test_refuses_a_model_without_fused_head(trainer):
    del trainer.model.forward
    refused(trainer, ValueError, r"TRL's fused head, got a SFTTrainer with a GPTNeoXForCausalLM without one")


def test_refuses_another_signature(trainer, monkeypatch):
    class Another:
        @staticmethod
        def forward(ctx, hidden, weight, targets):
            """Of some other TRL."""

    monkeypatch.setattr(trl_utils, integration.FUNCTION, Another)
    refused(trainer, ValueError, r"must take hidden, weight, .*, got hidden, weight, targets: this TRL is unknown")


@pytest.mark.parametrize("index", range(len(integration.GIVEN)))
def test_refuses_another_meaning(trainer, monkeypatch, index):
    own = trl_utils._ChunkedLogProbFunction

    class Another:
        forward = own.forward

        @staticmethod
        def apply(*args):
            values = list(own.apply(*args))
            values[index] = ~values[index] if values[index].dtype == torch.bool else values[index] * 1.01
            return tuple(values)

    monkeypatch.setattr(trl_utils, integration.FUNCTION, Another)
    refused(trainer, ValueError, rf"{integration.GIVEN[index]} of TRL's fused head must be known, got a difference of")


def test_refuses_a_head_that_cannot_be_tried(trainer, monkeypatch):
    without_own(monkeypatch)
    refused(trainer, ValueError, r"got AssertionError when it was tried: TRL's own function was called; 1\.16 is known")
