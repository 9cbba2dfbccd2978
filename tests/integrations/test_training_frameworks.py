"""Patched models in the hands of what people train with: Trainer, Accelerate, PEFT, torch.compile, DDP, FSDP, ZeRO.

Each is run with the model's own logits and without. Losses and gradients are held to ``tolerance`` against fp64 where
one step is compared; over steps, plain SGD passes on a step's difference as it is, so parameters may differ by the
learning rate times what gradients may, once for each step.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")
sys.path.append(str(Path(__file__).parents[1] / "distributed"))

import workers  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from small_models import (  # noqa: E402
    HIDDEN,
    MODELS,
    VOCABULARY,
    batch,
    check,
    computed,
    counted,
    exact_results,
    llama,
    results,
)
from training_cases import ARGUMENTS, CASES, RATE, STEPS, AskedTooLate, Parallel, rows, whole  # noqa: E402
from workers import Outcome  # noqa: E402

import logitless  # noqa: E402
from logitless.integrations.deferred import DeferredLogits, real  # noqa: E402

# Of these libraries about themselves.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]

EPS = torch.finfo(torch.float32).eps
# Where the parallel cases run.
KIND = "cuda" if os.environ.get("LOGITLESS_TEST_DEVICE") == "cuda" and torch.cuda.device_count() >= 2 else "cpu"
# Seconds after which processes are killed; on GPUs they compile kernels in them.
LIMIT = 150 if KIND == "cpu" else 400


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps what it found first, and older versions of Trainer tell it through the environment."""
    environment = dict(os.environ)
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._shared_state.clear()
    yield
    os.environ.clear()
    os.environ.update(environment)
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._shared_state.clear()


# --- Trainer ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What a training run came to."""

    losses: list[float]
    parameters: dict[str, Tensor]
    metrics: dict[str, float]
    computed: list[str]


def trained(
    folder: Path,
    *,
    patched: bool,
    metrics: Callable[..., dict[str, float]] | None = None,
    preprocess: Callable[[Any, Any], Any] | None = None,
    evaluate: bool = False,
    resume: Path | None = None,
    **arguments: Any,
) -> Run:
    model = llama()
    if patched:
        logitless.patch(model)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(output_dir=str(folder), **(ARGUMENTS | arguments)),
        train_dataset=rows(16),
        eval_dataset=rows(8, seed=2),
        compute_metrics=metrics,
        preprocess_logits_for_metrics=preprocess,
    )
    with computed() as reasons:
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        found = trainer.evaluate() if evaluate else {}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Run(losses, {n: p.detach().clone() for n, p in model.named_parameters()}, found, reasons)


def assert_same(ours: Run, plain: Run, steps: int = STEPS, eps: float = EPS) -> None:
    """Up to rounding.

    A gradient of a parameter is off by 16 eps of its size at most: each of the five layers between it and the loss
    rounds once or twice. Losses of 5.7 to the four digits that older versions log.
    """
    assert ours.losses == pytest.approx(plain.losses, rel=16 * eps, abs=2e-4)
    start = llama().state_dict()
    for name, parameter in plain.parameters.items():
        moved = (parameter - start[name]).norm()
        allowed = steps * 16 * eps * moved + EPS * parameter.norm()
        assert (ours.parameters[name] - parameter).norm() <= allowed, name


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"neftune_noise_alpha": 5.0},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=lambda arguments: next(iter(arguments), "plain"),
)
def test_trainer(arguments, tmp_path):
    ours, plain = (trained(tmp_path, patched=patched, **arguments) for patched in (True, False))
    assert_same(ours, plain)
    assert ours.computed == []


def test_trainer_in_bf16(tmp_path):
    """Autocast rounds logits to bf16 where they are formed; without them there is nothing to round."""
    ours, plain = (trained(tmp_path, patched=patched, bf16=True) for patched in (True, False))
    assert_same(ours, plain, eps=torch.finfo(torch.bfloat16).eps)
    assert ours.computed == []


def test_accumulation_is_one_batch(tmp_path):
    """Eight micro-batches of unequal numbers of labels are one batch of eight."""
    one = trained(tmp_path, patched=True, per_device_train_batch_size=8)
    eight = trained(tmp_path, patched=True, per_device_train_batch_size=1, gradient_accumulation_steps=8)
    assert_same(eight, one)
    assert eight.computed == []


