"""Patched models in parallel training, over gloo on CPUs or NCCL on GPUs: what each process runs."""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from small_models import batch, computed, counted, llama
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments
from workers import Member

import logitless
from logitless.integrations.deferred import DeferredLogits
from tolerance import Results

STEPS, RATE, BATCH = 3, 0.5, 4
# Plain gradient descent, on a CPU, in batches of BATCH.
ARGUMENTS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 0,
}


def rows(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Sequences with unequal numbers of labels that count."""
    both = batch(count, seed=seed)
    return [{name: tensor[row] for name, tensor in both.items()} for row in range(count)]


def whole() -> dict[str, Tensor]:
    """Of all ranks together; how many labels count differs between them."""
    return batch(4)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def layers(model: nn.Module) -> nn.Module:
    """FSDP2 as it is usually done: each layer, and the root with all the rest."""
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def with_head(model: nn.Module) -> nn.Module:
    fully_shard(model.lm_head)
    return layers(model)


def with_norm_and_head(model: nn.Module) -> nn.Module:
    fully_shard([model.model.norm, model.lm_head])
    return layers(model)


def with_tied_pair(model: nn.Module) -> nn.Module:
    fully_shard([model.model.embed_tokens, model.lm_head])
    return layers(model)


def fsdp1(model: nn.Module) -> nn.Module:
    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    return FullyShardedDataParallel(model, use_orig_params=True, device_id=device_of(model), auto_wrap_policy=policy)


def fsdp1_with_head(model: nn.Module) -> nn.Module:
    options: dict[str, Any] = {"use_orig_params": True, "device_id": device_of(model)}
    model.lm_head = FullyShardedDataParallel(model.lm_head, **options)
    return FullyShardedDataParallel(model, **options)


def as_started_by_accelerate() -> contextlib.AbstractContextManager:
    """Accelerate's state, new. On a CPU it takes no FSDP plugin: what it is given is put in."""
    for kind in (AcceleratorState, GradientState, PartialState):
        kind._shared_state.clear()
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size())}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used: the group is there
    os.environ["FSDP_VERSION"] = "2"  # as `accelerate launch` says to older versions of Trainer
    make = AcceleratorState.__init__

    def corrected(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        make(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": fsdp_plugin}

    return mock.patch.object(AcceleratorState, "__init__", corrected)


def accelerate_fsdp2(model: nn.Module) -> nn.Module:
    """As ``Accelerator.prepare`` does it."""
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
    )
    with as_started_by_accelerate():
        accelerator = Accelerator(cpu=device_of(model).type == "cpu", fsdp_plugin=plugin)
        prepared, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1.0))
    return prepared


def whole_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients_of(model: nn.Module) -> Results:
    """Whole ones, under the names of the model that was wrapped."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {name: p.grad.clone() for name, p in model.named_parameters()}
    return {name.removeprefix("module."): whole_tensor(parameter.grad) for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class Parallel:
    """One forward and backward pass of each rank's sequences; the sum of losses, and gradients."""

    wrap: Callable[[nn.Module], nn.Module]
    tied: bool
    patched: bool = True

    def __call__(self, member: Member) -> Results:
        warnings.simplefilter("ignore")
        model = llama(self.tied).to(member.device)
        if self.patched:
            logitless.patch(model)
        parallel = self.wrap(model)
        everything = {name: tensor.to(member.device) for name, tensor in whole().items()}
        own = {name: tensor[member.rank :: member.size] for name, tensor in everything.items()}
        with computed() as reasons:
            output = parallel(**own, num_items_in_batch=counted(everything))
            # Ranks' gradients are averaged.
            (output.loss * member.size).backward()
        assert reasons == []
        assert isinstance(output.logits, DeferredLogits) == self.patched
        loss = output.loss.detach().clone()
        dist.all_reduce(loss)
        return {"loss": loss, **gradients_of(parallel)}


