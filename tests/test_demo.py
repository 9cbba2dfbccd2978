"""The demo and `logitless-demo train`: data order, checkpoints, resumption, messages, model and report."""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from rich.console import Console

from logitless_demo import heads
from logitless_demo.checkpoint import atomic_write, load_checkpoint, save_checkpoint, truncate_log
from logitless_demo.cli import main
from logitless_demo.comparison import run_demo
from logitless_demo.config import ModelConfig, TrainConfig, add_flags, given_flags
from logitless_demo.data import (
    Corpus,
    Tokenizer,
    check_size,
    find_files,
    held_out_batches,
    load_corpus,
    training_batch,
)
from logitless_demo.errors import InputError
from logitless_demo.memory import ResidentMemory
from logitless_demo.model import Decoder, rotate, rotation
from logitless_demo.runs import run_training
from logitless_demo.train import Trainer, learning_rate

VOCABULARY = 257
TINY = TrainConfig(
    model=ModelConfig(hidden=16, layers=2, heads=2),
    steps=12,
    batch=2,
    sequence=16,
    warmup=2,
    eval_every=4,
    eval_tokens=64,
    checkpoint_every=5,
    device="cpu",
    dtype="float32",
)
SILENT = Console(quiet=True)


def byte_tokenizer() -> Tokenizer:
    """One id a byte, and one more before each document."""
    return Tokenizer("bytes", VOCABULARY, 256, lambda text: list(text.encode()))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The tensors are so small that a second thread costs time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some 40 kB of text that has something to learn in it."""
    folder = tmp_path_factory.mktemp("text")
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma\n", "delta", "(epsilon)"], 6000)
    for number, part in enumerate(np.array_split(words, 6)):
        (folder / f"{number}.txt").write_text(" ".join(part))
    return folder


@pytest.fixture(scope="module")
def corpus(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The tokens of `text`."""
    return load_corpus(str(text), byte_tokenizer(), tmp_path_factory.mktemp("tokens"))


def train(folder: Path, text: Path, resume: bool = False, **settings: object) -> int:
    """Runs `logitless-demo train` with the tiny model in this process."""
    base = replace(TINY, text=str(text), **settings)
    return run_training({}, folder, resume, base, SILENT, byte_tokenizer)


def log_of(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder: Path) -> list[tuple[float, float, float | None]]:
    """What must come out the same however often a run was stopped."""
    return [(line["loss"], line["gradient_norm"], line["held_out_loss"]) for line in log_of(folder)]