def test_label_smoothing_of_the_trainer(tmp_path):
    """The trainer takes the labels away and smooths the model's logits itself: as before, to the bit, which is said."""
    options = {"label_smoothing_factor": 0.1, "evaluate": True}
    plain = trained(tmp_path, patched=False, **options)
    with pytest.warns(UserWarning, match=r"called in training without labels: .*patch\(model, label_smoothing="):
        ours = trained(tmp_path, patched=True, **options)
    assert ours.losses == plain.losses
    assert all(torch.equal(ours.parameters[name], plain.parameters[name]) for name in plain.parameters)
    assert ours.metrics["eval_loss"] == plain.metrics["eval_loss"]


@pytest.mark.parametrize(
    ("arguments", "eps"),
    [({}, EPS), ({"prediction_loss_only": True}, EPS), ({"bf16_full_eval": True}, torch.finfo(torch.bfloat16).eps)],
    ids=str,
)
def test_evaluation(arguments, eps, tmp_path):
    """In bf16 logits below 1 are rounded where they are formed, by a quarter of an eps at most."""
    ours, plain = (trained(tmp_path, patched=patched, evaluate=True, **arguments) for patched in (True, False))
    # In fp32 by `assert_same` after the steps; the loss is some 5.7.
    assert ours.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=16 * EPS, abs=eps / 4)
    assert ours.computed == []


def accuracy(predicted: Any) -> dict[str, float]:
    right = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
    return {"accuracy": float(right.mean()), "shape": float(predicted.predictions.size)}


def test_evaluation_with_metrics(tmp_path):
    ours, plain = (trained(tmp_path, patched=p, evaluate=True, metrics=accuracy) for p in (True, False))
    assert ours.metrics["eval_accuracy"] == plain.metrics["eval_accuracy"]
    assert ours.metrics["eval_shape"] == plain.metrics["eval_shape"] == 8 * 12 * VOCABULARY
    assert ours.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=16 * EPS)


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_evaluation_with_metrics_of_predictions(compiled, tmp_path):
    """As scripts do that cannot keep the logits of a whole evaluation."""

    def accuracy(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions[:, :-1] == predicted.label_ids[:, 1:]).mean())}

    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
    ours, plain = (
        trained(tmp_path, patched=p, evaluate=True, metrics=accuracy, preprocess=lambda x, _: x.argmax(-1), **options)
        for p in (True, False)
    )
    assert ours.metrics["eval_accuracy"] == plain.metrics["eval_accuracy"]
    assert ours.metrics["eval_loss"] == pytest.approx(plain.metrics["eval_loss"], rel=16 * EPS)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_evaluation_with_all_logits(mode, tmp_path):
    model, plain = llama().eval(), llama().eval()
    logitless.patch(model)
    with mode():
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch()).logits
        torch.testing.assert_close(torch.as_tensor(found.detach()), plain(**batch()).logits)


def test_prediction(tmp_path):
    model = llama()
    logitless.patch(model)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    predicted = transformers.Trainer(model, arguments).predict(rows(4))
    assert predicted.predictions.shape == (4, 12, VOCABULARY)


def test_resume(tmp_path):
    """From a checkpoint of a patched model, patched or not, the run goes on as it did."""
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    through = trained(tmp_path / "a", patched=True, **saving)
    for patched in (True, False):
        resumed = trained(tmp_path / "b", patched=patched, resume=tmp_path / "a" / "checkpoint-2", max_steps=4)
        assert_same(resumed, through, steps=4)


def test_loss_of_the_users_own(tmp_path):
    """``compute_loss_func`` gets the labels that the model does not: real logits."""
    model, kinds = llama(), []
    logitless.patch(model)

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        kinds.append(type(outputs.logits))
        logits = outputs.logits[:, :-1].reshape(-1, VOCABULARY)
        return F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    transformers.Trainer(model, arguments, train_dataset=rows(8), compute_loss_func=loss).train()
    assert kinds == [Tensor]


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", ["torch.compile", "in place", "body alone"])
def test_compiled_in_one_graph(how, tied):
    """Without a break, and with the numbers of eager mode."""
    model, arguments = llama(tied), batch()
    exact, plain = exact_results(model, arguments), results(model, arguments)
    logitless.patch(model)
    called = model
    if how == "torch.compile":
        called = torch.compile(model, fullgraph=True, backend="aot_eager")
    else:
        (model if how == "in place" else model.model).compile(fullgraph=True, backend="aot_eager")
    with computed() as reasons:
        check(results(called, arguments), plain, exact)
    assert reasons == []


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_compiled_for_varying_lengths(dynamic):
    """As rarely as without the patch, but for one compilation, and with the losses of eager mode."""

    def losses(model: nn.Module) -> tuple[int, list[Tensor]]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        whole = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
        found = []
        for length in range(10, 20):
            ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(length))
            loss = whole(input_ids=ids, labels=ids).loss
            loss.backward()
            found.append(loss.detach())
        return counter.frame_count, found

    model = llama()
    plain, expected = losses(model)
    logitless.patch(model)
    count, found = losses(model)
    assert count <= plain + 1
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("nothing_compiled")
def test_patched_after_it_was_compiled_in_place():
    """What was compiled before does not stay, and the trial does not compile."""
    model = llama()
    exact, plain = exact_results(model, batch()), results(model, batch())
    model.compile(fullgraph=True, backend="aot_eager")
    model(**batch())
    with torch.compiler.set_stance("fail_on_recompile"):
        logitless.patch(model)
    with computed() as reasons:
        check(results(model, batch()), plain, exact)
    assert reasons == []


