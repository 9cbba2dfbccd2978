"""The command line. A subcommand's code is imported when it runs, so ``logitless --help`` needs no extra."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import logitless
from logitless.demo.config import TrainConfig, add_flags, given_flags, with_flags
from logitless.demo.errors import InputError
from logitless.demo.study import FIXED, RUNS, SGD_LEARNING_RATE, STUDY
from logitless.options import REDUCTIONS
from logitless.validation import dtype_name

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

BYTES = "such as 512MiB, 2GB or 1.5G; G alone is GiB, and so are K, M and T"
RUN_FOLDER = "the text's tokens are kept beside it, in .tokens, for later runs"
DEMO_MODULES = ("matplotlib", "mistral_common", "numpy", "psutil", "rich")
BENCH_MODULES = ("matplotlib", "psutil", "rich")
CONVERGE_MODULES = ("matplotlib", "numpy", "psutil", "rich")
PREPARE_MODULES = ("mistral_common", "numpy", "rich")


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
    _add_demo(subcommands)
    _add_train(subcommands)
    _add_converge(subcommands)
    _add_bench(subcommands)
    _add_plan(subcommands)
    _add_tune(subcommands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (InputError, OSError) as error:
        print(f"logitless {arguments.subcommand}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"logitless {arguments.subcommand}: interrupted", file=sys.stderr)
        return 130


def _add_demo(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "demo",
        help="train a small model with and without logits, and write a report",
        description="Trains the same decoder three times from one seed: through logits, exactly without, and with the "
        "sampled gradient. Writes a report with plots. Defaults depend on the machine: a small model on "
        "a CPU (a few minutes), a larger one on a GPU.",
    )
    add_flags(parser, TrainConfig(), without=("head", "eval_every", "checkpoint_every"), show_defaults=False)
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help=f"folder for the results (default: runs/demo-TIME); {RUN_FOLDER}"
    )
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    _require_extra("demo", DEMO_MODULES)
    from rich.console import Console

    from logitless.demo.comparison import run_demo

    run_dir = arguments.run_dir or _new_run_dir("demo")
    return run_demo(given_flags(arguments), run_dir, shlex.join(["logitless", *sys.argv[1:]]), Console())


def _add_train(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "train",
        help="train a small model, with checkpoints",
        description="Trains a decoder on text. Stopped by Ctrl-C it can be resumed, and then gives the losses it would "
        "have given had it never stopped.",
    )
    add_flags(parser, TrainConfig())
    folder = parser.add_mutually_exclusive_group()
    folder.add_argument(
        "--run-dir", type=Path, metavar="DIR", help=f"folder of a new run (default: runs/train-TIME); {RUN_FOLDER}"
    )
    folder.add_argument("--resume", type=Path, metavar="DIR", help="folder of a run to go on with, as it was set up")
    processes = parser.add_argument_group("several processes", "torchrun --nproc-per-node DP*TP -m logitless train ...")
    processes.add_argument("--dp", type=int, default=1, metavar="N", help="parts of each batch, by FSDP2 (default: 1)")
    processes.add_argument(
        "--tp", type=int, default=1, metavar="N", help="parts of the vocabulary and of each layer (default: 1)"
    )
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    _require_extra("demo", DEMO_MODULES)
    from rich.console import Console

    from logitless.demo.runs import Division, run_training

    run_dir = arguments.resume or arguments.run_dir or _new_run_dir("train")
    division = Division(arguments.dp, arguments.tp)
    resume = arguments.resume is not None
    return run_training(given_flags(arguments), run_dir, resume, TrainConfig(), Console(), division=division)


def _add_converge(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "converge",
        help="train with the exact and with the sampled gradient, and compare how they converge",
        description="Trains the same decoder with the exact and with the sampled gradient, at several thresholds and "
        "seeds, and writes a file for each run, a summary and figures. Started again it goes on with the runs that "
        "have no file yet. A run named NAME-1 adds 1 to the seed. First make the tokens: --prepare.",
    )
    parser.add_argument("--tokens", type=Path, required=True, metavar="FILE", help=".npz file of the tokens")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--output", type=Path, metavar="DIR", help="folder for the results")
    task.add_argument(
        "--prepare", type=Path, metavar="DIR", help="make the file of tokens from train.txt and val.txt in this folder"
    )
    parser.add_argument("--runs", nargs="+", default=list(RUNS), metavar="NAME", help=f"default: {' '.join(RUNS)}")
    parser.add_argument(
        "--sgd-learning-rate",
        type=float,
        default=SGD_LEARNING_RATE,
        metavar="X",
        help=f"highest learning rate of the runs with SGD (default: {SGD_LEARNING_RATE})",
    )
    parser.add_argument(
        "--compile-body",
        action=argparse.BooleanOptionalAction,
        help="run the decoder, without its head, through torch.compile (default: on a GPU)",
    )
    add_flags(parser, STUDY, without=FIXED)
    parser.set_defaults(run=_converge)


def _converge(arguments: argparse.Namespace) -> int:
    _require_extra("demo", PREPARE_MODULES if arguments.prepare else CONVERGE_MODULES)
    from rich.console import Console

    if arguments.prepare:
        from logitless.demo.tokens import prepare_tokens

        return prepare_tokens(arguments.prepare, arguments.tokens, Console())

    from logitless.demo.convergence import StudyConfig, run_study

    study = StudyConfig(
        tokens=arguments.tokens,
        output=arguments.output,
        base=with_flags(STUDY, given_flags(arguments)),
        runs=tuple(arguments.runs),
        sgd_learning_rate=arguments.sgd_learning_rate,
        compile_body=arguments.compile_body,
    )
    return run_study(study, shlex.join(["logitless", *sys.argv[1:]]), Console())


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
    _require_extra("demo", BENCH_MODULES)
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
    _require_extra("demo", ("rich",))
    from rich.console import Console

    from logitless.bench.tune import Problem, tune
    from logitless.validation import check_dtype

    try:
        dtype = check_dtype("--dtype", arguments.dtype)
    except ValueError as error:
        raise InputError(str(error)) from error
    problem = Problem(arguments.tokens, arguments.hidden, arguments.vocabulary, dtype)
    return tune(problem, arguments.rounds, arguments.output, Console())


def _new_run_dir(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _require_extra(extra: str, modules: Sequence[str]) -> None:
    missing = [name.replace("_", "-") for name in modules if find_spec(name) is None]
    if missing:
        raise InputError(f"this subcommand needs {', '.join(missing)}: pip install 'logitless[{extra}]'")