def run_script(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Starts Python code that can import this file."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def wait_for(condition, process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Waits until the condition holds while the process runs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def demo_folder(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a tiny demo."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    base = replace(TINY, text=str(text))
    assert run_demo({"steps": 8}, folder, "logitless-demo compare <tiny> & more", SILENT, base, byte_tokenizer) == 0
    return folder


class TestData:
    """Files to tokens to batches."""

    def test_a_batch_depends_on_seed_and_step_alone(self, corpus):
        """Asked for in any order, step by step or alone, it is the same."""
        forward = [training_batch(corpus.train, 3, step, 4, 16) for step in range(300)]
        for step in (299, 0, 150):
            again = training_batch(corpus.train, 3, step, 4, 16)
            assert all(torch.equal(first, second) for first, second in zip(forward[step], again, strict=True))
        assert not torch.equal(forward[0][0], training_batch(corpus.train, 4, 0, 4, 16)[0])

    def test_targets_are_the_next_tokens(self, corpus):
        """Shapes, types and the shift by one."""
        inputs, target = training_batch(corpus.train, 0, 0, 3, 16)
        assert inputs.shape == target.shape == (3, 16)
        assert inputs.dtype == target.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], target[:, :-1])

    def test_an_epoch_visits_each_window_once(self):
        """And the next one in another order."""
        tokens = np.arange(1000, dtype=np.int32)
        windows = 1000 // 10 - 1
        epochs = [
            [int(training_batch(tokens, 0, e * windows + i, 1, 10)[0][0, 0]) for i in range(windows)] for e in (0, 1)
        ]
        for starts in epochs:
            assert len({start // 10 for start in starts}) == windows
            assert len({start % 10 for start in starts}) == 1
        assert epochs[0] != epochs[1]

    def test_held_out_batches_stay_within_the_limit(self, corpus):
        """At least one sequence, never more tokens than asked for or there are."""
        for limit in (1, 16, 100, 10**9):
            tokens = sum(target.numel() for _, target in held_out_batches(corpus.held_out, limit, 3, 16))
            assert 16 <= tokens <= max(16, min(limit, len(corpus.held_out) - 1))

    def test_tokens_are_cached_by_content(self, text, tmp_path):
        """The second load tokenizes nothing; other text gets another key; a damaged file is made anew."""
        calls = []
        tokenizer = replace(byte_tokenizer(), encode=lambda content: calls.append(1) or list(content.encode()))
        first = load_corpus(str(text), tokenizer, tmp_path)
        made = len(calls)
        second = load_corpus(str(text / "*.txt"), tokenizer, tmp_path)
        assert len(calls) == made > 0
        assert first.key == second.key
        assert np.array_equal(first.train, second.train)
        damaged = next(tmp_path.glob("*.train.npy"))
        part = damaged.read_bytes()[:200]
        damaged.unlink()  # the old file is still mapped
        damaged.write_bytes(part)
        assert np.array_equal(load_corpus(str(text), tokenizer, tmp_path).train, second.train)
        one = load_corpus(str(text / "0.txt"), tokenizer, tmp_path)
        assert one.key != first.key
        assert len(one.held_out) > 0

    def test_the_split_loses_nothing_and_shares_nothing(self, text, corpus):
        """Every byte and every document mark is on one side."""
        total = sum(path.stat().st_size for path in text.iterdir())
        tokens = np.concatenate([corpus.train, corpus.held_out])
        assert (tokens < 256).sum() == total
        assert 0.04 < len(corpus.held_out) / len(tokens) < 0.08

    def test_the_standard_library_is_found(self):
        """Without its tests and without installed packages."""
        files = find_files(None)
        assert len(files) > 100
        assert files == sorted(files)
        assert not any({"test", "site-packages", "idlelib"} & set(path.parts[-3:]) for path in files)

    def test_what_is_no_text_is_left_out(self, text, tmp_path):
        """Binary and hidden files in a folder do no harm."""
        for path in text.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe")
        (tmp_path / ".hidden").write_text("secret")
        clean = load_corpus(str(text), byte_tokenizer(), tmp_path / ".tokens")
        mixed = load_corpus(str(tmp_path), byte_tokenizer(), tmp_path / ".tokens")
        assert np.array_equal(clean.train, mixed.train)


class TestModel:
    """The decoder."""

    def test_it_is_causal(self):
        """A token changes its own hidden state and later ones, no earlier one."""
        model = Decoder(ModelConfig(16, 2, 2), VOCABULARY, sequence=12, seed=0)
        tokens = torch.randint(VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
        changed = tokens.clone()
        changed[:, 7] = (changed[:, 7] + 1) % VOCABULARY
        before, after = model(tokens), model(changed)
        assert torch.equal(before[:, :7], after[:, :7])
        assert (before[:, 7:] != after[:, 7:]).any(-1).all()

    def test_rotary_attention_is_relative(self):
        """A query and a key meet alike wherever they stand, so long as their distance is the same."""
        query, key = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(0)).unbind(0)

        def score(query_at: int, key_at: int) -> float:
            turn_query, turn_key = (rotation(torch.tensor([at]), 8) for at in (query_at, key_at))
            return (rotate(query, turn_query) * rotate(key, turn_key)).sum().item()

        assert score(9, 4) == pytest.approx(score(105, 100), abs=1e-5)
        assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-3)

    def test_one_seed_one_model(self):
        """Equal seeds give equal weights, whatever was drawn before."""
        first = Decoder(ModelConfig(16, 2, 2), VOCABULARY, sequence=12, seed=5)
        torch.rand(3)
        second = Decoder(ModelConfig(16, 2, 2), VOCABULARY, sequence=12, seed=5)
        other = Decoder(ModelConfig(16, 2, 2), VOCABULARY, sequence=12, seed=6)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert not torch.equal(first.head_weight, other.head_weight)

    def test_cutting_the_graph_changes_no_gradient(self, corpus):
        """Body and head are differentiated apart; together they give the gradient of the whole."""
        config = replace(TINY, head="two-stage", gradient_clip=0.0, weight_decay=0.0)
        with ResidentMemory() as meter:
            trainer = Trainer(config, corpus, meter)
            inputs, target = training_batch(corpus.train, 0, 0, config.batch, config.sequence)
            whole = Decoder(config.model, VOCABULARY, config.sequence, seed=0)
            whole.load_state_dict(trainer.model.state_dict())
            logits = whole(inputs).flatten(0, 1) @ whole.head_weight.T
            loss = torch.nn.functional.cross_entropy(logits, target.flatten())
            loss.backward()
            squares = [parameter.grad.square().sum() for parameter in whole.parameters() if parameter.grad is not None]
            record = trainer.advance()
        assert record.loss == pytest.approx(loss.item(), rel=1e-6)
        assert record.gradient_norm == pytest.approx(sum(squares).sqrt().item(), rel=1e-5)

    def test_learning_rate(self):
        """Up to the highest at the end of warm-up, down to about a tenth at the end."""
        config = TrainConfig(steps=100, warmup=10, learning_rate=1.0)
        rates = [learning_rate(step, config) for step in range(100)]
        assert rates[9] == rates[10] == max(rates) == 1.0
        assert rates[0] == pytest.approx(0.1)
        assert rates[99] == pytest.approx(0.1, abs=0.01)


class TestCheckpoint:
    """Whole at any moment."""

    def test_a_failed_write_leaves_the_old_file(self, tmp_path):
        """And nothing beside it."""
        path = tmp_path / "file"
        path.write_bytes(b"old")
        with pytest.raises(TypeError), atomic_write(path) as file:
            file.writelines([b"new", None])  # type: ignore[list-item]
        assert path.read_bytes() == b"old"
        assert list(tmp_path.iterdir()) == [path]

    def test_a_killed_writer_leaves_a_whole_checkpoint(self, tmp_path):
        """Killed at some moment within an endless loop of writing, three times."""
        path = tmp_path / "checkpoint.pt"
        code = (
            "import sys, pathlib, torch\n"
            "from logitless_demo.checkpoint import save_checkpoint\n"
            "step = 0\n"
            "while True:\n"
            "    step += 1\n"
            "    state = {'step': step, 'weights': torch.full((500_000,), float(step))}\n"
            "    save_checkpoint(pathlib.Path(sys.argv[1]), state)\n"
        )
        for pause in (0.0, 0.013, 0.031):
            path.unlink(missing_ok=True)
            with run_script(code, path) as process:
                wait_for(path.exists, process)
                time.sleep(pause)
                process.kill()
            state = load_checkpoint(path)
            assert (state["weights"] == state["step"]).all()

    @pytest.mark.parametrize("damage", ["cut", "empty", "other", "flip"])
    def test_damage_is_reported(self, tmp_path, damage):
        """Never a traceback of PyTorch's, never wrong weights."""
        path = tmp_path / "checkpoint.pt"
        save_checkpoint(path, {"weights": torch.arange(5000.0)})
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(
            {"cut": content[:9000], "empty": b"", "other": b"no checkpoint", "flip": bytes(content)}[damage]
        )
        with pytest.raises(InputError, match=re.escape(str(path))):
            load_checkpoint(path)

    def test_the_log_is_cut_where_the_checkpoint_stands(self, tmp_path):
        """Later lines go, and so does a line that was not finished."""
        path = tmp_path / "log.jsonl"
        path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 6)) + '{"ste')
        truncate_log(path, 9)
        assert len(path.read_text().splitlines()) == 5
        truncate_log(path, 3)
        assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


