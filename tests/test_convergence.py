"""The convergence study, on a model and a text so small that it takes seconds."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")

from rich.console import Console

from logitless_demo import convergence, tokens
from logitless_demo.cli import main
from logitless_demo.config import ModelConfig
from logitless_demo.convergence import StudyConfig, run_study
from logitless_demo.convergence_plots import draw_figures, smooth
from logitless_demo.convergence_summary import describe, differences, read_results, standard_error
from logitless_demo.data import Tokenizer
from logitless_demo.errors import InputError
from logitless_demo.frequency import loss_by_frequency, rows_by_frequency
from logitless_demo.memory import ResidentMemory
from logitless_demo.study import RUNS, STUDY, pairing
from logitless_demo.tokens import load_tokens, prepare_tokens
from logitless_demo.train import Trainer

VOCABULARY = 300
TINY = replace(
    STUDY,
    model=ModelConfig(hidden=32, layers=1, heads=2),
    steps=3,
    batch=2,
    sequence=16,
    warmup=1,
    eval_every=2,
    eval_tokens=64,
    device="cpu",
    dtype="float32",
)
SILENT = Console(quiet=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def byte_tokenizer() -> Tokenizer:
    """One id a byte, and one more before each document; found by its name in other processes."""
    return Tokenizer("bytes", VOCABULARY, 256, lambda text: list(text.encode()))


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens made by hand: ids below 200, the lower the more frequent."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.npz"
    ids = (200 * np.random.default_rng(0).random(700) ** 2).astype(np.uint32)
    np.savez(path, train=ids[:600], held_out=ids[600:], vocabulary=VOCABULARY)
    return path


@pytest.fixture(scope="module")
def study(token_file: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyConfig:
    """A study of two runs, done."""
    settings = StudyConfig(token_file, tmp_path_factory.mktemp("study") / "out", TINY, ("exact-0", "sampled-64-0"))
    assert run_study(settings, "logitless-demo converge <tiny>", SILENT) == 0
    return settings


def result_of(study: StudyConfig, name: str) -> dict[str, Any]:
    """What is in the file of a run."""
    return json.loads((study.output / f"{name}.json").read_text())


class TestTokens:
    """Text to a file of tokens, and back."""

    def test_documents_begin_with_their_mark(self, tmp_path, monkeypatch):
        """Blank lines part them; several chunks, which other processes encode, give the same as one."""
        (tmp_path / "train.txt").write_text("\nab\nc\n\nd\n \n\n\u00e9\n")
        (tmp_path / "val.txt").write_text("e\n\nf")
        expected = [256, *b"ab\nc", 256, *b"d", 256, *"\u00e9".encode()]
        for name, size in (("one.npz", 1000), ("more.npz", 3)):
            monkeypatch.setattr(tokens, "CHUNK_CHARACTERS", size)
            assert prepare_tokens(tmp_path, tmp_path / "made" / name, SILENT, byte_tokenizer) == 0
            corpus = load_tokens(tmp_path / "made" / name)
            assert corpus.train.tolist() == expected
            assert corpus.held_out.tolist() == [256, *b"e", 256, *b"f"]
            assert corpus.vocabulary == VOCABULARY
            assert corpus.train.dtype == np.int32

    def test_the_key_is_of_the_tokens(self, token_file, tmp_path):
        """Other tokens, another key; the same in another file, the same key."""
        with np.load(token_file) as data:
            np.savez_compressed(tmp_path / "same.npz", **data)
            np.savez(tmp_path / "other.npz", **{**data, "held_out": data["held_out"][::-1]})
        assert load_tokens(token_file).key == load_tokens(tmp_path / "same.npz").key
        assert load_tokens(token_file).key != load_tokens(tmp_path / "other.npz").key

    @pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flip", "text", "array", "fields", "range", "shape"])
    def test_a_file_that_cannot_be_used(self, token_file, tmp_path, damage):
        """Says why, and how to make a good one."""
        path = tmp_path / "tokens.npz"
        content = bytearray(token_file.read_bytes())
        content[len(content) // 3] ^= 0xFF
        ids = np.arange(100)
        wholly = {"empty": b"", "cut": token_file.read_bytes()[:2000], "text": b"tokens", "flip": bytes(content)}
        arrays = {
            "fields": {"train": ids, "vocabulary": 100},
            "range": {"train": ids, "held_out": ids, "vocabulary": 99},
            "shape": {"train": ids / 2, "held_out": ids, "vocabulary": 100},
        }
        if damage in wholly:
            path.write_bytes(wholly[damage])
        elif damage in arrays:
            np.savez(path, **arrays[damage])
        elif damage == "array":
            with path.open("wb") as file:
                np.save(file, ids)
        with pytest.raises(InputError, match=r"--tokens .*tokens\.npz cannot be read .*converge --prepare FOLDER"):
            load_tokens(path)

    def test_text_that_cannot_be_used(self, tmp_path):
        """A missing file, one that is not UTF-8, an empty one."""
        with pytest.raises(InputError, match=r"no train\.txt in it: give a folder"):
            prepare_tokens(tmp_path, tmp_path / "tokens.npz", SILENT, byte_tokenizer)
        (tmp_path / "train.txt").write_text("a")
        (tmp_path / "val.txt").write_bytes(b"\xff\xfe")
        with pytest.raises(InputError, match=r"val\.txt must be UTF-8"):
            prepare_tokens(tmp_path, tmp_path / "tokens.npz", SILENT, byte_tokenizer)
        (tmp_path / "val.txt").write_text("\n\n")
        with pytest.raises(InputError, match=r"val\.txt has no text in it"):
            prepare_tokens(tmp_path, tmp_path / "tokens.npz", SILENT, byte_tokenizer)
        assert not (tmp_path / "tokens.npz").exists()


class TestFrequency:
    """Means by how often an id occurs in the training text."""

    def test_losses_by_hand(self):
        """Eleven tokens: the first tenth has two, the rarest, of which one was never seen."""
        counts = np.array([0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 7])
        target = np.array([10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
        nll = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 21], dtype=np.float32)
        groups = loss_by_frequency(nll, target, counts)
        assert [group["loss"] for group in groups["deciles"]] == [15.5, 9, 8, 7, 6, 5, 4, 3, 2, 1]
        assert groups["deciles"][0] == {"size": 2, "least_count": 0, "largest_count": 5, "loss": 15.5}
        assert groups["never_seen"] == {"size": 1, "least_count": 0, "largest_count": 0, "loss": 21.0}

    def test_rows_by_hand(self):
        """Twenty ids that occur, two a decile, and three that do not."""
        counts = np.array([0, *range(20, 0, -1), 0, 0])
        norm = np.array([100, *range(20, 0, -1), 200, 300], dtype=np.float32)
        groups = rows_by_frequency(norm, norm + 1, counts)
        assert [group["norm"] for group in groups["deciles"]] == [1.5 + 2 * decile for decile in range(10)]
        assert [group["drift"] for group in groups["deciles"]] == [2.5 + 2 * decile for decile in range(10)]
        assert groups["never_seen"] == {"size": 3, "least_count": 0, "largest_count": 0, "norm": 200.0, "drift": 201.0}

    def test_empty_groups_have_no_mean(self):
        """Fewer ids than deciles, all of which occur."""
        groups = rows_by_frequency(np.ones(4, np.float32), np.ones(4, np.float32), np.array([1, 2, 3, 4]))
        assert [group["size"] for group in groups["deciles"]] == [1] * 4 + [0] * 6
        assert groups["never_seen"] == {
            "size": 0,
            "least_count": None,
            "largest_count": None,
            "norm": None,
            "drift": None,
        }


class TestStudy:
    """`logitless-demo converge`, from tokens to figures."""

    def test_a_run_tells_what_it_was(self, study):
        """Every step, every measurement, settings, machine and versions."""
        for name in study.runs:
            result = result_of(study, name)
            assert result["config"] == RUNS[name].config(TINY, study.sgd_learning_rate).to_json()
            assert result["command"] == "logitless-demo converge <tiny>"
            assert result["software"]["torch"] == torch.__version__
            assert "processor" in result["hardware"]
            assert result["compiled_body"] is False
            assert {len(values) for values in result["steps"].values()} == {3}
            assert [entry["step"] for entry in result["evaluations"]] == [0, 2, 3]
            assert result["evaluations"][-1]["seconds"] == pytest.approx(sum(result["steps"]["seconds"]))
            held_out = result["held_out"]
            assert held_out["loss"] == pytest.approx(result["evaluations"][-1]["loss"], rel=1e-6)
            assert held_out["standard_error"] == standard_error(held_out["sequence_losses"]) > 0
            assert held_out["tokens"] == 16 * len(held_out["sequence_losses"]) == 64
            assert sum(group["size"] for group in result["losses"]["deciles"]) == 64
            rows = result["rows"]
            assert sum(group["size"] for group in rows["deciles"]) + rows["never_seen"]["size"] == VOCABULARY
            assert rows["never_seen"]["size"] >= 100
            assert rows["deciles"][9]["drift"] > 0

    def test_warm_up_leaves_no_trace(self, study):
        """The steps are those of a run without it, bit for bit."""
        with ResidentMemory() as meter:
            trainer = Trainer(RUNS["sampled-64-0"].config(TINY, 1.0), load_tokens(study.tokens), meter)
            records = [trainer.advance() for _ in range(3)]
            last = trainer.held_out_nll().mean().item()
        result = result_of(study, "sampled-64-0")
        assert result["steps"]["loss"] == [record.loss for record in records]
        assert result["steps"]["gradient_norm"] == [record.gradient_norm for record in records]
        assert result["evaluations"][-1]["loss"] == last

    def test_summary_and_figures(self, study):
        """Written beside the runs."""
        summary = json.loads((study.output / "summary.json").read_text())
        exact, sampled = summary["runs"]
        assert exact["held_out_loss"] == result_of(study, "exact-0")["held_out"]["loss"]
        assert (exact["threshold"], sampled["threshold"]) == (None, 1 / 64)
        assert exact["tokens_per_second"] == pytest.approx(32e3 / exact["step_milliseconds"])
        (difference,) = summary["differences"]
        assert (difference["run"], difference["reference"], difference["kind"]) == (*reversed(study.runs), "gradient")
        assert difference["difference"] == pytest.approx(sampled["held_out_loss"] - exact["held_out_loss"], abs=1e-9)
        pictures = {path.stem: path.read_bytes() for path in study.output.glob("*.png")}
        assert pictures.keys() == {"deciles", "gradient_norm", "loss", "rows"}
        assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())
        assert not list(study.output.glob("*.tmp"))

    def test_finished_runs_are_not_done_again(self, study, monkeypatch):
        """Nor read anew: what is asked for and there stays, and is summarised with the rest."""
        trained = []

        def train(name: str, *_: object) -> dict[str, Any]:
            trained.append(name)
            raise InputError("the loss of step 1 is nan")

        before = (study.output / "exact-0.json").read_bytes()
        monkeypatch.setattr(convergence, "_train", train)
        printed = io.StringIO()
        wanted = replace(study, runs=("sgd-exact-0", "exact-0"))
        assert run_study(wanted, "", Console(file=printed, width=80)) == 1
        assert trained == ["sgd-exact-0"]
        assert "finished before: exact-0, sampled-64-0" in printed.getvalue()
        assert "sgd-exact-0: given up, the loss of step 1 is nan" in printed.getvalue()
        assert "training s" in printed.getvalue()
        assert max(map(len, printed.getvalue().splitlines())) <= 120
        assert (study.output / "exact-0.json").read_bytes() == before

    def test_runs_from_trained_weights(self, study, tmp_path):
        """Start at the loss at which that run ended, and need its weights."""
        wanted = replace(study, output=tmp_path, runs=("tuned-fp8-64-2",))
        with pytest.raises(
            InputError, match=r"tuned-fp8-64-2 starts from the weights of exact-0, .*exact-0\.pt is not"
        ):
            run_study(wanted, "", SILENT)
        assert run_study(replace(wanted, runs=("exact-0", "tuned-exact-2", "tuned-fp8-64-2")), "", SILENT) == 0
        last = result_of(wanted, "exact-0")["evaluations"][-1]["loss"]
        for name in ("tuned-exact-2", "tuned-fp8-64-2"):
            assert result_of(wanted, name)["evaluations"][0]["loss"] == pytest.approx(last, rel=1e-6)
            assert result_of(wanted, name)["start"] == "exact-0"
        assert (tmp_path / "tuned_loss.png").exists()
        (tmp_path / "tuned-fp8-64-2.json").unlink()
        assert run_study(wanted, "", SILENT) == 0

    def test_other_settings_are_refused(self, study):
        """Before anything is run, by the name of the setting."""
        for changed, name in (
            (replace(TINY, steps=4), "steps"),
            (replace(TINY, model=ModelConfig(64, 1, 2)), "hidden"),
        ):
            with pytest.raises(InputError, match=rf"is of a run with another {name} \(\d+, now \d+\): give another"):
                run_study(replace(study, base=changed), "", SILENT)

    def test_a_damaged_result(self, study, tmp_path):
        """Is to be removed."""
        (tmp_path / "exact-1.json").write_text("{")
        with pytest.raises(InputError, match=r"exact-1\.json cannot be read .* remove it to do this run again"):
            run_study(replace(study, output=tmp_path), "", SILENT)

    def test_what_cannot_be_run(self, study, capsys, tmp_path):
        """An unknown run, too little text, a rate of 0; on the command line one line each."""
        with pytest.raises(InputError, match=r"--runs must be among 'exact-0', .*, got 'exact-9'"):
            run_study(replace(study, runs=("exact-0", "exact-9")), "", SILENT)
        with pytest.raises(InputError, match="600 tokens to train on and 100 held out, needed are 1100 and 101"):
            run_study(replace(study, base=replace(TINY, batch=10, sequence=100)), "", SILENT)
        with pytest.raises(InputError, match=r"--sgd-learning-rate must be positive, got 0\.0"):
            run_study(replace(study, sgd_learning_rate=0.0), "", SILENT)
        words = ["converge", "--tokens", str(tmp_path / "none.npz")]
        assert main([*words, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 2
        assert main([*words, "--prepare", str(tmp_path)]) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 2
        assert "none.npz cannot be read" in errors[0]
        assert "no train.txt" in errors[1]

    def test_the_command_line(self, study, token_file, tmp_path, monkeypatch):
        """Flags become settings."""
        given = []
        monkeypatch.setattr(convergence, "run_study", lambda *words: given.append(words[0]) or 0)
        words = ["converge", "--tokens", str(token_file), "--output", str(tmp_path), "--runs", "exact-0"]
        assert main([*words, "--steps", "5", "--hidden", "96", "--no-compile-body", "--sgd-learning-rate", "0.25"]) == 0
        base = replace(STUDY, steps=5, model=replace(STUDY.model, hidden=96))
        assert given == [StudyConfig(token_file, tmp_path, base, ("exact-0",), 0.25, False)]


class TestRuns:
    """What is held against what."""

    def test_settings(self):
        """Seeds are added, thresholds are the run's, SGD has its own rate and no decay, a timed run is short."""
        base = replace(STUDY, seed=10)
        assert RUNS["exact-1"].config(base, 0.5).seed == 11
        assert RUNS["sampled-16-0"].config(base, 0.5).threshold == 1 / 16
        sgd = RUNS["sgd-exact-0"].config(base, 0.5)
        assert (sgd.optimizer, sgd.learning_rate, sgd.weight_decay) == ("sgd", 0.5, 0.0)
        assert RUNS["compiled-0"].config(base, 0.5).steps == 100
        assert RUNS["compiled-0"].config(replace(base, steps=3), 0.5).steps == 3
        assert RUNS["exact-short-0"].config(replace(base, steps=16), 0.5).steps == 10
        assert (RUNS["fp8-64-0"].config(base, 0.5).scan, RUNS["sampled-64-0"].config(base, 0.5).scan) == (
            "fp8",
            "input",
        )
        tuned = RUNS["tuned-exact-2"].config(replace(base, steps=16, warmup=8), 0.5)
        assert (tuned.steps, tuned.warmup, tuned.seed) == (4, 2, 12)
        assert tuned.learning_rate == pytest.approx(base.learning_rate / 10)
        assert STUDY.tokens == 32_768

    def test_pairs(self):
        """Within each the gradient differs, or the seed, or the time was about the same."""
        pairs = {(name, other): pairing(name, other) for name in RUNS for other in RUNS if pairing(name, other)}
        assert pairs == {
            ("exact-1", "exact-0"): "seed",
            ("sampled-64-1", "sampled-64-0"): "seed",
            ("sampled-64-1", "exact-1"): "gradient",
            ("sgd-sampled-64-0", "sgd-exact-0"): "gradient",
            ("sgd-exact-1", "sgd-exact-0"): "seed",
            ("fp8-64-1", "fp8-64-0"): "seed",
            ("fp8-64-0", "exact-0"): "gradient",
            ("fp8-64-1", "exact-1"): "gradient",
            ("fp8-64-0", "exact-short-0"): "gradient and steps",
            **{(f"tuned-{kind}-3", f"tuned-{kind}-2"): "seed" for kind in ("exact", "sampled-64", "fp8-64")},
            **{
                (f"tuned-{kind}-64-{seed}", f"tuned-exact-{seed}"): "gradient"
                for kind in ("sampled", "fp8")
                for seed in (2, 3)
            },
            **{(f"sampled-{inverse}-0", "exact-0"): "gradient" for inverse in (16, 32, 64, 128)},
            **{(f"sampled-{inverse}-0", "exact-short-0"): "gradient and steps" for inverse in (16, 32, 64, 128)},
        }

    def test_numbers_by_hand(self, study):
        """Of two runs with known losses and times."""
        results = read_results(study.output)
        for name, sequences, second in (("exact-0", [1.0, 3.0], 0.5), ("sampled-64-0", [2.0, 3.0], 0.25)):
            results[name]["held_out"]["sequence_losses"] = sequences
            results[name]["steps"]["seconds"] = [second] * 3
        results["exact-0"]["evaluations"] = [
            {"step": 0, "seconds": 0, "loss": 9.0},
            {"step": 3, "seconds": 1.5, "loss": 5.0},
        ]
        assert differences(results)[0]["difference"] == 0.5
        assert differences(results)[0]["standard_error"] == pytest.approx(0.5)
        described = describe("sampled-64-0", results)
        assert described["step_milliseconds"] == 250
        assert described["tokens_per_second"] == 128
        assert described["training_seconds"] == 0.75

    def test_smoothing_and_missing_runs(self, study):
        """A mean of neighbours; a figure needs only the runs it shows."""
        assert smooth([1, 2, 3, 6], 2) == [1.5, 2.5, 4.5]
        assert draw_figures({}) == {}
        alone = {"sampled-64-0": result_of(study, "sampled-64-0")}
        assert draw_figures(alone).keys() == {"deciles", "gradient_norm", "loss", "rows"}
