"""The benchmark on a problem small enough for a test, and the plan on the command line."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from logitless.bench import accuracy, environment, peers, products, run
from logitless.bench.cases import CASES, Case, make_inputs, redraw
from logitless.bench.isolation import PeerLostError, call_isolated
from logitless.bench.measure import Measurement, Protocol, measure
from logitless.bench.peers import BASELINE, PEERS, Peer
from logitless.bench.run import measure_case
from logitless.bench.table import WIDTH
from logitless.bench.trained import dequantize_q8, widen
from logitless.cli import main

TINY = Case("tiny", tokens=24, hidden=16, vocabulary=301, trained=False, description="for tests")
TINY_TRAINED = Case("tiny-trained", tokens=24, hidden=48, vocabulary=301, trained=True, description="for tests")
TINY_DRAWN = Case("tiny-drawn", 2400, 64, 301, trained=False, description="for tests", on_device=True)
CPU = torch.device("cpu")


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
    monkeypatch.setattr(run, "CASES", {case.name: case for case in (TINY, TINY_TRAINED, TINY_DRAWN)})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def quietly(who: str, what: str) -> None:
    """Progress that nobody watches."""


def measured(*chosen: Peer, case: Case = TINY, **protocol) -> dict[str, Measurement]:
    """Rows by name, that of the matrix products too, of a run on tiny inputs."""
    inputs = make_inputs(case, torch.float32, CPU, 0, None)
    result = measure(inputs, chosen, Protocol(**{"rounds": 1, **protocol}), quietly)
    return {row.peer: row for row in (*result.measurements, *([result.bound] if result.bound else []))}


def peer(name: str, load) -> Peer:
    return Peer(name, "for tests", load, lambda _: None)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny_cases")
def test_results_hold_what_they_were_measured_on(tmp_path):
    assert run.run_bench(config(tmp_path), "logitless bench", Console(quiet=True)) == 0
    content = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert content["command"] == "logitless bench"
    assert content["software"]["torch"] == torch.__version__
    assert {"processor", "memory"} <= content["hardware"].keys()
    assert [result["dtype"] for result in content["results"]] == ["float32", "bfloat16"]
    for result in content["results"]:
        baseline, exact, sampled = result["measurements"]
        assert baseline["peer"] == "two-stage"
        assert baseline["ratio"] == baseline["peak_ratio"] == 1
        assert exact["hidden_error"] <= 0.02
        assert sampled["loss_error"] <= max(baseline["loss_error"], 1e-5)
        assert result["bound"]["bound_ratio"] == result["bound"]["logits_ratio"] == 1
        for row in result["measurements"]:
            assert row.keys() == {field.name for field in dataclasses.fields(Measurement)}
            assert [name for name, value in row.items() if value is None] == ["error"]
            assert len(row["rounds_s"]) == len(row["forward_rounds_s"]) == content["rounds"] == 1
    assert not list((tmp_path / "results").glob("*.partial"))
    assert (tmp_path / "results" / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("tiny_cases")
def test_memory_with_and_without_gradients():
    row = measured(PEERS[BASELINE])[BASELINE]
    gradients = (TINY.tokens + TINY.vocabulary) * TINY.hidden * 4
    assert row.peak_with_gradients_mib - row.peak_mib == pytest.approx(gradients / 2**20)
    assert row.peak_with_gradients_mib * 2**20 >= gradients


def test_bound_can_be_left_out():
    rows = measured(PEERS[BASELINE], bound=False)
    assert rows.keys() == {BASELINE}
    assert rows[BASELINE].median_s is not None
    assert rows[BASELINE].bound_ratio is rows[BASELINE].logits_ratio is None


def test_every_round_is_drawn_afresh():
    seeds = []
    measured(PEERS[BASELINE], rounds=3, redraw=seeds.append)
    assert seeds == [0, 1, 2, 3]


def test_software_names_what_is_installed(monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("torch", "no-such-distribution"))
    software = environment.software()
    assert software["torch"] == torch.__version__
    assert "no-such-distribution" not in software


# --- peers that fail --------------------------------------------------------------------------------------------------


def failing_at(calls: int):
    """A loss that raises from a given call on."""

    def load():
        left = iter(range(calls))

        def loss(hidden, weight, target):
            if next(left, None) is None:
                raise RuntimeError("out of luck\nand more lines")
            return peers.two_stage(hidden, weight, target)

        return loss

    return load


def missing_module():
    raise ImportError("No module named 'elsewhere'")


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5])
def test_failing_peer_becomes_a_row(calls):
    """In the first call, in the one for memory, in a forward pass, in a later round."""
    rows = measured(PEERS[BASELINE], peer("unlucky", failing_at(calls)), PEERS["logitless exact"], rounds=2)
    unlucky = rows["unlucky"]
    assert unlucky.error == "RuntimeError: out of luck\nand more lines"
    assert unlucky.median_s is unlucky.ratio is unlucky.forward_median_s is None
    assert (unlucky.hidden_error is not None) == (calls > 0)
    assert (unlucky.peak_mib is not None) == (calls > 1)
    assert rows["logitless exact"].ratio is not None


def test_peer_that_cannot_be_imported():
    rows = measured(PEERS[BASELINE], peer("elsewhere", missing_module))
    assert rows["elsewhere"].error == "ImportError: No module named 'elsewhere'"


def test_others_are_measured_without_the_baseline():
    rows = measured(dataclasses.replace(PEERS[BASELINE], load=missing_module), PEERS["logitless exact"])
    assert rows["logitless exact"].bound_ratio is not None
    assert rows["logitless exact"].ratio is rows["logitless exact"].peak_ratio is None


def test_bound_that_does_not_fit(monkeypatch):
    def too_large(inputs):
        raise torch.OutOfMemoryError("logits")

    monkeypatch.setattr("logitless.bench.products.products", too_large)
    rows = measured(PEERS[BASELINE])
    assert rows["matrix products"].error == "OutOfMemoryError: logits"
    assert rows[BASELINE].ratio == 1
    assert rows[BASELINE].bound_ratio is None


def test_slow_peer_keeps_what_is_known_of_it():
    rows = measured(PEERS[BASELINE], slowest=1e-12)
    assert "left out of the rounds" in rows[BASELINE].error
    assert rows[BASELINE].median_s is None
    assert rows[BASELINE].weight_error < 1e-5


def test_barred_peer_is_not_touched():
    rows = measured(PEERS[BASELINE], peer("unlucky", missing_module), barred={"unlucky": "broke the device"})
    assert rows["unlucky"].error == "broke the device"


def works(number, progress):
    progress("worker", f"half of {number}")
    return number // 2


def fails(progress):
    raise ValueError("no such thing")


def dies(progress):
    progress("first", "works")
    progress("second", "dies")
    os._exit(7)


def hangs(progress):
    progress("sleeper", "sleeps")
    time.sleep(600)


def test_isolated_call_returns_and_raises():
    reports = []
    assert call_isolated(works, 8, progress=lambda *report: reports.append(report), patience=60) == 4
    assert reports == [("worker", "half of 8")]
    with pytest.raises(ValueError, match="no such thing"):
        call_isolated(fails, progress=quietly, patience=60)


@pytest.mark.parametrize(
    ("function", "patience", "who", "reason"),
    [(dies, 60, "second", "exit code 7"), (hangs, 3, "sleeper", "no answer for 3 s")],
)
def test_isolated_call_names_who_was_at_work(function, patience, who, reason):
    with pytest.raises(PeerLostError, match=reason) as lost:
        call_isolated(function, progress=quietly, patience=patience)
    assert lost.value.peer == who


@pytest.mark.usefixtures("tiny_cases")
def test_case_is_repeated_without_the_peer_that_ended_it(tmp_path, monkeypatch):
    attempts = []

    def attempt(function, settings, name, dtype, barred, progress, patience):
        attempts.append(dict(barred))
        if len(barred) < 2:
            raise PeerLostError(["quack", products.NAME][len(barred)], "gone")
        return measure_case(dataclasses.replace(settings, device="cpu"), name, dtype, barred, progress)

    monkeypatch.setattr(run, "call_isolated", attempt)
    settings = config(tmp_path, device="cuda", output=None)
    result = run._measure(settings, "tiny", "float32", quietly)
    assert attempts == [{}, {"quack": "gone"}, {"quack": "gone", products.NAME: "gone"}]
    assert result.bound.error == "gone"
    assert result.measurements[0].ratio == 1


@pytest.mark.usefixtures("tiny_cases")
def test_process_that_dies_at_no_peers_work_ends_the_run(tmp_path, monkeypatch):
    def attempt(*_, **__):
        raise PeerLostError("reference", "gone")

    monkeypatch.setattr(run, "call_isolated", attempt)
    with pytest.raises(PeerLostError):
        run._measure(config(tmp_path, device="cuda"), "tiny", "float32", quietly)


@pytest.mark.usefixtures("tiny_cases")
def test_workspace_of_the_callers(tmp_path):
    """One more contender, which is told what it may hold."""
    result = run._measure(config(tmp_path, workspace="1MiB"), "tiny", "float32", quietly)
    assert result.measurements[-1].peer == "logitless 1MiB"
    assert result.measurements[-1].error is None
    refused = run._measure(config(tmp_path, workspace="1KiB"), "tiny", "float32", quietly)
    assert "too small" in refused.measurements[-1].error


@pytest.mark.usefixtures("tiny_cases")
def test_table_fits_and_gives_reasons(tmp_path, monkeypatch):
    long = peer("a peer with a long name", failing_at(4))
    monkeypatch.setattr(run, "PEERS", {BASELINE: PEERS[BASELINE], long.name: long, "quack": PEERS["quack"]})
    printed = io.StringIO()
    settings = config(tmp_path, dtypes=("float32",), peers=(long.name, "quack"))
    assert run.run_bench(settings, "", Console(file=printed, width=80)) == 0
    lines = printed.getvalue().splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "\u2026" not in printed.getvalue()
    assert f"{long.name}: RuntimeError: out of luck" in lines
    assert any(line.startswith("quack: not measured, needs") for line in lines)
    content = json.loads(settings.output.read_text())
    assert content["not_measured"].keys() == {"quack"}
    errors = [row["error"] for row in content["results"][0]["measurements"]]
    assert errors == [None, "RuntimeError: out of luck\nand more lines"]


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-13), (torch.bfloat16, 1e-5)])
def test_reference_in_chunks_is_the_two_stage_pipeline(dtype, limit):
    """In fp64 for fp32 inputs, in fp32 for narrower ones; in chunks of 7 rows, of which the last has 3."""
    inputs = make_inputs(TINY, dtype, CPU, 0, None)
    chunk_bytes = 7 * TINY.vocabulary * (8 if dtype == torch.float32 else 4)
    ours = accuracy.reference(inputs, chunk_bytes)
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    loss = F.cross_entropy(F.linear(hidden, weight), inputs.target)
    loss.backward()
    errors = accuracy.errors(ours, accuracy.Gradients(loss.detach(), hidden.grad, weight.grad))
    assert max(dataclasses.astuple(errors)) <= limit


def test_reference_leaves_the_precision_of_products_as_it_was():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        accuracy.reference(make_inputs(TINY, torch.float32, CPU, 0, None))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


# --- cases ------------------------------------------------------------------------------------------------------------


def test_inputs_drawn_in_place():
    inputs = make_inputs(TINY_DRAWN, torch.float32, CPU, 0, None)
    again = make_inputs(TINY_DRAWN, torch.float32, CPU, 0, None)
    torch.testing.assert_close(inputs.weight, again.weight, rtol=0, atol=0)
    redraw(again, 1)
    assert not torch.equal(inputs.hidden, again.hidden)
    assert float(again.hidden.std()) == pytest.approx(1, rel=0.05)
    assert float(again.weight.std()) == pytest.approx(TINY_DRAWN.hidden**-0.5, rel=0.05)
    assert 0 <= int(again.target.min()) < 30
    assert 270 < int(again.target.max()) < TINY_DRAWN.vocabulary


def test_drawn_on_the_host_as_ever():
    """Results in the repository were measured on these numbers."""
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(TINY.tokens, TINY.hidden, generator=generator)
    inputs = make_inputs(TINY, torch.float32, CPU, 5, None)
    torch.testing.assert_close(inputs.hidden, hidden, rtol=0, atol=0)


@pytest.mark.usefixtures("tiny_cases")
def test_trained_head_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="--trained-head"):
        run.run_bench(config(tmp_path, cases=("tiny-trained",)), "", Console(quiet=True))


def test_grown_head(tmp_path):
    """Entries that a head has not got are those it has, at half their length; too few hidden states are repeated."""
    hidden, weight, path = torch.randn(10, 16), torch.randn(120, 16), tmp_path / "head.pt"
    torch.save({"hidden": hidden, "labels": torch.arange(10), "weight": weight}, path)
    inputs = make_inputs(TINY_TRAINED, torch.float32, CPU, 0, path)
    logits = inputs.hidden @ inputs.weight.T
    expected = hidden @ weight.T
    assert logits.shape == (24, 301)
    torch.testing.assert_close(logits[10:20, :120], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits[:4, 240:], expected[:4, :61] / 2, atol=1e-4, rtol=1e-4)
    assert inputs.target.tolist() == [*range(10), *range(10), *range(4)]


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
    torch.testing.assert_close(dequantize_q8(packed), values.float() * scale.float())


# --- the command line -------------------------------------------------------------------------------------------------


def test_peers_say_what_they_lack(monkeypatch):
    assert PEERS[BASELINE].lacks(CPU) is PEERS["logitless exact fastest"].lacks(CPU) is None
    monkeypatch.setattr(peers, "find_spec", lambda _: None)
    assert PEERS["quack"].lacks(CPU) == "needs quack-kernels, nvidia-cutlass-dsl, triton, a CUDA device"
    monkeypatch.setattr(peers, "find_spec", lambda _: "there")
    assert PEERS["cce"].lacks(CPU) == "needs a CUDA device"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert PEERS["cce"].lacks(torch.device("cuda")) is None
    assert PEERS["liger cute"].lacks(torch.device("cuda")) == "needs compute capability 9.0"
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    assert "needs torch 2.13" in PEERS["torch chunked"].lacks(CPU)


def test_list(capsys):
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*PEERS, *CASES))
    assert "a CUDA device" in printed


@pytest.fixture
def nothing_is_measured(monkeypatch, tmp_path):
    """Measuring fails the test; in a folder with a file, a folder, and heads that are none."""

    def fail(*_, **__):
        pytest.fail("measured before everything was checked")

    monkeypatch.setattr("logitless.bench.run._measure", fail)
    monkeypatch.setattr("logitless.bench.tune._kernels", fail)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "taken.png").mkdir()
    (tmp_path / "file").write_text("[]")
    hidden, labels = torch.ones(3, 64), torch.tensor([0, 1, 2])
    torch.save({"hidden": hidden}, "partial.pt")
    torch.save({"hidden": hidden, "labels": labels, "weight": torch.ones(2, 64)}, "labels.pt")
    torch.save({"hidden": hidden, "labels": labels, "weight": torch.ones(9, 32)}, "widths.pt")
    torch.save({"hidden": hidden, "labels": labels, "q8": torch.ones(9, 32)}, "q8.pt")
    torch.save({"hidden": hidden, "labels": labels, "weight": "none"}, "text.pt")
    torch.save({"hidden": torch.ones(3, 1024), "labels": labels, "weight": torch.ones(9, 1024)}, "wide.pt")


TRAINED = ["bench", "--cases", "smollm2"]
PLAN = ["plan", "--tokens", "4096", "--hidden", "1024", "--vocabulary", "50304"]


@pytest.mark.usefixtures("nothing_is_measured")
@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["bench", "--cases", "nonesuch"], ["--cases", "nonesuch", "gpt2"]),
        (["bench", "--peers", "nobody"], ["--peers", "nobody", "two-stage"]),
        (["bench", "--workspace", "much"], ["--workspace", "much"]),
        (["bench", "--workspace", "1KiB"], ["--workspace", "1.0 KiB", "at least", "gpt2", "float32"]),
        (["bench", "--workspace", "9" * 30], ["--workspace", "2**63"]),
        (["bench", "--device", "foo"], ["--device", "foo"]),
        (["bench", "--device", "meta"], ["--device", "meta", "cpu or cuda"]),
        (["bench", "--device", "cuda"], ["--device cuda", "--device cpu"]),
        (["bench", "--device", "cuda:7", "--list"], ["--device cuda:7", "--device cpu"]),
        (["bench", "--device", "foo", "--list"], ["--device", "foo"]),
        (["bench", "--rounds", "0"], ["--rounds", "at least 1"]),
        (["bench", "--rounds", "-3"], ["--rounds", "-3"]),
        (["bench", "--threads", "0"], ["--threads", "at least 1"]),
        (["bench", "--threads", "1000000"], ["--threads", "at most"]),
        (["bench", "--seed", "-1"], ["--seed", "-1"]),
        (["bench", "--seed", str(2**64)], ["--seed", "at most"]),
        (["bench", "--slowest", "0"], ["--slowest", "0"]),
        (["bench", "--slowest", "nan"], ["--slowest", "nan"]),
        (["bench", "--output", "folder"], ["--output", "folder"]),
        (["bench", "--output", "file/results.json"], ["--output", "file", "not a directory"]),
        (["bench", "--output", "x" * 300], ["--output", "name too long"]),
        (["bench", "--output", "taken.json"], ["--output", "taken.png"]),
        (["bench", "--output", "results.png"], ["--output", ".png"]),
        (["bench", "--trained-head", "nope.pt"], ["--trained-head", "nope.pt"]),
        (TRAINED, ["--cases smollm2", "--trained-head"]),
        ([*TRAINED, "--trained-head", "nope.pt"], ["--trained-head", "nope.pt"]),
        ([*TRAINED, "--trained-head", "folder"], ["--trained-head", "folder"]),
        ([*TRAINED, "--trained-head", "file"], ["--trained-head", "file", "torch.save"]),
        ([*TRAINED, "--trained-head", "partial.pt"], ["--trained-head", "'labels'"]),
        ([*TRAINED, "--trained-head", "labels.pt"], ["--trained-head", "labels", "[0, 2)"]),
        ([*TRAINED, "--trained-head", "widths.pt"], ["--trained-head", "[3, 64]", "[9, 32]"]),
        ([*TRAINED, "--trained-head", "q8.pt"], ["--trained-head", "uint8", "float32"]),
        ([*TRAINED, "--trained-head", "text.pt"], ["--trained-head", "tensors"]),
        ([*TRAINED, "--trained-head", "wide.pt"], ["--trained-head", "D=1024", "D=768"]),
        ([*PLAN, "--device", "tpu"], ["--device", "tpu"]),
        ([*PLAN, "--dtype", "int8"], ["--dtype", "int8"]),
        ([*PLAN, "--workspace", "1KiB"], ["--workspace", "at least", "MiB"]),
        ([*PLAN, "--workspace", "9" * 400], ["--workspace", "digits"]),
        ([*PLAN, "--hidden", "0"], ["--hidden", "at least 1"]),
        ([*PLAN, "--tokens", "-1"], ["--tokens", "-1"]),
        ([*PLAN, "--vocabulary", str(2**64)], ["--vocabulary", "64 bits"]),
        (["tune"], ["CUDA"]),
        (["tune", "--rounds", "0"], ["--rounds", "at least 1"]),
        (["tune", "--vocabulary", "0"], ["--vocabulary", "at least 1"]),
        (["tune", "--dtype", "int8"], ["--dtype", "int8"]),
        (["tune", "--output", "folder"], ["--output", "folder"]),
        (["tune", "--output", "file"], ["--output", "no table"]),
        (["tune", "--output", "partial.pt"], ["--output", "cannot be read"]),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_everything_is_checked_before_anything_is_measured(words, fragments, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"logitless {words[0]}: error: ")
    assert len(error.splitlines()) == 1
    assert not [fragment for fragment in fragments if fragment not in error], error


@pytest.mark.parametrize("subcommand", ["bench", "tune"])
def test_missing_extra(subcommand, capsys, monkeypatch):
    """The message names what to install."""
    monkeypatch.setattr("logitless.cli.find_spec", lambda name: None if name == "rich" else name)
    assert main([subcommand]) == 2
    assert "needs rich: pip install 'logitless[bench]'" in capsys.readouterr().err


def test_help_needs_no_extra():
    """Nor does it load one."""
    code = (
        "import sys, logitless.cli\n"
        "try: logitless.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'rich', 'matplotlib', 'psutil', 'numpy'} & set(sys.modules)))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "plan" in output
    assert output.splitlines()[-1] in ("[]", "['numpy']")  # numpy comes with torch, where it is installed


def test_plan_on_the_command_line(capsys):
    assert main(PLAN) == 0
    assert "workspace" in capsys.readouterr().out
    for words in (["--dtype", "bf16"], ["--dtype", "fp64"], ["--workspace", "1G"], ["--workspace", "1073741824"]):
        assert main([*PLAN, "--device", "cpu", *words]) == 0
    assert "of 1.0 GiB allowed" in capsys.readouterr().out


@pytest.mark.parametrize(("there", "expected"), [(True, "cuda"), (False, "cpu")])
def test_plan_on_the_device_that_is_there(monkeypatch, capsys, there, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert main(PLAN) == 0
    assert f" on {expected} by " in capsys.readouterr().out


@pytest.mark.usefixtures("tiny_cases")
def test_short_names_of_dtypes(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "print_case", lambda *_: None)
    output = tmp_path / "short.json"
    words = ["bench", "--cases", "tiny", "--dtypes", "fp32", "bf16", "--peers", "logitless exact", "--rounds", "1"]
    assert main([*words, "--threads", "1", "--device", "cpu", "--output", str(output)]) == 0
    assert [result["dtype"] for result in json.loads(output.read_text())["results"]] == ["float32", "bfloat16"]


@pytest.mark.usefixtures("tiny_cases")
def test_trained_head_that_no_case_reads_is_mentioned(tmp_path):
    """It is there, so that it harms nobody."""
    path, printed = tmp_path / "head.pt", io.StringIO()
    path.write_bytes(b"")
    settings = config(tmp_path, dtypes=("float32",), peers=(), trained_head=path, output=None)
    assert run.run_bench(settings, "", Console(file=printed)) == 0
    assert "--trained-head: not used" in printed.getvalue()