class TestTraining:
    """`logitless-demo train`: a run goes on as if it had never been stopped."""

    @pytest.mark.parametrize(
        ("head", "optimizer"), [("two-stage", "adamw"), ("exact", "adamw"), ("sampled", "adamw"), ("exact", "sgd")]
    )
    def test_resuming_changes_nothing(self, text, tmp_path, head, optimizer, monkeypatch):
        """A run that dies two steps past its checkpoint ends with the losses of one that never died, bit for bit."""
        assert train(tmp_path / "whole", text, head=head, optimizer=optimizer) == 0
        advance = Trainer.advance

        def dying(self):
            if self.step == 7:
                raise KeyboardInterrupt
            return advance(self)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "advance", dying)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "cut", text, head=head, optimizer=optimizer)
        assert len(log_of(tmp_path / "cut")) == 7
        assert train(tmp_path / "cut", text, resume=True) == 0
        assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
        assert [line["step"] for line in log_of(tmp_path / "cut")] == list(range(1, 13))

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_signals_leave_a_run_that_can_be_resumed(self, text, tmp_path, number):
        """Ctrl-C and SIGTERM end with their exit codes and a checkpoint of the last step; kill -9 loses some steps."""
        folder = tmp_path / "run"
        code = (
            "import pathlib, sys, test_demo\n"
            "folder, text = map(pathlib.Path, sys.argv[1:])\n"
            "sys.exit(test_demo.train(folder, text, steps=4000, eval_every=0))\n"
        )
        with run_script(code, folder, text) as process:
            wait_for((folder / "checkpoint.pt").exists, process)
            process.send_signal(number)
            status = process.wait(timeout=60)
        assert status == (-number if number == signal.SIGKILL else 128 + number)
        reached = load_checkpoint(folder / "checkpoint.pt")["step"]
        steps = [line["step"] for line in log_of(folder)] if number != signal.SIGKILL else None
        assert steps in (None, list(range(1, reached + 1)))

        settings = json.loads((folder / "run.json").read_text())
        settings["config"]["steps"] = reached + 3
        (folder / "run.json").write_text(json.dumps(settings))
        assert train(folder, text, resume=True) == 0
        assert [line["step"] for line in log_of(folder)] == list(range(1, reached + 4))
        assert not list(folder.glob("*.tmp"))

    def test_a_run_without_a_checkpoint_starts_over(self, text, tmp_path):
        """Killed before the first checkpoint, it has settings and perhaps a log, and loses nothing but time."""
        train(tmp_path / "run", text)
        before = losses_of(tmp_path / "run")
        (tmp_path / "run" / "checkpoint.pt").unlink()
        assert train(tmp_path / "run", text, resume=True) == 0
        assert losses_of(tmp_path / "run") == before

    def test_a_finished_run_stays_as_it_is(self, text, tmp_path):
        """Resuming it does nothing."""
        train(tmp_path / "run", text)
        before = (tmp_path / "run" / "log.jsonl").read_bytes()
        assert train(tmp_path / "run", text, resume=True) == 0
        assert (tmp_path / "run" / "log.jsonl").read_bytes() == before

    def test_a_lost_token_cache_is_made_again(self, text, tmp_path):
        """From the same text; other text is refused."""
        copy = tmp_path / "copy"
        copy.mkdir()
        for path in text.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        train(tmp_path / "run", copy)
        for path in (tmp_path / ".tokens").iterdir():
            path.unlink()
        assert train(tmp_path / "run", copy, resume=True) == 0
        for path in (tmp_path / ".tokens").iterdir():
            path.unlink()
        (copy / "0.txt").write_text("something else " * 100)
        with pytest.raises(InputError, match="no longer what"):
            train(tmp_path / "run", copy, resume=True)

    def test_it_learns(self, text, tmp_path):
        """By every head, from ln V down."""
        for head in ("two-stage", "exact", "sampled"):
            train(tmp_path / head, text, head=head, steps=60, learning_rate=1e-2, checkpoint_every=0)
            losses = [line["loss"] for line in log_of(tmp_path / head)]
            assert losses[0] == pytest.approx(np.log(VOCABULARY), abs=0.1)
            assert losses[-1] < 3.5

    def test_sgd(self, text, corpus, tmp_path):
        """With plain momentum and the weight decay on matrices only, it learns at a rate of its own."""
        train(tmp_path / "run", text, optimizer="sgd", steps=60, learning_rate=0.5, weight_decay=0.0)
        assert log_of(tmp_path / "run")[-1]["loss"] < 4.0
        with ResidentMemory() as meter:
            matrices, vectors = Trainer(replace(TINY, optimizer="sgd"), corpus, meter).optimizer.param_groups
        assert (matrices["momentum"], matrices["nesterov"]) == (0.9, False)
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)

    def test_compiled_is_two_stage(self, text, tmp_path, monkeypatch):
        """The same function, here as a graph whose operations run one by one: generating code takes half a minute."""
        compiled = torch.compile(heads.two_stage, backend="eager", fullgraph=True)
        monkeypatch.setattr(heads, "_compiled", lambda: compiled)
        train(tmp_path / "two-stage", text, head="two-stage", steps=3)
        train(tmp_path / "compiled", text, head="compiled", steps=3)
        assert losses_of(tmp_path / "compiled") == losses_of(tmp_path / "two-stage")

    @pytest.mark.parametrize("head", ["exact", "sampled"])
    def test_held_out_losses_are_exact(self, corpus, head):
        """One a token, and their mean is the held-out loss, by whichever head."""
        with ResidentMemory() as meter:
            trainer = Trainer(replace(TINY, head=head), corpus, meter)
            trainer.advance()
            nll = trainer.held_out_nll()
        assert nll.shape == (TINY.eval_tokens,)
        assert nll.mean().item() == pytest.approx(trainer.held_out_loss(), rel=1e-6)

    def test_bfloat16(self, text, tmp_path):
        """Products in bfloat16 train too, on a CPU as well."""
        train(tmp_path / "run", text, dtype="bfloat16")
        assert log_of(tmp_path / "run")[-1]["loss"] < np.log(VOCABULARY)


