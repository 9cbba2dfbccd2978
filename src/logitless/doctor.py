"""What this machine has, and which backend would serve what on it: ``logitless doctor``."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Collection

import torch

import logitless
from logitless.errors import InputError
from logitless.options import Sampled

DISTRIBUTIONS = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "megatron-core")
DTYPES = ("bf16", "fp16", "fp32", "fp64")
GRADIENTS = {"exact": "exact", "sampled": Sampled(), "sampled, fp8 scan": Sampled(scan="fp8")}
# Of Llama 3's head; of the sizes, only D bears on what is refused.
plan = functools.partial(logitless.plan, tokens=8192, hidden=4096, vocabulary=128256)


def report() -> str:
    """One screen of text: versions, devices, and by dtype and gradient the backend that serves a call."""
    return "\n\n".join("\n".join(part) for part in (_versions(), _devices(), _backends()))


def _versions() -> list[str]:
    lines = [f"logitless {logitless.__version__}, Python {platform.python_version()}, {platform.platform()}"]
    found = [f"{name} {version}" for name in DISTRIBUTIONS if (version := _version(name)) is not None]
    missing = [name for name in DISTRIBUTIONS if _version(name) is None]
    lines.append(", ".join(found))
    if missing:
        lines.append(f"not installed: {', '.join(missing)}")
    return lines


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    built = "CPUs"
    if torch.version.cuda or torch.version.hip:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    if not torch.cuda.is_available():
        return [f"no CUDA device that PyTorch sees; it is built for {built}"]
    lines = [f"PyTorch is built for {built}"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        described = f"cuda:{index}  {properties.name}, {properties.total_memory / 2**30:.1f} GiB"
        lines.append(described + (f", {_tiles(index)}" if _version("triton") is not None else ""))
    return lines


def _tiles(index: int) -> str:
    """Architecture, and where the tiles for it come from."""
    from logitless.backends.triton import tiles  # without Triton there is none

    name = tiles.architecture(index)
    if name in _tuned():
        return f"{name}, tiles tuned here ({tiles.TUNED_FILE})"
    return f"{name}, tiles measured" if tiles.measured(index) else f"{name}, tiles not measured: run `logitless tune`"


def _tuned() -> Collection[str]:
    """Architectures that the user's table of tiles knows."""
    from logitless.backends.triton import tiles

    try:
        return tiles.tuned()
    except OSError as error:
        raise InputError(f"{tiles.TUNED_FILE}: {error}") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def _backends() -> list[str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width = max(map(len, GRADIENTS)) + 2
    reasons: dict[str, str] = {}
    rows = []
    for dtype in DTYPES:
        cells = []
        for gradient in GRADIENTS.values():
            backend, reason = _served(dtype, device, gradient)
            mark = ""
            if reason is not None:
                mark = " " + reasons.setdefault(reason, f"[{len(reasons) + 1}]")
            cells.append(f"{backend}{mark}".ljust(width))
        rows.append(f"  {dtype}  {''.join(cells)}".rstrip())
    head = f"        {''.join(name.ljust(width) for name in GRADIENTS)}".rstrip()
    notes = [f"{mark} {reason}" for reason, mark in reasons.items()]
    return [f"on {device}, by dtype of hidden states and head, the backend that serves", head, *rows, *notes]


def _served(dtype: str, device: str, gradient: str | Sampled) -> tuple[str, str | None]:
    """The backend that serves a call, and why it is not triton where that is to be said."""
    try:
        backend = plan(dtype=dtype, device=device, gradient=gradient).backend
    except ValueError as error:
        return "none", str(error)
    if backend == "triton":
        return backend, None
    if device == "cpu":
        emulated = isinstance(gradient, Sampled) and gradient.scan == "fp8"
        return backend, "rounds as the kernels do and multiplies in fp32: saves no time on a CPU" if emulated else None
    try:
        plan(dtype=dtype, device=device, gradient=gradient, backend="triton")
    except (ImportError, ValueError) as error:
        return backend, str(error)
    return backend, None
