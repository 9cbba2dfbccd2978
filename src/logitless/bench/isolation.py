"""Work in a process of its own, so that one that breaks the device, dies or hangs does not take the others with it."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

Progress = Callable[[str, str], None]
"""Told who is at work, and at what."""

# Seconds for a process that is done to end what it started.
FAREWELL = 10


class PeerLostError(Exception):
    """A peer that left nothing to go on with.

    Attributes:
        peer: who was at work.
        reason: what happened.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer = peer
        self.reason = reason


def call_isolated(function: Callable[..., Any], *arguments: Any, progress: Progress, patience: float) -> Any:
    """Calls ``function(*arguments, progress)`` in a fresh process and returns what it returns.

    Args:
        function: of a module, not of another function.
        arguments: that can be pickled.
        progress: told what the function tells its own.
        patience: seconds between two reports of progress.

    Raises:
        PeerLostError: the process died, or was ended because it said nothing for longer than ``patience``.
        Exception: what ``function`` raised.
    """
    context = multiprocessing.get_context("spawn")  # a fork cannot use CUDA
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(there, function, arguments))
    process.start()
    there.close()
    who = ""
    try:
        here.recv()  # it has started; how long that takes says nothing about a peer
        while here.poll(patience):
            kind, content = here.recv()
            if kind == "progress":
                who = content[0]
                progress(*content)
                continue
            process.join(FAREWELL)
            if kind == "returned":
                return content
            error, where = content
            raise error from RuntimeError(where)
        raise PeerLostError(who, f"no answer for {patience:.0f} s")
    except EOFError:
        process.join()
        raise PeerLostError(who, f"the process died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def _work(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    pipe.send(("started", None))
    try:
        message = "returned", function(*arguments, lambda who, what: pipe.send(("progress", (who, what))))
    except Exception as error:  # whatever it is, it is raised on the other side
        message = "raised", (error, traceback.format_exc())
    pipe.send(message)