class TestDemo:
    """`logitless-demo compare`, from end to end."""

    def test_all_heads_see_the_same(self, demo_folder):
        """Equal first losses; exact keeps to two-stage, sampled leaves it only slowly."""
        results = json.loads((demo_folder / "results.json").read_text())
        assert results["exact_is_exact"] is True
        two_stage, exact, sampled = ([record["loss"] for record in run["records"]] for run in results["runs"])
        assert len(two_stage) == 8
        assert two_stage[0] == pytest.approx(sampled[0], abs=1e-5)
        assert exact == pytest.approx(two_stage, abs=1e-3)
        assert sampled == pytest.approx(two_stage, abs=0.5)
        for run in results["runs"]:
            for record in run["records"]:
                parts = record["head_seconds"] + record["body_seconds"] + record["optimizer_seconds"]
                assert 0 < parts <= record["seconds"] * (1 + 1e-6)
                assert record["peak_bytes"] >= 0

    def test_the_report_holds_its_pictures_and_every_number(self, demo_folder):
        """One file without a reference to another."""
        page = (demo_folder / "report.html").read_text()
        pictures = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", page)
        assert len(pictures) == 2 * 5
        assert all(b"<svg" in base64.b64decode(picture) for picture in pictures)
        assert not re.search(r'(src|href)="(?!data:)', page)
        embedded = re.search(r'<script type="application/json" id="results">(.*?)</script>', page, re.DOTALL)
        assert embedded is not None
        assert json.loads(embedded[1]) == json.loads((demo_folder / "results.json").read_text())
        assert "logitless-demo compare &lt;tiny&gt; &amp; more" in page

    def test_the_pictures_are_files_too(self, demo_folder):
        """PNG, each."""
        pictures = sorted(demo_folder.glob("*.png"))
        assert [path.stem for path in pictures] == ["difference", "loss", "memory", "throughput", "time"]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)

    def test_nothing_is_overwritten(self, demo_folder):
        """A second demo in the same folder is refused before it costs time."""
        with pytest.raises(InputError, match="not an empty folder"):
            run_demo({}, demo_folder, "", SILENT, TINY, byte_tokenizer)


