"""The benchmark on a problem small enough for a test, and the plan on the command line."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console

from logitless.bench import run
from logitless.bench.cases import Case, make_inputs
from logitless.bench.trained import dequantise_q8, widen
from logitless.cli import main

TINY = Case("tiny", tokens=24, hidden=16, vocabulary=301, trained=False, description="for tests")
TINY_TRAINED = Case("tiny-trained", tokens=24, hidden=48, vocabulary=301, trained=True, description="for tests")


def config(tmp_path, **changes) -> run.BenchConfig:
    settings = {
        "cases": ("tiny",),
        "dtypes": ("float32", "bfloat16"),
        "peers": ("logitless exact", "logitless sampled"),
        "rounds": 1,
        "threads": 1,
        "seed": 0,
        "device": "cpu",
        "trained_head": None,
        "output": tmp_path / "results" / "bench.json",
    }
    return run.BenchConfig(**{**settings, **changes})


@pytest.fixture
def tiny_cases(monkeypatch):
    monkeypatch.setattr(run, "CASES", {case.name: case for case in (TINY, TINY_TRAINED)})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("tiny_cases")
def test_results_hold_what_they_were_measured_on(tmp_path):
    assert run.run_bench(config(tmp_path), "logitless bench", Console(quiet=True)) == 0
    content = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert content["command"] == "logitless bench"
    assert content["software"]["torch"] == torch.__version__
    assert [result["dtype"] for result in content["results"]] == ["float32", "bfloat16"]
    for result in content["results"]:
        baseline, exact, sampled = result["measurements"]
        assert baseline["peer"] == "two-stage"
        assert baseline["ratio"] == baseline["peak_ratio"] == 1
        assert exact["hidden_error"] <= 0.02
        assert sampled["loss_error"] <= max(baseline["loss_error"], 1e-5)
    assert not list((tmp_path / "results").glob("*.partial"))


@pytest.mark.usefixtures("tiny_cases")
def test_trained_head_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="--trained-head"):
        run.run_bench(config(tmp_path, cases=("tiny-trained",)), "", Console(quiet=True))


def test_widened_head_has_the_same_logits(tmp_path):
    hidden, weight = torch.randn(30, 16), torch.randn(301, 16)
    path = tmp_path / "head.pt"
    torch.save({"hidden": hidden, "labels": torch.zeros(30, dtype=torch.int32), "weight": weight}, path)
    inputs = make_inputs(TINY_TRAINED, torch.float32, torch.device("cpu"), 0, path)
    assert inputs.hidden.shape == (24, 48)
    torch.testing.assert_close(inputs.hidden @ inputs.weight.T, hidden[:24] @ weight.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at least"):
        widen(hidden, weight, 8)


def test_q8_is_scale_times_signed_byte():
    values = torch.arange(-32, 32, dtype=torch.int8).view(2, 32)
    scale = torch.tensor([[0.5], [2.0]], dtype=torch.float16)
    packed = torch.cat((scale.view(torch.uint8), values.view(torch.uint8)), 1)
    torch.testing.assert_close(dequantise_q8(packed), values.float() * scale.float())


def test_unknown_case_and_peer(capsys):
    assert main(["bench", "--cases", "nonesuch"]) == 2
    assert "nonesuch" in capsys.readouterr().err
    assert main(["bench", "--peers", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err


def test_plan_on_the_command_line(capsys):
    assert main(["plan", "--tokens", "4096", "--hidden", "1024", "--vocabulary", "50304"]) == 0
    assert "workspace" in capsys.readouterr().out
    assert main(["plan", "--tokens", "4096", "--hidden", "1024", "--vocabulary", "50304", "--workspace", "1KiB"]) == 2
    assert "at least" in capsys.readouterr().err