@pytest.mark.usefixtures("nothing_compiled")
def test_logits_of_a_compiled_call():
    """As of one that is not: until the step, without another compilation for each, and an error after it."""
    model = llama()
    logitless.patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(**batch())
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for _ in range(2):
        with torch.compiler.set_stance("fail_on_recompile"):
            output = compiled(**batch())
        torch.testing.assert_close(real(output.logits), model(input_ids=batch()["input_ids"]).logits)
        with torch.compiler.set_stance("fail_on_recompile"):
            output = compiled(**batch())
        output.loss.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="weight has changed since they were deferred"):
            output.logits.detach()


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_without_labels():
    model = llama()
    tokens = batch()["input_ids"]
    before = model(input_ids=tokens).logits
    logitless.patch(model)
    after = torch.compile(model, fullgraph=True, backend="aot_eager")(input_ids=tokens).logits
    assert type(after) is Tensor
    torch.testing.assert_close(after, before)


# --- Accelerate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    """Gradient accumulation, and a wrapper that would cast logits to fp32."""
    runs = []
    for patched in (True, False):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        model = llama()
        if patched:
            logitless.patch(model)
        optimizer = torch.optim.SGD(model.parameters(), RATE)
        loader = torch.utils.data.DataLoader(rows(16), batch_size=4)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        with computed() as reasons:
            for some in loader:
                with accelerator.accumulate(prepared):
                    output = prepared(**some)
                    accelerator.backward(output.loss)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(output.loss.item())
        assert output.logits.dtype == torch.float32
        unwrapped = accelerator.unwrap_model(prepared)
        assert unwrapped is model
        assert isinstance(unwrapped(**batch()).logits, DeferredLogits) == patched
        runs.append(Run(losses, {n: p.detach().clone() for n, p in model.named_parameters()}, {}, reasons))
        if patched:
            logitless.unpatch(unwrapped)
            assert isinstance(unwrapped(**batch()).logits, Tensor)
        for kind in (AcceleratorState, GradientState, PartialState):
            kind._shared_state.clear()
    assert runs[0].computed == []
    assert_same(*runs, steps=2, eps=EPS if precision == "no" else torch.finfo(torch.bfloat16).eps)


