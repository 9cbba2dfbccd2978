"""``logitless tune``: time candidate tiles of the kernels on this GPU, and write the fastest as a table."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from logitless.bench.clock import seconds
from logitless.bench.outputs import check_output_file
from logitless.bench.run import check_between
from logitless.errors import InputError
from logitless.functional import linear_cross_entropy
from logitless.options import Sampled
from logitless.schedules import force_strategy

GROUPS = (8, 16, 32, 64)
STAGES = (2, 3, 4)
ROWS = (64, 128)
DEPTHS = (32, 64, 128)
WARPS = (4, 8)
# Standard deviation of the logits: for the sampled gradient, whose work depends on it, about as peaked as trained ones.
SPREAD = 3.0


@dataclass(frozen=True)
class Problem:
    """What is timed: N tokens, D hidden, V vocabulary, and the dtype."""

    tokens: int
    hidden: int
    vocabulary: int
    dtype: torch.dtype


def tune(problem: Problem, rounds: int, output: Path, console: Console) -> int:
    """Time every candidate of every kernel in turn, print a table of each, write the fastest; the exit code.

    One that does not fit the device is left out with its reason.

    Raises:
        InputError: something given cannot be used, or there is no GPU; found before anything is timed.
    """
    check_between("--rounds", rounds, 1)
    for flag, size in (
        ("--tokens", problem.tokens),
        ("--hidden", problem.hidden),
        ("--vocabulary", problem.vocabulary),
    ):
        check_between(flag, size, 1, 2**31 - 1)
    check_output_file("--output", output)
    written = _read(output)
    if not torch.cuda.is_available():
        raise InputError("tuning needs a CUDA device, and PyTorch sees none")
    from logitless.backends.triton import tiles

    device = torch.device("cuda", torch.cuda.current_device())
    architecture, itemsize = tiles.architecture(device.index), problem.dtype.itemsize
    if itemsize not in tiles.TILES[architecture]:
        raise InputError(f"--dtype must be one that the kernels multiply in their own tiles, got {problem.dtype}")
    chosen: dict[str, dict[str, int]] = {}
    for kind, run in _kernels(problem, device).items():
        built_in = tiles.TILES[architecture][itemsize][kind]
        candidates = [built_in, *(tile for tile in _candidates(kind, built_in) if tile != built_in)]
        times = _timed(kind, candidates, run, rounds, device, console)
        best = min(times, key=lambda tile: statistics.median(times[tile]))
        table = Table("tile", "median ms", "of built-in", title=f"{kind} on {torch.cuda.get_device_name(device)}")
        for tile in sorted(times, key=lambda tile: statistics.median(times[tile]))[:8]:
            ratio = statistics.median(a / b for a, b in zip(times[tile], times[built_in], strict=True))
            values = " ".join(f"{name}={value}" for name, value in asdict(tile).items())
            table.add_row(values, f"{statistics.median(times[tile]) * 1e3:.3f}", f"{ratio:.3f}")
        console.print(table)
        chosen[kind] = asdict(best)
    written.setdefault(architecture, {})[str(itemsize)] = chosen
    output.write_text(json.dumps(written, indent=2) + "\n")
    console.print(f"wrote {output}; to use it: export {tiles.TUNED_FILE}={output.resolve()}")
    return 0


def _read(output: Path) -> dict[str, dict[str, Any]]:
    """The table that is there already, to which this GPU's tiles are added."""
    if not output.exists():
        return {}
    try:
        table = json.loads(output.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--output: {output} cannot be read ({error}): give another, or remove it") from error
    if not isinstance(table, dict) or not all(isinstance(part, dict) for part in table.values()):
        raise InputError(f"--output: {output} is no table of tiles: give another, or remove it")
    return table


def _candidates(kind: Any, built_in: Any) -> Iterator[Any]:
    """Tiles worth trying. Those of the scan keep the columns, which all kernels of its tables share."""
    if kind == "pairs":
        for rows, depth, warps, stages in itertools.product(ROWS, DEPTHS, WARPS, (*STAGES, 5)):
            yield replace(built_in, rows=rows, depth=depth, warps=warps, stages=stages)
    elif kind == "pair_weight":
        for columns, depth, warps, stages in itertools.product((128, 256), DEPTHS, WARPS, STAGES):
            yield replace(built_in, columns=columns, depth=depth, warps=warps, stages=stages)
    elif kind == "pair_hidden":
        for columns, group, warps, stages in itertools.product((32, 64, 128), (2, 4, 8, 64), WARPS, (2, 3)):
            yield replace(built_in, columns=columns, group=group, warps=warps, stages=stages)
    else:
        for rows, group, stages in itertools.product(ROWS, GROUPS, STAGES):
            warps = built_in.warps * rows // 128
            if warps >= 4:
                yield replace(built_in, rows=rows, group=group, stages=stages, warps=warps)


def _kernels(problem: Problem, device: torch.device) -> dict[Any, Callable[[], Any]]:
    """A call whose time is that of each kernel, and whatever does not depend on its tile."""
    hidden = torch.randn(problem.tokens, problem.hidden, dtype=torch.float32, device=device)
    hidden = hidden.to(problem.dtype).requires_grad_()
    weight = torch.randn(problem.vocabulary, problem.hidden, dtype=torch.float32, device=device)
    weight = weight.mul_(SPREAD * problem.hidden**-0.5).to(problem.dtype)
    target = torch.randint(problem.vocabulary, (problem.tokens,), device=device)

    def scan() -> Any:
        with torch.no_grad():
            return linear_cross_entropy(hidden, weight, target, backend="triton")

    def store() -> Any:
        with force_strategy("stored"):
            return linear_cross_entropy(hidden, weight, target, backend="triton")

    def window() -> Any:
        with force_strategy("windowed", window=8192, aliased=0):
            return torch.autograd.grad(linear_cross_entropy(hidden, weight, target, backend="triton"), hidden)

    trained, sampled = weight.detach().requires_grad_(), list[torch.Tensor]()

    def pairs() -> Any:
        if not sampled:  # once: the forward pass would hide the differences
            sampled.append(linear_cross_entropy(hidden, trained, target, backend="triton", gradient=Sampled()))
        return torch.autograd.grad(sampled[0], (hidden, trained), retain_graph=True)

    return {
        "scan": scan,
        "store": store,
        "window": window,
        "pairs": pairs,
        "pair_weight": pairs,
        "pair_hidden": pairs,
    }


def _timed(
    kind: Any, candidates: list[Any], run: Callable[[], Any], rounds: int, device: torch.device, console: Console
) -> dict[Any, list[float]]:
    """Seconds of each candidate that runs, by round; the built-in tile comes first."""
    times: dict[Any, list[float]] = {}
    with console.status(f"{kind}: compiling") as status:
        for number, tile in enumerate(candidates):
            status.update(f"{kind}: compiling {number + 1} of {len(candidates)}")
            try:
                with _instead(kind, tile, device):
                    run()
                    torch.cuda.synchronize(device)
                times[tile] = []
            except Exception as error:
                console.print(f"{kind}: {tile} left out: {str(error).splitlines()[0][:100]}")
        for number in range(rounds):
            status.update(f"{kind}: round {number + 1} of {rounds}")
            for tile, measured in times.items():
                with _instead(kind, tile, device):
                    measured.append(seconds(run, device))
    return times


@contextmanager
def _instead(kind: Any, tile: Any, device: torch.device) -> Iterator[None]:
    """Within this context, that kernel's tile is another."""
    from logitless.backends.triton import tiles

    built_in = tiles.tile

    def other(asked: Any, itemsize: int, index: int | None) -> Any:
        return tile if asked == kind and index == device.index else built_in(asked, itemsize, index)

    tiles.tile = other
    try:
        yield
    finally:
        tiles.tile = built_in
