"""The command line. A subcommand's code is imported when it runs, so ``logitless --help`` needs no extra."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import logitless
from logitless.errors import InputError
from logitless.options import REDUCTIONS
from logitless.validation import dtype_name

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

BYTES = "such as 512MiB, 2GB or 1.5G; G alone is GiB, and so are K, M and T"
BENCH_MODULES = ("matplotlib", "psutil", "rich")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the words after the program's name; None for those of this process.

    Returns:
        The exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C, or what the subcommand says.
    """
    parser = argparse.ArgumentParser(
        prog="logitless", description="Train language models without logits, and see what that saves."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {logitless.__version__}")
    subcommands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    _add_bench(subcommands)
    _add_plan(subcommands)
    _add_tune(subcommands)
    _add_doctor(subcommands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (InputError, OSError) as error:
        print(f"logitless {arguments.subcommand}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"logitless {arguments.subcommand}: interrupted", file=sys.stderr)
        return 130


def _add_bench(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "bench",
        help="measure time, memory and error against the two-stage pipeline and other peers",
        description="Measures every peer in turn, in one process, on the same inputs: forward alone, forward and "
        "backward, memory and errors, beside the matrix products alone.",
    )
    parser.add_argument("--cases", nargs="+", default=["gpt2", "tekken"], metavar="CASE", help="default: gpt2 tekken")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        type=dtype_name,
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 bfloat16; fp32, bf16 and fp16 for short",
    )
    parser.add_argument("--peers", nargs="+", default=None, metavar="PEER", help="default: all that can run here")
    parser.add_argument("--list", action="store_true", help="list cases and peers, and what peers lack here; then stop")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds a case (default: 5)")
    parser.add_argument("--no-bound", action="store_true", help="leave out the matrix products, which hold all logits")
    parser.add_argument(
        "--slowest",
        type=float,
        metavar="SECONDS",
        help="leave out peers whose forward and backward takes longer (default: 5 on a GPU, no limit on a CPU)",
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--seed", type=int, default=0, help="of random inputs (default: 0)")
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--trained-head", type=Path, metavar="FILE", help="a trained model's hidden states and head, for cases of one"
    )
    parser.add_argument("--workspace", metavar="BYTES", help=f"also measure this library within these: {BYTES}")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file for the results; a figure beside it, ending in .png"
    )
    parser.set_defaults(run=_bench)


def _bench(arguments: argparse.Namespace) -> int:
    _require_modules(BENCH_MODULES)
    import torch
    from rich.console import Console

    from logitless.bench.cases import CASES
    from logitless.bench.peers import PEERS
    from logitless.bench.run import BenchConfig, check_device, run_bench
    from logitless.bench.table import print_choices

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.list:
        print_choices(Console(), CASES, PEERS, check_device(device))
        return 0
    config = BenchConfig(
        cases=tuple(arguments.cases),
        dtypes=tuple(arguments.dtypes),
        peers=tuple(arguments.peers or PEERS),
        rounds=arguments.rounds,
        threads=arguments.threads,
        seed=arguments.seed,
        device=device,
        trained_head=arguments.trained_head,
        output=arguments.output,
        bound=not arguments.no_bound,
        workspace=arguments.workspace,
        slowest=arguments.slowest,
    )
    return run_bench(config, shlex.join(["logitless", *sys.argv[1:]]), Console())


def _add_plan(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "plan",
        help="say which strategy a call would take, and its memory",
        description="Says, without computing anything, which strategy a call would take and what memory it would hold.",
    )
    parser.add_argument("--tokens", type=int, required=True, help="N, rows of hidden states")
    parser.add_argument("--hidden", type=int, required=True, help="D, hidden size")
    parser.add_argument("--vocabulary", type=int, required=True, help="V, rows of the head")
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        help="of hidden states and head: bfloat16, float16, float32, float64, or bf16, fp16, fp32, fp64 "
        "(default: bfloat16)",
    )
    parser.add_argument(
        "--device", default=None, help="cpu, cuda or another, here or not (default: cuda where there is one, else cpu)"
    )
    parser.add_argument("--reduction", default="mean", choices=REDUCTIONS, help="default: mean")
    parser.add_argument("--sampled", action="store_true", help="the sampled gradient")
    parser.add_argument("--workspace", metavar="BYTES", help=f"allowed at most: {BYTES}")
    parser.set_defaults(run=_plan)


def _plan(arguments: argparse.Namespace) -> int:
    try:
        plan = logitless.plan(
            tokens=arguments.tokens,
            hidden=arguments.hidden,
            vocabulary=arguments.vocabulary,
            dtype=arguments.dtype,
            device=arguments.device,
            reduction=arguments.reduction,
            gradient=logitless.Sampled() if arguments.sampled else "exact",
            workspace=arguments.workspace,
        )
    except ValueError as error:  # begins with the argument's name, which is the flag's
        raise InputError(f"--{error}") from error
    print(plan)
    return 0


def _add_tune(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "tune",
        help="measure tiles of the kernels on this GPU and write a table",
        description="Times candidate tiles of each kernel on this GPU and writes the fastest to a table, which the "
        "library reads where LOGITLESS_TILES names it. Nothing is tuned unless asked: the built-in table is measured.",
    )
    parser.add_argument("--tokens", type=int, default=8192, help="N of the problem to time (default: 8192)")
    parser.add_argument("--hidden", type=int, default=4096, help="D (default: 4096)")
    parser.add_argument("--vocabulary", type=int, default=65536, help="V (default: 65536)")
    parser.add_argument("--dtype", default="bfloat16", help="default: bfloat16; bf16, fp16 and fp32 for short")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, every candidate in turn (default: 7)")
    parser.add_argument("--output", type=Path, default=Path("logitless-tiles.json"), metavar="FILE")
    parser.set_defaults(run=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    _require_modules(("rich",))
    from rich.console import Console

    from logitless.bench.tune import Problem, tune
    from logitless.validation import check_dtype

    try:
        dtype = check_dtype("--dtype", arguments.dtype)
    except ValueError as error:
        raise InputError(str(error)) from error
    problem = Problem(arguments.tokens, arguments.hidden, arguments.vocabulary, dtype)
    return tune(problem, arguments.rounds, arguments.output, Console())


def _add_doctor(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "doctor",
        help="say what this machine has, and which backend would serve what",
        description="Says which versions and devices are here, which backend would serve which dtype and gradient, why "
        "not the kernels where they cannot, and whether these are tuned. Put it into a bug report.",
    )
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    del arguments
    from logitless.doctor import report

    print(report())
    return 0


def _require_modules(modules: Sequence[str]) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(f"this subcommand needs {', '.join(missing)}: pip install 'logitless[bench]'")