def test_unwrapped_without_accelerates_casts():
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = llama()
    logitless.patch(model)
    unwrapped = accelerator.unwrap_model(accelerator.prepare(model), keep_fp32_wrapper=False)
    assert isinstance(unwrapped(**batch()).logits, DeferredLogits)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def adapted(tied: bool = False, **options: Any) -> Any:
    """Adapters that are not zero."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options})
    return peft.get_peft_model(llama(tied), config).eval()


def compare(model: nn.Module, *, heads: tuple[str, ...]) -> None:
    arguments = batch()
    exact, plain = exact_results(model, arguments), results(model, arguments)
    report = logitless.patch(model)
    assert tuple(name for name, _ in report.heads) == heads
    with computed() as reasons:
        check(results(model, arguments), plain, exact)
    assert reasons == []


LORA: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "body": ({"target_modules": ["q_proj", "v_proj"]}, ("lm_head",)),
    "head": ({"target_modules": ["lm_head"]}, ("lm_head.base_layer", "lm_head.lora_B.default")),
    "both": ({"target_modules": ["q_proj", "lm_head"]}, ("lm_head.base_layer", "lm_head.lora_B.default")),
    "rank-stabilised": (
        {"target_modules": ["lm_head"], "use_rslora": True},
        ("lm_head.base_layer", "lm_head.lora_B.default"),
    ),
    "with a bias": (
        {"target_modules": ["lm_head"], "lora_bias": True},
        ("lm_head.base_layer", "lm_head.lora_B.default"),
    ),
    "head saved": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ("lm_head.original_module", "lm_head.modules_to_save.default"),
    ),
    "DoRA of the body": ({"target_modules": ["q_proj"], "use_dora": True}, ("lm_head",)),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LORA)
def test_lora(name, tied):
    options, heads = LORA[name]
    compare(adapted(tied, **options), heads=heads)


@pytest.mark.parametrize("name", ["gemma2", "phi"])
def test_lora_on_a_head_with_more(name):
    """A softcap; a bias."""
    config = peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)
    compare(peft.get_peft_model(MODELS[name](), config).eval(), heads=("lm_head.base_layer", "lm_head.lora_B.default"))


@pytest.mark.parametrize("saved", [["lm_head", "embed_tokens"], ["embed_tokens"], ["lm_head"]], ids=str)
def test_head_and_embedding_saved_and_kept_tied(saved):
    """PEFT makes a head of the embedding, whose attributes say [D, V]; since 0.19, which ties a head alone too."""
    release = tuple(int(part) for part in peft.__version__.split(".")[:2])
    if release < (0, 18) or (release == (0, 18) and "embed_tokens" not in saved):
        pytest.skip("this PEFT does not keep them tied")
    model = adapted(True, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True)
    compare(model, heads=("lm_head.original_module", "lm_head.modules_to_save.default"))
    if release >= (0, 19):
        assert model.get_base_model().lm_head.modules_to_save.default.out_features == HIDDEN


def test_lora_with_checkpointing():
    model = adapted(target_modules=["q_proj", "lm_head"]).train()
    exact, plain = exact_results(model, batch()), results(model, batch())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    logitless.patch(model)
    check(results(model, batch()), plain, exact)


def test_two_adapters():
    """Either, and both; none gives the model without them."""
    model = adapted(target_modules=["lm_head"])
    model.add_adapter("other", peft.LoraConfig(r=6, target_modules=["lm_head"], init_lora_weights=False))
    model.eval()
    for active in ("default", "other", ["default", "other"]):
        model.base_model.set_adapter(active)
        compare(model, heads=("lm_head.base_layer", "lm_head.lora_B.default", "lm_head.lora_B.other"))
        logitless.unpatch(model)
    logitless.patch(model)
    with model.disable_adapter(), computed() as reasons:
        loss = model(**batch()).loss
    assert loss.item() == pytest.approx(llama()(**batch()).loss.item(), rel=4 * EPS)
    assert reasons == []


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_dora_on_the_head_is_refused(tied):
    model = adapted(tied, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match=r"needs its logits for .* which cannot be followed"):
        logitless.patch(model)
    assert isinstance(model(**batch()).logits, Tensor)


@pytest.mark.parametrize(("tied", "where"), [(True, [3, 4]), (False, {"lm_head": [3]})], ids=["tied", "head"])
def test_rows_of_the_head_trained_apart_are_refused(tied, where):
    model = adapted(tied, target_modules=["q_proj"], trainable_token_indices=where)
    with pytest.raises(ValueError, match=r"no call of lm_head.*: another layer forms its logits"):
        logitless.patch(model)


@pytest.mark.parametrize("config", ["IA3Config", "LoHaConfig", "LoKrConfig"])
def test_other_adapters_on_the_head_are_refused(config):
    options = {"feedforward_modules": []} if config == "IA3Config" else {}
    model = peft.get_peft_model(llama(), getattr(peft, config)(target_modules=["lm_head"], **options))
    with pytest.raises(ValueError, match=r"needs its logits for .* which cannot be followed"):
        logitless.patch(model)


@pytest.mark.parametrize("order", ["unpatched first", "merged first"])
def test_merged(order):
    model = adapted(target_modules=["q_proj", "lm_head"])
    before = model(**batch()).loss.item()
    logitless.patch(model)
    if order == "unpatched first":
        logitless.unpatch(model)
        merged = model.merge_and_unload()
    else:
        merged = model.merge_and_unload()
        logitless.unpatch(merged)
    assert merged(**batch()).loss.item() == pytest.approx(before, rel=16 * EPS)
    assert isinstance(merged(**batch()).logits, Tensor)
    assert "forward" not in vars(merged) | vars(merged.lm_head)


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, LORA["head saved"][0]], ids=["LoRA", "saved"])
def test_adapters_added_after_the_patch(options):
    """The head is then another module: logits are computed, and right."""
    model = llama()
    logitless.patch(model)
    config = peft.LoraConfig(**{"r": 4, "init_lora_weights": False, **options})
    later = peft.get_peft_model(model, config).eval()
    twin = peft.get_peft_model(llama(), config).eval()
    twin.load_state_dict(later.state_dict())
    exact, plain = exact_results(twin, batch()), results(twin, batch())
    check(results(later, batch()), plain, exact)
    logitless.unpatch(later)


def test_adapter_through_a_file(tmp_path):
    model = adapted(target_modules=["lm_head"])
    logitless.patch(model)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    assert loaded(**batch()).loss.item() == pytest.approx(model(**batch()).loss.item(), rel=4 * EPS)


# --- parallel ---------------------------------------------------------------------------------------------------------

needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """Of all cases, in two processes."""
    return workers.run(CASES, 2, tmp_path_factory.mktemp("training"), LIMIT, KIND)


@needs_gloo
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, Parallel)])
def test_parallel(outcomes, name):
    """The sum of ranks' losses, and the gradients, are those of one process."""
    one = {**whole(), "num_items_in_batch": counted(whole())}
    model = llama(CASES[name].tied)
    exact, plain = exact_results(model, one), results(model, one)
    for result in workers.values(outcomes[name]):
        ours = {parameter.replace("_fsdp_wrapped_module.", ""): tensor for parameter, tensor in result.items()}
        check(ours, plain, exact)


