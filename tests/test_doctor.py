"""`logitless doctor`: what it says of a machine without a GPU, and of ones with GPUs that are not here."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import logitless
from logitless.cli import main
from logitless.doctor import DISTRIBUTIONS, report

ARCHITECTURES = {(8, 0): "sm80", (8, 9): "sm80", (9, 0): "sm90", (10, 0): "sm100", (12, 0): "sm80"}


@pytest.fixture
def tiles(monkeypatch):
    """The kernels' tiles, with nothing remembered of other devices or tables."""
    module = pytest.importorskip("logitless.backends.triton.tiles")
    cached = (module.architecture, module.has_fp8_mma, module.num_sms, module.tuned, module.tile)
    monkeypatch.setattr(module, "interpreted", lambda: False)
    for function in cached:
        function.cache_clear()
    yield module
    for function in cached:
        function.cache_clear()


@pytest.fixture
def gpu(monkeypatch, tiles):
    """A CUDA device of any compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        properties = SimpleNamespace(name="GPU", total_memory=80 * 2**30, multi_processor_count=100)
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_capability": lambda index=None: capability,
            "get_device_properties": lambda index: properties,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    return pretend


def rows(text: str) -> dict[str, list[str]]:
    """Backends by dtype, with the marks of notes."""
    lines = [line.split("  ") for line in text.splitlines() if line[:3] == "  b" or line[:3] == "  f"]
    return {words[1]: [word.strip() for word in words[2:] if word.strip()] for words in lines}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert logitless.__version__ in text
    assert all(name in text for name in DISTRIBUTIONS)
    assert "no CUDA device that PyTorch sees" in text
    assert rows(text) == {dtype: ["torch", "torch", "torch [1]"] for dtype in ("bf16", "fp16", "fp32", "fp64")}
    assert len(text.splitlines()) < 24
    assert max(map(len, text.splitlines())) <= 132


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_with_a_gpu(capability, gpu):
    gpu(capability)
    text = report()
    measured = "tiles measured" if capability == (9, 0) else "tiles not measured: run `logitless tune`"
    assert f"cuda:0  GPU, 80.0 GiB, {ARCHITECTURES[capability]}, {measured}" in text
    fp8 = "triton" if capability >= (8, 9) else "none [1]"
    assert rows(text)["bf16"] == ["triton", "triton", fp8]
    assert rows(text)["fp64"][:2] == ["torch [1]" if fp8 == "triton" else "torch [2]"] * 2
    assert "it computes in bf16, fp16 and fp32, not in float64" in text


def test_amd(gpu, monkeypatch):
    """Their compute capability is no NVIDIA GPU's."""
    gpu((9, 4))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    text = report()
    assert rows(text)["bf16"][:2] == ["torch [1]", "torch [1]"]
    assert "PyTorch is built for AMD's" in text


def test_tuned_table(gpu, tiles, tmp_path, monkeypatch, capsys):
    gpu((8, 0))
    table = tmp_path / "tiles.json"
    monkeypatch.setenv(tiles.TUNED_FILE, str(table))
    table.write_text(json.dumps({"sm80": {}}))
    assert f"sm80, tiles tuned here ({tiles.TUNED_FILE})" in report()
    for content, message in (('{"hopper": {}}', "must name architectures among interpreter, sm100"), ("x", "no JSON")):
        tiles.tuned.cache_clear()
        table.write_text(content)
        assert main(["doctor"]) == 2
        assert message in capsys.readouterr().err
    table.unlink()
    assert main(["doctor"]) == 2
    assert "No such file" in capsys.readouterr().err