def patched_and_wrapped(wrap: Callable[[nn.Module], nn.Module], member: Member) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model, and the whole batch."""
    model = llama().to(member.device)
    logitless.patch(model)
    return wrap(model), {name: tensor.to(member.device) for name, tensor in whole().items()}


@dataclass(frozen=True)
class Asked:
    """Logits of a sharded model, asked for after the loss, by all ranks."""

    wrap: Callable[[nn.Module], nn.Module]

    def __call__(self, member: Member) -> Tensor:
        parallel, given = patched_and_wrapped(self.wrap, member)
        return parallel(**given).logits.detach()


@dataclass(frozen=True)
class AskedTooLate:
    """Logits of a sharded model, asked for after a step: what each rank is told.

    Attributes:
        wrap: how it is sharded.
        lists: whether the optimizer writes to lists of parameters, as by default on GPUs.
        again: whether the model is called once more before.
        recording: whether the logits are of a call that records gradients; else another call is trained on.
    """

    wrap: Callable[[nn.Module], nn.Module]
    lists: bool = False
    again: bool = False
    recording: bool = True

    def __call__(self, member: Member) -> str:
        parallel, given = patched_and_wrapped(self.wrap, member)
        with torch.set_grad_enabled(self.recording):
            output = parallel(**given)
        (output if self.recording else parallel(**given)).loss.backward()
        torch.optim.SGD(parallel.parameters(), RATE, foreach=self.lists).step()
        if self.again:
            parallel(**given)
        try:
            return f"computed {tuple((output.logits.detach() + 0).shape)}"
        except RuntimeError as error:
            return str(error)


@dataclass(frozen=True)
class ByTrainer:
    """Steps of ``transformers.Trainer`` under FSDP2, by batches of the same sequences; losses, and parameters."""

    patched: bool = True

    def __call__(self, member: Member) -> Results:
        warnings.simplefilter("ignore")
        model = llama()
        if self.patched:
            logitless.patch(model)
        arguments = ARGUMENTS | {
            "per_device_train_batch_size": BATCH // member.size,
            "use_cpu": member.device.type == "cpu",
            "ddp_backend": dist.get_backend(),
            "fsdp": "full_shard auto_wrap",
            "fsdp_config": {
                "version": 2,
                "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
                "sync_module_states": False,
            },
        }
        with as_started_by_accelerate(), computed() as reasons, tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                model,
                TrainingArguments(output_dir=folder, **arguments),
                train_dataset=rows(16),
            )
            trainer.train()
        assert reasons == []
        assert isinstance(trainer.model_wrapped, FSDPModule)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        parameters = {name: whole_tensor(parameter.detach()) for name, parameter in trainer.model.named_parameters()}
        return {"losses": torch.tensor(losses), **parameters}


def ddp(model: nn.Module) -> Any:
    return DistributedDataParallel(model)


CASES: dict[str, Callable[[Member], Any]] = {
    "ddp": Parallel(ddp, tied=False),
    "ddp tied": Parallel(ddp, tied=True),
    "fsdp2": Parallel(layers, tied=False),
    "fsdp2 tied": Parallel(layers, tied=True),
    "fsdp2 head": Parallel(with_head, tied=False),
    "fsdp2 norm and head": Parallel(with_norm_and_head, tied=False),
    "fsdp2 tied pair": Parallel(with_tied_pair, tied=True),
    "fsdp1": Parallel(fsdp1, tied=False),
    "fsdp1 tied": Parallel(fsdp1, tied=True),
    "accelerate fsdp2": Parallel(accelerate_fsdp2, tied=False),
    "trainer fsdp2": ByTrainer(),
    "fsdp1 head": Asked(fsdp1_with_head),
    "fsdp2 asked": Asked(layers),
    "fsdp2 head asked": Asked(with_head),
    "fsdp2 late": AskedTooLate(layers),
    "fsdp2 head late": AskedTooLate(with_head),
    "fsdp2 late, by lists": AskedTooLate(layers, lists=True),
    "fsdp2 head late, by lists": AskedTooLate(with_head, lists=True),
    "fsdp2 after another call": AskedTooLate(layers, again=True),
    "fsdp2 head after another call": AskedTooLate(with_head, again=True),
    "fsdp2 head after another call, by lists": AskedTooLate(with_head, lists=True, again=True),
    "fsdp2 evaluated, late": AskedTooLate(layers, lists=True, again=True, recording=False),
    "fsdp2 head evaluated, late": AskedTooLate(with_head, lists=True, again=True, recording=False),
    "fsdp1 late": AskedTooLate(fsdp1, lists=True),
    "fsdp1 after another call": AskedTooLate(fsdp1, lists=True, again=True),
    "fsdp1 evaluated, late": AskedTooLate(fsdp1, lists=True, again=True, recording=False),
}