class TestMessages:
    """One line, a remedy and exit code 2."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["train", "--text", "/no/such/*.txt"], "no files found at /no/such/*.txt"),
            (["compare", "--text", "/no/such/file"], "give an existing file, folder or glob"),
            (["train", "--resume", "/no/such/run"], "there is no run in this folder"),
            (["train", "--hidden", "20", "--heads", "3"], "--hidden must be a multiple of twice --heads"),
            (["train", "--threshold", "2"], "--threshold must lie in (0, 1]"),
            (["train", "--steps", "0"], "--steps must be positive"),
            (["train", "--warmup", "-1"], "--warmup must not be negative"),
            (["train", "--run-dir", "file"], "--run-dir: nothing can be written to file (not a directory)"),
            (["train", "--run-dir", "file/run"], "--run-dir: nothing can be written to file (not a directory)"),
            (["train", "--run-dir", "x" * 300], "--run-dir: nothing can be written to"),
            (["train", "--run-dir", "."], "--run-dir: . exists and is not an empty folder"),
            (["train", "--run-dir", "run"], "--run-dir: run already holds a run"),
            (["train", "--resume", "run"], "--resume: run/run.json cannot be read"),
            (["train", "--resume", "file"], "--resume file: there is no run in this folder"),
            (["compare", "--run-dir", "run"], "--run-dir: run already holds a run"),
            (["compare", "--run-dir", "file/run"], "--run-dir: nothing can be written to file"),
            (["converge", "--tokens", "none.npz", "--output", "file"], "--output: nothing can be written to file"),
            (["converge", "--tokens", "none.npz", "--output", "new"], "--tokens none.npz cannot be read"),
            (["converge", "--tokens", "run", "--prepare", "text"], "--tokens must be a file, got the folder run"),
            (["converge", "--tokens", "file/t.npz", "--prepare", "text"], "--tokens: nothing can be written to file"),
        ],
    )
    def test_bad_words(self, words, message, capsys, tmp_path, monkeypatch):
        """What cannot be used is named, before text is read or anything is written."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / "file").write_text("text")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "run.json").write_text("{")
        before = sorted(tmp_path.rglob("*"))
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("word", ["1/0", "small", "1e999"])
    def test_bad_numbers(self, word, capsys):
        """Refused when the flags are read."""
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--threshold", word])
        assert f"must be a number such as 0.1 or 1/64, got '{word}'" in capsys.readouterr().err

    @pytest.mark.parametrize(("short", "name"), [("bf16", "bfloat16"), ("fp32", "float32"), ("auto", "auto")])
    def test_short_names_of_dtypes(self, short, name):
        """Are those of the settings."""
        parser = argparse.ArgumentParser()
        add_flags(parser, TrainConfig())
        assert given_flags(parser.parse_args(["--dtype", short])) == {"dtype": name}

    def test_no_cuda_device(self, capsys, tmp_path, monkeypatch):
        """Said at once."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main(["train", "--device", "cuda"]) == 2
        assert "use --device cpu" in capsys.readouterr().err

    def test_too_little_text(self, corpus):
        """With how much there is and how much is needed."""
        with pytest.raises(InputError, match=r"too little text: .* lower --sequence or --batch"):
            check_size(corpus, batch=8, sequence=10_000)

    def test_empty_text(self, tmp_path):
        """A file without text is no text."""
        (tmp_path / "empty.txt").write_text("")
        with pytest.raises(InputError, match="none of the 1 files"):
            load_corpus(str(tmp_path / "empty.txt"), byte_tokenizer(), tmp_path / "tokens")

    def test_a_taken_folder(self, text, tmp_path):
        """A run is never overwritten, nor a folder with other things in it."""
        train(tmp_path / "run", text, steps=1)
        with pytest.raises(InputError, match="already holds a run: go on with --resume"):
            train(tmp_path / "run", text)
        with pytest.raises(InputError, match="not an empty folder"):
            train(text, text)

    def test_conflicting_flags(self, text, tmp_path):
        """A resumed run keeps its settings; repeating one of them is no conflict."""
        train(tmp_path / "run", text, steps=1)
        with pytest.raises(InputError, match="--batch 4 conflicts with the run to be resumed, which has 2"):
            run_training({"batch": 4}, tmp_path / "run", True, TINY, SILENT, byte_tokenizer)
        repeated = {"batch": 2, "hidden": 16, "device": "auto"}
        assert run_training(repeated, tmp_path / "run", True, TINY, SILENT, byte_tokenizer) == 0

    def test_damaged_run(self, text, tmp_path):
        """Settings and checkpoint are told apart."""
        train(tmp_path / "run", text, steps=1)
        (tmp_path / "run" / "checkpoint.pt").write_bytes(b"damaged")
        with pytest.raises(InputError, match=r"checkpoint\.pt is not a checkpoint"):
            train(tmp_path / "run", text, resume=True)
        (tmp_path / "run" / "run.json").write_text("{")
        with pytest.raises(InputError, match=r"run\.json cannot be read"):
            train(tmp_path / "run", text, resume=True)

    def test_a_loss_that_is_no_number(self, text, tmp_path, monkeypatch):
        """Stops the run before the weights are spoilt."""
        monkeypatch.setattr("logitless_demo.train.head_loss", lambda hidden, *_: hidden.sum() * float("nan"))
        with pytest.raises(InputError, match="the loss of step 1 is nan: lower --learning-rate"):
            train(tmp_path / "run", text)

    def test_help_loads_little(self):
        """What takes a second to import is imported by the subcommand that needs it."""
        code = (
            "import sys, logitless_demo.cli\n"
            "try: logitless_demo.cli.main(['--help'])\n"
            "except SystemExit: pass\n"
            "print(sorted({'rich', 'matplotlib', 'psutil', 'mistral_common', 'numpy'} & set(sys.modules)))\n"
        )
        with run_script(code) as process:
            output = process.communicate()[0].decode()
        assert "compare" in output
        assert "train" in output
        assert output.splitlines()[-1] in ("[]", "['numpy']")  # numpy comes with torch, where it is installed
