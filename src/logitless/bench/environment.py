"""What a benchmark was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

import logitless
from logitless.bench.peers import DISTRIBUTIONS

PACKAGES = ("torch", "numpy", "matplotlib", "rich", "psutil")


def hardware(device: torch.device) -> dict[str, str]:
    """The parts of this machine that bear on speed and memory; of a GPU its driver too."""
    cores = psutil.cpu_count(logical=False)
    described = {
        "processor": f"{_processor()}, {cores} cores, {os.cpu_count()} threads, {torch.get_num_threads()} used",
        "memory": _gibibytes(psutil.virtual_memory().total),
    }
    if device.type != "cuda":
        return described
    properties = torch.cuda.get_device_properties(device)
    return {
        **described,
        "GPU": f"{properties.name}, {_gibibytes(properties.total_memory)}",
        "GPU name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
    }


def software() -> dict[str, str]:
    """Versions of what was run, of the peers' packages too where they are installed."""
    installed = {name: _version(name) for name in dict.fromkeys((*PACKAGES, *DISTRIBUTIONS.values()))}
    return {
        "logitless": logitless.__version__,
        "Python": platform.python_version(),
        **{name: found for name, found in installed.items() if found is not None},
        "system": f"{platform.system()} {platform.machine()}",
    }


def _gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.split("\n", 1)[0].strip()
