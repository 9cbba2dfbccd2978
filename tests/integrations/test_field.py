"""Patched models in the scripts people have: their logits as tensors, their heads replaced, their trainers' options."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing as mp
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from small_models import batch, llama  # noqa: E402

import logitless  # noqa: E402

# --- logits of an evaluated call are a tensor -------------------------------------------------------------------------


def through_torch_save(x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file)


def written_to(x: Tensor) -> Tensor:
    x[0, 0] = 3.0
    return x + 0


def through_a_queue(x: Tensor) -> Tensor:
    queue = mp.get_context("spawn").SimpleQueue()
    queue.put(x)
    return queue.get().clone()


def of_numpy(function: str) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        import numpy as np

        return torch.from_numpy(getattr(np, function)(x).copy())

    return call


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "as_tensor": torch.as_tensor,
    "as_tensor fp64": lambda x: torch.as_tensor(x, dtype=torch.float64),
    "tensor": torch.tensor,
    "asarray": torch.asarray,
    "asarray copy": lambda x: torch.asarray(x, copy=True),
    "from_dlpack": torch.utils.dlpack.from_dlpack,
    "np.from_dlpack": of_numpy("from_dlpack"),
    "np.asarray": of_numpy("asarray"),
    "np.array": of_numpy("array"),
    "numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "Parameter": nn.Parameter,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "save": through_torch_save,
    "queue": through_a_queue,
    "collate": lambda x: torch.utils.data.default_collate([x, x]),
    "rows": lambda x: torch.stack(list(x)),
    "written to": written_to,
    "in place": lambda x: x.mul_(2),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "as_subclass": lambda x: x.as_subclass(Tensor),
    "stride": lambda x: torch.tensor(x.stride()),
    "repr": lambda x: torch.tensor(len(repr(x))),
    "vmap": torch.func.vmap(lambda row: row.sum()),
    "trace": lambda x: torch.jit.trace(lambda a: a * 2, x)(x),
}


def evaluated(way: str, mode: Callable[[], contextlib.AbstractContextManager]) -> tuple[Any, Any]:
    """What the way makes of a patched model's logits, and of the plain model's."""
    plain = llama().eval()
    patched = copy.deepcopy(plain)
    logitless.patch(patched)
    with mode():
        return tuple(WAYS[way](model(**batch()).logits) for model in (patched, plain))


def test_evaluated_logits_are_a_tensor_for_everything():
    """In a process of its own, which must not die: what claimed to be a tensor and was none ended it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert run.stdout.split("\n")[-2] == f"{2 * len(WAYS)} agree"


def test_evaluated_logits_are_computed_when_they_are_read(monkeypatch):
    from logitless.integrations.deferred import DeferredLogits

    computed: list[str] = []
    own = DeferredLogits.tensor
    monkeypatch.setattr(DeferredLogits, "tensor", lambda self, reason="": (computed.append(reason), own(self))[1])
    model = llama().eval()
    logitless.patch(model)
    with torch.no_grad():
        output = model(**batch())
        assert isinstance(output.logits, Tensor)
        assert output.logits.shape == (*batch()["input_ids"].shape, model.config.vocab_size)
        kept = output.logits.detach()
        assert computed == []
        assert kept.argmax(-1).shape == batch()["input_ids"].shape
    assert len(computed) == 1


# --- heads whose weight was replaced ----------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the patch", "after it"])
def test_head_with_another_number_of_rows(when):
    """The weight says what V is, not what the layer was made with."""
    model, rows = llama(), 30
    wider = torch.randn(model.config.vocab_size + rows, model.config.hidden_size) / 8

    def replace(model: nn.Module) -> None:
        model.lm_head.weight = nn.Parameter(wider.clone())
        model.config.vocab_size = model.vocab_size = wider.shape[0]

    plain = copy.deepcopy(model)
    replace(plain)
    if when == "before the patch":
        replace(model)
    logitless.patch(model)
    if when == "after it":
        replace(model)
    given = batch()
    ours, theirs = model(**given), plain(**given)
    assert ours.logits.shape == theirs.logits.shape
    for output in (ours, theirs):
        output.loss.backward()
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("saved", [["lm_head", "embed_tokens"], ["embed_tokens"]], ids=str)
def test_tied_head_in_modules_to_save(saved):
    peft = pytest.importorskip("peft")
    adapters = {"modules_to_save": saved, "ensure_weight_tying": True, "init_lora_weights": "gaussian"}
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **adapters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about tied weights
        torch.manual_seed(0)
        plain = peft.get_peft_model(llama(tied=True), config)
    patched = copy.deepcopy(plain)
    logitless.patch(patched)
    for model in (patched, plain):
        model(**batch()).loss.backward()
    pairs = zip(patched.parameters(), plain.parameters(), strict=True)
    grads = [(a.grad, b.grad) for a, b in pairs if b.grad is not None]
    assert grads
    for ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# --- trainers that pass the patch by ----------------------------------------------------------------------------------


def trained(folder: Path, **options: Any) -> list[str]:
    """Warnings of ours while a patched model is trained."""
    pytest.importorskip("accelerate")
    model = llama()
    logitless.patch(model)
    rows = [{name: values[0] for name, values in batch(seed=seed).items()} for seed in range(4)]
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", **{k: v for k, v in options.items() if k != "compute_loss_func"},
    )  # fmt: skip
    func = {k: v for k, v in options.items() if k == "compute_loss_func"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        transformers.Trainer(model, arguments, train_dataset=rows, **func).train()
    return [str(each.message) for each in caught if "patched model" in str(each.message)]


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.float().logsumexp(-1).mean()


def test_label_smoothing_of_the_trainer_is_warned_of(tmp_path):
    (said,) = trained(tmp_path, label_smoothing_factor=0.1)
    assert "label_smoothing_factor" in said
    assert "logitless.patch(model, label_smoothing=...)" in said


def test_loss_function_of_the_trainer_is_warned_of(tmp_path):
    (said,) = trained(tmp_path, compute_loss_func=own_loss)
    assert "compute_loss_func" in said


def test_a_trainer_that_uses_the_patch_is_not_warned_of(tmp_path):
    assert trained(tmp_path) == []


def test_unpatch_leaves_nothing_behind():
    model = llama()
    before = set(model.__dict__)
    logitless.patch(model)
    logitless.unpatch(model)
    assert set(model.__dict__) == before


# --- another default device or dtype ----------------------------------------------------------------------------------


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "condition", [default_device, lambda: default_dtype(torch.float64), lambda: default_dtype(torch.bfloat16)],
    ids=["meta", "fp64", "bf16"],
)  # fmt: skip
def test_patch_under_another_default(condition):
    given, plain = batch(), llama()
    expected = plain(**given)
    expected.loss.backward()
    model = llama()
    with condition():
        logitless.patch(model)
        loss = model(**given).loss
        loss.backward()
    torch.testing.assert_close(loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(model.lm_head.weight.grad, plain.lm_head.weight.grad, rtol=1e-4, atol=1e-7)


def main() -> None:
    agree = 0
    for way in WAYS:
        for mode in (torch.no_grad, torch.inference_mode):
            print(way, mode.__name__, flush=True)
            ours, plain = evaluated(way, mode)
            assert isinstance(ours, type(plain)), (type(ours), type(plain))
            assert (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
            agree += 1
    print(f"{agree} agree")


if __name__ == "__main__":
    main()
