"""Processes that form one group, and a parent that hears what they find and outlives them."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

# What collectives wait for a rank that compiles, and the parent for a word, in seconds.
COLLECTIVE_LIMIT, PATIENCE = 80, 100
# Of an error, in characters.
LONGEST_MESSAGE = 1000


@dataclass(frozen=True)
class Member:
    """One process of several."""

    rank: int
    ranks: int
    device: torch.device
    pipe: Connection

    @property
    def group(self) -> dist.ProcessGroup | None:
        """Of all processes; None where there is one."""
        return dist.group.WORLD if self.ranks > 1 else None

    def tell(self, kind: str, content: object) -> None:
        """The parent, what rank 0 says."""
        if self.rank == 0:
            self.pipe.send((kind, content))

    def gathered(self, value: Any) -> list[Any]:
        """What every rank says, by rank."""
        if self.ranks == 1:
            return [value]
        values = [None] * self.ranks
        dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's, on every rank."""
        if self.ranks > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def come_together(self) -> None:
        if self.ranks > 1:
            dist.all_reduce(torch.zeros(1, device=self.device))


Work = Callable[..., None]
"""Called in each process with its member and what it was given."""

At = tuple[str, str, str]
"""A problem, a contender and a stage."""


class LostError(Exception):
    """Processes that left nothing to go on with.

    Attributes:
        at: what they were at.
        reason: what happened.
    """

    def __init__(self, at: At, reason: str) -> None:
        super().__init__(at, reason)
        self.at = at
        self.reason = reason


def enter(rank: int, ranks: int, kind: str, port: int, pipe: Connection, work: Work, given: tuple[Any, ...]) -> None:
    """What each process does."""
    try:
        device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(1)
        work(Member(rank, ranks, device, pipe), port, *given)
        pipe.send(("done", None))
    except BaseException:
        pipe.send(("raised", traceback.format_exc()))
        raise


def run_ranks(work: Work, ranks: int, kind: str, given: tuple[Any, ...], hear: Callable[[Any], None]) -> None:
    """Runs the work in so many processes, and hears what rank 0 has found.

    Raises:
        LostError: one of them raised, died or said nothing for too long; all are ended then.
    """
    context = multiprocessing.get_context("spawn")
    port, pipes, processes = free_port(), [], []
    at: At = ("", "", "start")
    try:
        for rank in range(ranks):
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=enter, args=(rank, ranks, kind, port, there, work, given), daemon=True)
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        working = list(pipes)
        while working:
            ready = wait(working, PATIENCE)
            if not ready:
                raise LostError(at, f"no word for {PATIENCE} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                try:
                    what, content = pipe.recv()
                except EOFError:
                    process = processes[pipes.index(pipe)]
                    process.join(5)
                    reason = f"rank {pipes.index(pipe)} died with exit code {process.exitcode}"
                    raise LostError(at, reason) from None
                if what == "raised":
                    raise LostError(at, f"rank {pipes.index(pipe)}: {content.strip().splitlines()[-1]}\n{content}")
                if what == "done":
                    working.remove(pipe)
                elif what == "at":
                    if content[2:] != at[2:] or not content[2].startswith("round"):
                        say(" ".join(filter(None, content)))
                    at = content
                else:
                    hear(content)
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


STARTED = time.monotonic()


def say(text: str) -> None:
    print(f"[{time.monotonic() - STARTED:5.0f} s] {text}", flush=True)


def join_group(member: Member, port: int) -> None:
    if member.ranks == 1:
        return
    cuda = member.device.type == "cuda"
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=member.rank,
        world_size=member.ranks,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT),
        device_id=member.device if cuda else None,
    )
