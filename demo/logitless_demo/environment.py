"""What a number was measured on."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

import logitless
from logitless_demo.memory import format_bytes

PACKAGES = ("torch", "numpy", "mistral-common", "matplotlib", "rich", "psutil")


def describe_hardware(device: str) -> dict[str, str]:
    """Returns the parts of this machine that bear on speed and memory, for people to read."""
    cores = psutil.cpu_count(logical=False)
    hardware = {
        "processor": f"{_processor()}, {cores} cores, {os.cpu_count()} threads, {torch.get_num_threads()} used",
        "memory": format_bytes(psutil.virtual_memory().total),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        hardware["GPU"] = f"{properties.name}, {format_bytes(properties.total_memory)}"
    return hardware


def describe_software() -> dict[str, str]:
    """Returns the versions of what was run."""
    packages = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "logitless": logitless.__version__,
        "Python": platform.python_version(),
        **packages,
        "system": f"{platform.system()} {platform.machine()}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
