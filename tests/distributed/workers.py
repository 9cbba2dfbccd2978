"""Runs named cases in several processes that form one process group.

A process takes seconds to start, so one set of processes runs many cases, each a function of a ``Member`` that returns
tensors. A case that raises leaves its exception as its outcome. All ranks wait for one another after each case, and get
a fresh group where one of them failed, so that the next case starts in step.

They work on CPUs with gloo, or on one GPU each with NCCL.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

# What the processes may take to start, in seconds.
START_LIMIT = 60
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
# What a collective waits for ranks that do not take part. On a GPU one rank may be compiling kernels meanwhile, and a
# wait that is too long ends the process.
COLLECTIVE_LIMIT = {"cpu": 10, "cuda": 90}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Member:
    """One process, as a case sees it, with the device of its own that it works on."""

    rank: int
    size: int
    group: dist.ProcessGroup
    device: torch.device = CPU


Case = Callable[[Member], Any]


@dataclass(frozen=True)
class Outcome:
    """What a case came to on one rank: a result, or an exception as text."""

    result: Any = None
    kinds: tuple[str, ...] = ()  # the exception's class and those above it, by name
    message: str = ""
    trace: str = ""
    seconds: float = 0.0
    warned: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        return bool(self.kinds)


def values(outcomes: list[Outcome]) -> list[Any]:
    """The results by rank; an assertion with the tracebacks of the ranks that failed."""
    failures = [f"rank {rank}:\n{outcome.trace}" for rank, outcome in enumerate(outcomes) if outcome.failed]
    assert not failures, "\n".join(failures)
    return [outcome.result for outcome in outcomes]


def attempt(case: Case, member: Member) -> Outcome:
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            known: dict[str, Any] = {"result": case(member)}
        except Exception as error:
            kinds = tuple(kind.__name__ for kind in type(error).__mro__)
            known = {"kinds": kinds, "message": str(error), "trace": traceback.format_exc()}
    seconds = time.perf_counter() - start
    return Outcome(**known, seconds=seconds, warned=tuple(f"{w.category.__name__}: {w.message}" for w in warned))


STARTED = "started"


def meet(store: dist.Store, place: str, size: int, limit: timedelta) -> None:
    """Wait until all ranks are there, each of which may have waited in several collectives."""
    if store.add(f"{place}/wait_tensor", 1) == size:
        store.set(f"{place}/complete", "yes")
    store.wait([f"{place}/complete"], 4 * limit)


def work(rank: int, size: int, port: int, folder: Path, cases: dict[str, Case], kind: str) -> None:
    """What each process does: all cases in order, and a file for each outcome."""
    with (folder / f"{rank}.trace").open("w") as trace:
        faulthandler.register(signal.SIGUSR1, trace, all_threads=False)
        try:
            join_and_run(rank, size, port, folder, cases, kind)
        except BaseException:
            trace.write(traceback.format_exc())
            raise


def join_and_run(rank: int, size: int, port: int, folder: Path, cases: dict[str, Case], kind: str) -> None:
    torch.set_num_threads(1)
    device, bound = CPU, None
    if kind == "cuda":
        device = bound = torch.device(kind, rank)
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(seconds=COLLECTIVE_LIMIT[kind])
    dist.init_process_group(
        BACKENDS[kind],
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=bound,
    )
    group = dist.new_group(timeout=limit)
    meet(store, STARTED, size, limit)
    for number, case in enumerate(cases.values()):
        outcome = attempt(case, Member(rank, size, group, device))
        save(outcome, folder, rank, number)
        store.add(f"{number}/failed", int(outcome.failed))
        meet(store, str(number), size, limit)
        if store.add(f"{number}/failed", 0):
            dist.destroy_process_group(group)
            group = dist.new_group(timeout=limit)
    dist.destroy_process_group()


def save(outcome: Outcome, folder: Path, rank: int, number: int) -> None:
    """Under another name first, so that a process killed meanwhile leaves no half of a file."""
    unfinished = folder / f"{rank}.unfinished"
    torch.save(asdict(outcome), unfinished)
    unfinished.rename(folder / f"{rank}-{number}.pt")


def load(folder: Path, rank: int, number: int) -> Outcome:
    """The outcome in its file, or what the process was doing when it ended."""
    path = folder / f"{rank}-{number}.pt"
    if path.exists():
        return Outcome(**torch.load(path, map_location="cpu"))
    trace = folder / f"{rank}.trace"
    doing = trace.read_text() if trace.exists() else ""
    message = f"no outcome: the process ended or was killed before\n{doing}"
    return Outcome(kinds=("Unfinished",), message=message, trace=message)


def run(cases: dict[str, Case], size: int, folder: Path, limit: float, kind: str = "cpu") -> dict[str, list[Outcome]]:
    """Run all cases in ``size`` processes on devices of a kind, ``"cpu"`` or ``"cuda"``; outcomes by case and rank.

    ``limit`` seconds after they started all processes are killed, and the cases not finished have an outcome that says
    where each rank was.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=work, args=(rank, size, store.port, folder, cases, kind), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    await_start(store, processes)
    deadline = time.monotonic() + limit
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    end(processes)
    return {name: [load(folder, rank, number) for rank in range(size)] for number, name in enumerate(cases)}


def await_start(store: dist.Store, processes: list[multiprocessing.Process]) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline and all(process.is_alive() for process in processes):
        if store.check([f"{STARTED}/complete"]):
            return
        time.sleep(0.05)


def end(processes: list[multiprocessing.Process]) -> None:
    """Kill what still runs, after it has written down where it is."""
    running = [process for process in processes if process.is_alive()]
    for process in running:
        os.kill(process.pid, signal.SIGUSR1)
    if running:
        time.sleep(1)
    for process in running:
        process.kill()
        process.join()
