"""``logitless-demo train`` over several processes: the losses of one, checkpoints that another number goes on from."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

pytest.importorskip("rich")
pytest.importorskip("psutil")

import psutil

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo")

SCRIPT = Path(__file__).with_name("training.py")
# Seconds for a run of seconds, so that a loaded machine has the time; a collective gives up after half an hour.
LIMIT = 600


def command(
    text: Path, folder: Path, task: str, data: int, tensor: int, head: str = "exact", device: str = "cpu"
) -> list[str]:
    count = data * tensor
    started = [sys.executable]
    if count > 1:
        started += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*started, str(SCRIPT), str(text), str(folder), task, str(data), str(tensor), head, device]


def train(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs to the end, which comes within the limit."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*arguments, **options), env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_curve(folder: Path, alone: Path) -> None:
    """Losses and norms of every step, up to fp32's order of additions, which training makes a little larger."""
    ours, theirs = log_of(folder), log_of(alone)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == list(range(1, 7))
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("loss", "gradient_norm", "held_out_loss"):
            assert mine[name] == (None if other[name] is None else pytest.approx(other[name], rel=2e-5)), name


def write_text(path: Path) -> Path:
    path.write_text("\n\n".join(f"Sentence {n} of {n * n} says {n % 7} and {n % 11}." for n in range(400)))
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def alone(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = train(text, folder, "new", 1, 1)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(("data", "tensor"), [(2, 2), (2, 1), (1, 2)])
def test_curve_of_one_process(text, alone, tmp_path, data, tensor):
    done = train(text, tmp_path / "run", "new", data, tensor)
    assert done.returncode == 0, done.stderr
    assert_same_curve(tmp_path / "run", alone)
    assert done.stdout.count("all 6 steps done") == 1


def test_what_cannot_be_read(text, tmp_path):
    """One error from each process, whose threads end as they do after a run to the end: ``training.py`` looks."""
    folder = tmp_path / "run"
    assert train(text, folder, "new", 2, 1).returncode == 0
    for part in (folder / "checkpoint-6").glob("*.distcp"):
        part.write_bytes(b"")
    done = train(text, folder, "resume", 2, 1)
    assert done.returncode != 0
    assert "checkpoint-6 is not a checkpoint that can be read" in done.stderr
    assert "left after the run" not in done.stderr


def test_sampled_in_shards(text, tmp_path):
    """Each part of the data, and each shard, is sampled by itself; the loss stays exact."""
    done = train(text, tmp_path / "run", "new", 2, 2, "sampled")
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / "run")[-1]["loss"] < log_of(tmp_path / "run")[0]["loss"]


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 1)])
def test_a_killed_process_ends_the_run_and_another_number_goes_on(text, alone, tmp_path, data, tensor):
    """Long before a collective gives up, with a message; the last checkpoint is whole, and fewer processes go on."""
    folder = tmp_path / "run"
    done = train(text, folder, "killed", 2, 2)
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    processes = [int(number) for number in re.findall(r"^process (\d+)$", done.stderr, re.MULTILINE)]
    assert len(processes) == 4
    assert not running(processes)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    done = train(text, folder, "resume", data, tensor)
    assert done.returncode == 0, done.stderr
    assert_same_curve(folder, alone)


def running(numbers: list[int]) -> list[int]:
    """The processes that have not ended."""

    def runs(number: int) -> bool:
        try:
            return psutil.Process(number).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [number for number in numbers if runs(number)]


def test_what_cannot_be_divided(text, tmp_path):
    """Another number of processes than asked for; a batch or heads that do not divide: a line each, and no folder."""
    assert "need 4 processes, and there are 1" in one_process(text, tmp_path, 2, 2).stderr
    assert "--batch must be a multiple of --dp, got 4 and 3" in one_process(text, tmp_path, 3, 1).stderr
    assert "--heads must be a multiple of --tp, got 4 and 3" in one_process(text, tmp_path, 1, 3).stderr
    assert "--tp 2 needs --head exact or sampled" in one_process(text, tmp_path, 1, 2, "two-stage").stderr
    assert not (tmp_path / "run").exists()


def one_process(text: Path, folder: Path, data: int, tensor: int, head: str = "exact") -> subprocess.CompletedProcess:
    words = [sys.executable, str(SCRIPT), str(text), str(folder / "run"), "new", str(data), str(tensor), head, "cpu"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done
