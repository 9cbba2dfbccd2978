"""Fine-tune a language model of transformers on the same text with several heads: with logits (two-stage) and without.

    python examples/finetune.py --model FOLDER --steps 10 --batch 1 --sequence 512 --output runs/finetune

FOLDER holds a model and its tokenizer, as `save_pretrained` writes them, or a GGUF file of them, named with --gguf. The
text is that of --text, by default Python's standard library. Each head begins from the same weights and sees the same
batches; held-out loss is always computed with logits, by the model as it was loaded. A run that is done is kept in
the output folder, so that an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import logitless
from logitless_demo.data import Corpus, Tokenizer, check_size, held_out_batches, load_corpus, training_batch
from logitless_demo.errors import InputError
from logitless_demo.memory import format_bytes, memory_meter

HEADS: dict[str, dict[str, Any] | None] = {
    "two-stage": None,
    "exact": {"gradient": "exact"},
    "sampled": {"gradient": logitless.Sampled()},
    "fp8": {"gradient": logitless.Sampled(scan="fp8")},
}
COLOURS = {"two-stage": "#8a919a", "exact": "#0072b2", "sampled": "#d55e00", "fp8": "#009e73"}


@dataclass(frozen=True)
class Run:
    """One head's training.

    Attributes:
        head: its name.
        losses: of each step's batch, in nats a token.
        seconds: of each step.
        held_out: loss of the held-out text before and after.
        peak_bytes: largest memory of a step, the first left out, above weights, gradients and optimiser state.
    """

    head: str
    losses: list[float]
    seconds: list[float]
    held_out: tuple[float, float]
    peak_bytes: int


def load(options: argparse.Namespace) -> torch.nn.Module:
    """The model, in fp32, on its device."""
    gguf = {"gguf_file": options.gguf} if options.gguf else {}
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, **gguf).to(options.device)
    if options.checkpointing:
        if hasattr(model, "activation_checkpointing_enable"):  # its name in newer releases
            model.activation_checkpointing_enable()
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def tokenizer_of(options: argparse.Namespace) -> Tokenizer:
    """The model's own."""
    gguf = {"gguf_file": options.gguf} if options.gguf else {}
    own = AutoTokenizer.from_pretrained(options.model, **gguf)
    begin = own.bos_token_id if own.bos_token_id is not None else own.eos_token_id

    def encode(text: str) -> list[int]:
        return own(text, add_special_tokens=False, verbose=False).input_ids

    return Tokenizer(name=f"{options.model}/{options.gguf}", vocabulary=len(own), begin=begin, encode=encode)


def loss_of(model: torch.nn.Module, inputs: torch.Tensor, options: argparse.Namespace) -> torch.Tensor:
    """Of [B, T] tokens, each but the first a target."""
    inputs = inputs.to(options.device)
    with torch.autocast(options.device, torch.bfloat16, enabled=options.device == "cuda"):
        return model(input_ids=inputs, labels=inputs, use_cache=False).loss


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, corpus: Corpus, options: argparse.Namespace) -> float:
    """Mean over the held-out text, a sequence at a time."""
    model.eval()
    batches = held_out_batches(corpus.held_out, options.held_out, 1, options.sequence)
    found = [loss_of(model, inputs, options).item() for inputs, _ in batches]
    model.train()
    return statistics.fmean(found)


