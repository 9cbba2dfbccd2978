"""Peak memory of a stretch of code: of the process on a CPU, of the allocator on a GPU."""

from __future__ import annotations

import threading

import psutil
import torch

# A large tensor is written at a few GB/s, so it lives for tens of milliseconds; a reading takes about 20 microseconds.
SAMPLING_SECONDS = 0.002


class ResidentMemory:
    """Resident memory of this process, read by a thread every two milliseconds."""

    what = "resident memory of the process, read every 2 ms"

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def __enter__(self) -> ResidentMemory:
        """Starts the thread."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread."""
        self._stopped.set()
        self._thread.join()

    def level(self) -> int:
        """Returns the bytes in use now."""
        return self._process.memory_info().rss

    def reset(self) -> None:
        """Begins a stretch."""
        with self._lock:
            self._peak = self.level()

    def peak(self) -> int:
        """Returns the most bytes in use since `reset`."""
        with self._lock:
            self._peak = max(self._peak, self.level())
            return self._peak

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLING_SECONDS):
            self.peak()


class DeviceMemory:
    """Bytes that PyTorch's allocator has handed out on the current CUDA device; exact."""

    what = "bytes handed out by PyTorch's CUDA allocator"

    def __enter__(self) -> DeviceMemory:
        """Nothing to start: the allocator counts by itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to end."""

    def level(self) -> int:
        """Returns the bytes in use now."""
        return torch.cuda.memory_allocated()

    def reset(self) -> None:
        """Begins a stretch."""
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Returns the most bytes in use since `reset`."""
        return torch.cuda.max_memory_allocated()


MemoryMeter = ResidentMemory | DeviceMemory


def memory_meter(device: str) -> MemoryMeter:
    """Returns the meter for `device`, `"cpu"` or `"cuda"`."""
    return DeviceMemory() if device == "cuda" else ResidentMemory()


def format_bytes(count: float) -> str:
    """Writes bytes for people, in MiB or GiB."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 2**30 else f"{count / 2**20:.0f} MiB"
