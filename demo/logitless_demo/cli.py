"""The command line of the demonstration."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from logitless_demo.config import TrainConfig, add_flags, given_flags, with_flags
from logitless_demo.errors import InputError
from logitless_demo.study import FIXED, RUNS, SGD_LEARNING_RATE, STUDY

if TYPE_CHECKING:
    Subcommands = argparse._SubParsersAction[argparse.ArgumentParser]

PROGRAM = "logitless-demo"
RUN_FOLDER = "the text's tokens are kept beside it, in .tokens, for later runs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the words after the program's name; None for those of this process.

    Returns:
        The exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C, or what the subcommand says.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Trains small language models with and without logits, and shows what that saves."
    )
    subcommands = parser.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    _add_compare(subcommands)
    _add_train(subcommands)
    _add_converge(subcommands)
    arguments = parser.parse_args(argv)
    try:
        return arguments.run(arguments)
    except (InputError, OSError) as error:
        print(f"{PROGRAM} {arguments.subcommand}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROGRAM} {arguments.subcommand}: interrupted", file=sys.stderr)
        return 130


def _add_compare(subcommands: Subcommands) -> None:
    parser = subcommands.add_parser(
        "compare",
        help="train a small model with and without logits, and write a report",
        description="Trains the same decoder three times from one seed: through logits, exactly without, and with the "
        "sampled gradient. Writes a report with plots. Defaults depend on the machine: a small model on "
        "a CPU (a few minutes), a larger one on a GPU.",
    )
    add_flags(parser, TrainConfig(), without=("head", "eval_every", "checkpoint_every"), show_defaults=False)
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help=f"folder for the results (default: runs/compare-TIME); {RUN_FOLDER}"
    )
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from logitless_demo.comparison import run_demo

    run_dir = arguments.run_dir or _new_run_dir("compare")
    return run_demo(given_flags(arguments), run_dir, shlex.join([PROGRAM, *sys.argv[1:]]), Console())


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
    started = "torchrun --nproc-per-node DP*TP -m logitless_demo train ..."
    processes = parser.add_argument_group("several processes", started)
    processes.add_argument("--dp", type=int, default=1, metavar="N", help="parts of each batch, by FSDP2 (default: 1)")
    processes.add_argument(
        "--tp", type=int, default=1, metavar="N", help="parts of the vocabulary and of each layer (default: 1)"
    )
    parser.set_defaults(run=_train)


def _train(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from logitless_demo.runs import Division, run_training

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
    from rich.console import Console

    if arguments.prepare:
        from logitless_demo.tokens import prepare_tokens

        return prepare_tokens(arguments.prepare, arguments.tokens, Console())

    from logitless_demo.convergence import StudyConfig, run_study

    study = StudyConfig(
        tokens=arguments.tokens,
        output=arguments.output,
        base=with_flags(STUDY, given_flags(arguments)),
        runs=tuple(arguments.runs),
        sgd_learning_rate=arguments.sgd_learning_rate,
        compile_body=arguments.compile_body,
    )
    return run_study(study, shlex.join([PROGRAM, *sys.argv[1:]]), Console())


def _new_run_dir(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