@needs_gloo
def test_fsdp1_around_the_head_alone_is_refused(outcomes):
    for outcome in outcomes["fsdp1 head"]:
        assert "weight must be [V, D] in its forward, got shape (4816,)" in outcome.message


@needs_gloo
def test_trainer_under_fsdp2(outcomes, tmp_path):
    """Losses and parameters of two processes are those of one with the same batches."""
    one = trained(tmp_path, patched=False)
    for result in workers.values(outcomes["trainer fsdp2"]):
        losses = result.pop("losses").tolist()
        assert_same(Run(losses, result, {}, []), one)


@needs_gloo
@pytest.mark.parametrize("name", [name for name in CASES if "asked" in name])
def test_logits_of_a_sharded_model(outcomes, name):
    for logits in workers.values(outcomes[name]):
        torch.testing.assert_close(logits, llama()(**whole()).logits.detach())


@needs_gloo
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, AskedTooLate)])
def test_logits_of_a_sharded_model_after_a_step(outcomes, name):
    for told in workers.values(outcomes[name]):
        assert "a backward pass through the head has begun since they were deferred" in told


class Around(torch.autograd.Function):
    """Calls something on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return gradient, None


class Partitioned:
    """As ZeRO-3 treats a module: its parameters are there during its forward and backward, and empty else."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.filled = module, 0
        self.shards = {name: parameter.data.clone() for name, parameter in module.named_parameters(recurse=False)}
        self.free()
        module.register_forward_pre_hook(self.before)
        module.register_forward_hook(self.after)

    def fill(self) -> None:
        self.filled += 1
        for name, shard in self.shards.items():
            getattr(self.module, name).data = shard.clone()

    def free(self) -> None:
        for name in self.shards:
            getattr(self.module, name).data = torch.empty(0)

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        self.fill()
        return tuple(Around.apply(x, self.free) if isinstance(x, Tensor) and x.requires_grad else x for x in inputs)

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        self.free()
        kept = not isinstance(output, Tensor) or not output.requires_grad
        return output if kept else Around.apply(output, self.fill)


@pytest.mark.parametrize("workspace", [None, "40KB"], ids=["", "little workspace"])
@pytest.mark.parametrize("name", ["llama", "phi"])
def test_partitioned_parameters(name, workspace):
    model, arguments = MODELS[name]().eval(), batch()
    exact, plain = exact_results(model, arguments), results(model, arguments)
    logits = model(**arguments).logits.detach()
    logitless.patch(model, workspace=workspace)
    norm = model.model.norm if name == "llama" else model.model.final_layernorm
    partitions = [Partitioned(model.lm_head), Partitioned(norm)]
    model.zero_grad()
    output = model(**arguments)
    assert model.lm_head.weight.numel() == 0
    torch.testing.assert_close(output.logits.detach(), logits)
    assert model.lm_head.weight.numel() == 0
    output.loss.backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    check({"loss": output.loss.detach(), **ours}, plain, exact)
    assert all(partition.filled > 1 for partition in partitions)


def test_hooks_of_the_whole_backward_pass():
    model = llama()
    exact, plain = exact_results(model, batch()), results(model, batch())
    logitless.patch(model)
    model.lm_head.register_full_backward_pre_hook(lambda module, gradients: None)
    model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: None)
    check(results(model, batch()), plain, exact)