def train(head: str, corpus: Corpus, options: argparse.Namespace, console: Console) -> Run:
    """From the loaded weights, `options.steps` steps of AdamW."""
    torch.manual_seed(options.seed)
    model = load(options)
    before = held_out_loss(model, corpus, options)
    if HEADS[head] is not None:
        console.print(f"{head}: {logitless.patch(model, **HEADS[head])}", soft_wrap=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    losses, seconds, peaks = [], [], []
    with memory_meter(options.device) as meter:
        steps = range(options.steps)
        for step in track(steps, f"{head:>9}", console=console, disable=not console.is_terminal):
            inputs, _ = training_batch(corpus.train, options.seed, step, options.batch, options.sequence)
            level = meter.level()
            meter.reset()
            start = time.perf_counter()
            loss = loss_of(model, inputs, options)
            loss.backward()
            peaks.append(meter.peak() - level)
            optimizer.step()
            losses.append(loss.item())
            seconds.append(time.perf_counter() - start)
            optimizer.zero_grad(set_to_none=False)
            if not console.is_terminal:
                console.print(f"{head:>9}  step {step + 1}/{options.steps}  loss {losses[-1]:.4f}  {seconds[-1]:.2f} s")
    if HEADS[head] is not None:
        logitless.unpatch(model)
    return Run(head, losses, seconds, (before, held_out_loss(model, corpus, options)), max(peaks[1:] or peaks))


def kept(head: str, corpus: Corpus, options: argparse.Namespace, console: Console) -> Run:
    """The run in the output folder if it is of the same options, else a new one."""
    path = options.output / f"{head}.json"
    asked = {name: str(value) for name, value in vars(options).items() if name not in ("output", "heads")}
    if path.exists() and (found := json.loads(path.read_text()))["options"] == asked:
        console.print(f"{head}: kept from {path}")
        return Run(**found["run"])
    run = train(head, corpus, options, console)
    path.write_text(json.dumps({"options": asked, "run": asdict(run)}, indent=1) + "\n")
    return run


def tabulate(runs: list[Run], options: argparse.Namespace) -> Table:
    """A row a head."""
    title = f"{options.model.name}: {options.batch} x {options.sequence} tokens a step, {options.steps} steps"
    table = Table(title=title)
    for name in ("head", "first loss", "last loss", "held out before", "after", "s a step", "peak of a step"):
        table.add_column(name, justify="left" if name == "head" else "right")
    for run in runs:
        step = statistics.median(run.seconds[1:] or run.seconds)
        table.add_row(
            run.head,
            f"{run.losses[0]:.4f}",
            f"{run.losses[-1]:.4f}",
            f"{run.held_out[0]:.4f}",
            f"{run.held_out[1]:.4f}",
            f"{step:.3f}",
            format_bytes(run.peak_bytes),
        )
    return table


def draw(runs: list[Run], path: Path) -> None:
    """Loss by step, and less that of the first head; time and memory of a step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(15, 3.6), layout="constrained")
    curve, difference, time_axes, memory_axes = figure.subplots(1, 4, width_ratios=[5, 5, 4, 4])
    names = [run.head for run in runs]
    colours = [COLOURS[name] for name in names]
    for run in runs:
        steps = range(1, len(run.losses) + 1)
        broad = {"linewidth": 5, "alpha": 0.5} if run is runs[0] else {"linewidth": 1.6}
        curve.plot(steps, run.losses, color=COLOURS[run.head], label=run.head, **broad)
        less = [loss - first for loss, first in zip(run.losses, runs[0].losses, strict=True)]
        difference.plot(steps, less, color=COLOURS[run.head], **broad)
    curve.set(xlabel="step", ylabel="loss of the batch, nats a token")
    curve.legend(frameon=False)
    difference.set(xlabel="step", ylabel=f"the same, less that of {names[0]}")
    for axes in (curve, difference):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    time_axes.bar(names, [statistics.median(run.seconds[1:] or run.seconds) for run in runs], color=colours)
    time_axes.set_ylabel("seconds a step")
    memory_axes.bar(names, [run.peak_bytes / 2**30 for run in runs], color=colours)
    memory_axes.set_ylabel("peak of forward and backward, GiB")
    for axes in figure.axes:
        axes.grid(color="#e3e6e9", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a causal language model")
    parser.add_argument("--gguf", help="name of a GGUF file in that folder")
    parser.add_argument("--text", help="file, folder or glob; Python's standard library if not given")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=["two-stage", "exact", "sampled"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=1, help="sequences a step")
    parser.add_argument("--sequence", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--held-out", type=int, default=4096, help="tokens to evaluate on")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    options = parser.parse_args()
    for name, least in (("steps", 1), ("batch", 1), ("sequence", 2), ("held_out", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(options, name)}")
    if not options.model.is_dir():
        parser.error(f"--model must be a folder with a model and its tokenizer, got {options.model}")
    if options.gguf and not (options.model / options.gguf).is_file():
        parser.error(f"--gguf must be a file in {options.model}, got {options.gguf}")
    return options


def main() -> int:
    """Train with each head, and write results, a table and a figure."""
    options, console = parse(), Console()
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        corpus = load_corpus(options.text, tokenizer_of(options), options.output / "tokens")
        check_size(corpus, options.batch, options.sequence)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    runs = [kept(head, corpus, options, console) for head in options.heads]
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    about = {
        "arguments": sys.argv[1:],
        "hardware": {"GPU": gpu, "threads": torch.get_num_threads(), "machine": platform.machine()},
        "software": {"torch": torch.__version__, "transformers": transformers.__version__},
        "runs": [asdict(run) for run in runs],
    }
    (options.output / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    draw(runs, options.output / "finetune.png")
    console.print(tabulate(runs, options))
    console.print(f"written: {options.output / 'results.json'}, {options.output / 'finetune.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
