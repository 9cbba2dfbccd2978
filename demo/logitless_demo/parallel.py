"""A training run over several processes: FSDP2 over the data, tensor parallelism within each part of it.

The engine is `torch.distributed`: `torchrun` starts the processes, DTensor and FSDP2 shard the weights,
`torch.distributed.checkpoint` writes them, in a form that another number of processes can read.
"""

from __future__ import annotations

import gc
import math
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from logitless_demo.checkpoint import TEMPORARY_SUFFIX
from logitless_demo.config import TrainConfig
from logitless_demo.errors import InputError
from logitless_demo.model import Decoder

CHECKPOINT = "checkpoint-"  # and the number of steps done

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        mesh: of two dimensions, "data" and "tensor".
    """

    mesh: DeviceMesh

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return dist.get_rank() == 0

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The processes that have the vocabulary in shards, None where each has the whole."""
        return self.mesh.get_group("tensor") if self.mesh["tensor"].size() > 1 else None

    @property
    def part(self) -> int:
        """Number of this process's part of the data."""
        return self.mesh.get_local_rank("data")

    def own(self, sequences: Tensor) -> Tensor:
        """Returns this process's part of a batch `[B, ...]`."""
        return sequences.chunk(self.mesh["data"].size())[self.part]

    def mean(self, value: Tensor) -> Tensor:
        """Returns the mean of a number over the parts of the data."""
        value = value.detach().clone()
        dist.all_reduce(value, group=self.mesh.get_group("data"))
        return value / self.mesh["data"].size()

    def largest(self, number: int) -> int:
        """Returns the largest of the numbers that the processes have."""
        device = "cuda" if self.mesh.device_type == "cuda" else "cpu"
        value = torch.tensor(number, dtype=torch.int64, device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value)

    def first_does(self, act: Callable[[], Result]) -> Result:
        """Lets the first process act, and gives all what it returned.

        Raises:
            InputError: in all, if it was raised in the first.
        """
        outcome: list[Any] = [None]
        if self.first:
            try:
                outcome = [("done", act())]
            except InputError as error:
                outcome = [("error", str(error))]
        dist.broadcast_object_list(outcome)
        kind, value = outcome[0]
        if kind == "error":
            raise InputError(value)
        return value


@contextmanager
def join(data: int, tensor: int, device: str) -> Iterator[World | None]:
    """Joins the processes of the run, and leaves them again; yields None where there is but one.

    What holds shards must be gone when the body ends: it holds groups of processes, whose threads end with them.

    Raises:
        InputError: `torchrun` has started another number of them.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != data * tensor:
        raise InputError(
            f"--dp {data} and --tp {tensor} need {data * tensor} processes, and there are {started}: start them with "
            f"torchrun --nproc-per-node {data * tensor} -m logitless_demo train ..."
        )
    if started == 1:
        yield None
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (data, tensor), mesh_dim_names=("data", "tensor"))
    try:
        yield World(mesh)
    except InputError as error:  # raised between collectives, so that no thread is in one
        _clear_frames(error)
        _leave(mesh)
        raise
    except BaseException:  # in a collective maybe, for which the others will not come: nobody waits for its thread
        dist.destroy_process_group()
        raise
    _leave(mesh)


def _clear_frames(error: BaseException | None) -> None:
    """Lets go of what the functions had that an error came through, the model for one."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


def _leave(mesh: DeviceMesh) -> None:
    """Destroys the groups of processes, and waits until their threads have ended.

    A thread of a gloo group lets go of a collective's tensors some time after it is done. One that does so while Python
    ends cannot have the interpreter's lock any more, and aborts the process. Threads end with their group; but the mesh
    keeps its groups, and PyTorch's cache of operations on DTensors keeps the mesh until the process ends.
    """
    gc.collect()  # modules that are sharded refer to themselves
    dist.destroy_process_group()
    vars(mesh).get("_pg_registry", {}).clear()


def check_sizes(config: TrainConfig, data: int, tensor: int) -> None:
    """Checks that a run can be divided among so many processes.

    Raises:
        InputError: it cannot.
    """
    if min(data, tensor) < 1:
        raise InputError(f"--dp and --tp must be at least 1, got {data} and {tensor}")
    if config.batch % data:
        raise InputError(f"--batch must be a multiple of --dp, got {config.batch} and {data}")
    if config.model.heads % tensor:
        raise InputError(f"--heads must be a multiple of --tp, got {config.model.heads} and {tensor}")
    if tensor > 1 and (config.head not in ("exact", "sampled") or config.scan != "input"):
        raise InputError(f"--tp {tensor} needs --head exact or sampled, --scan input, got {config.head}, {config.scan}")


def shard(model: Decoder, world: World) -> None:
    """Cuts the weights of a model, the same in all processes, into what each of them keeps."""
    if world.tensor_group is not None:
        plan: dict[str, ParallelStyle] = {"embedding": RowwiseParallel(input_layouts=Replicate())}
        for number in range(len(model.layers)):
            for part, inner in (("attention", "qkv"), ("feedforward", "gate_and_up")):
                plan[f"layers.{number}.{part}.{inner}"] = ColwiseParallel()
                plan[f"layers.{number}.{part}.out"] = RowwiseParallel()
        parallelize_module(model, world.mesh["tensor"], plan)
    if world.mesh["data"].size() > 1:
        for layer in model.layers:
            fully_shard(layer, mesh=world.mesh["data"])
        fully_shard(model, mesh=world.mesh["data"])


def clip_gradients(model: Decoder, limit: float) -> Tensor:
    """Scales gradients so that their norm is at most `limit`; returns the norm before: one all-reduce."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    parts = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    squares = [part.square().sum() / _copies(whole) for part, whole in zip(parts, gradients, strict=True)]
    total = torch.stack(squares).sum()
    dist.all_reduce(total)
    norm = total.sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for part in parts:
        part.mul_(factor)
    return norm


def _copies(tensor: Tensor) -> int:
    """Returns how many processes have the same part of a tensor."""
    shards = 1
    if isinstance(tensor, DTensor):
        sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
        shards = math.prod(size for placement, size in sizes if not placement.is_replicate())
    return dist.get_world_size() // shards


def save_sharded(folder: Path, world: World, model: Decoder, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Writes a checkpoint of all processes, which takes the place of the last when it is whole."""
    path = folder / f"{CHECKPOINT}{step}"
    unfinished = path.with_name(path.name + TEMPORARY_SUFFIX)
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished)

    def keep() -> None:
        unfinished.rename(path)
        for other in folder.glob(f"{CHECKPOINT}*"):
            if other != path:
                shutil.rmtree(other)

    world.first_does(keep)


def last_sharded(folder: Path) -> tuple[Path, int] | None:
    """Returns the newest whole checkpoint of several processes, and its steps."""
    steps = [path.name.removeprefix(CHECKPOINT) for path in folder.glob(f"{CHECKPOINT}*")]
    done = max((int(text) for text in steps if text.isdigit()), default=None)
    return None if done is None else (folder / f"{CHECKPOINT}{done}", done)


def load_sharded(path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> None:
    """Reads a checkpoint that any number of processes has written.

    Raises:
        InputError: it cannot be read, or is that of another model.
    """
    weights, moments = get_state_dict(model, optimizer)
    try:
        load({"model": weights, "optimizer": moments}, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:
        raise InputError(f"{path} is not a checkpoint that can be read ({str(error).splitlines()[0]})") from error
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
