"""What a benchmark was measured on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch

import logitless
from logitless.bench.peers import DISTRIBUTIONS
from logitless.demo.environment import PACKAGES, describe_hardware


def hardware(device: torch.device) -> dict[str, str]:
    """The parts of this machine that bear on speed and memory; of a GPU its driver too."""
    described = describe_hardware(device.type)
    if device.type != "cuda":
        return described
    major, minor = torch.cuda.get_device_capability(device)
    return {
        **described,
        "GPU name": torch.cuda.get_device_name(device),
        "compute capability": f"{major}.{minor}",
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
