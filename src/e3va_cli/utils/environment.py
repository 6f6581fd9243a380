"""The machine and the packages that a result was computed with: names and versions, memory, and time."""

from __future__ import annotations

import platform
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

MIB = 2**20
PACKAGES = ("e3va-cli", "torch", "torchvision", "timm", "lightning", "hydra-core")
CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")  # in RuntimeErrors of PyTorch's allocator


def process_peak_rss_mib() -> float:
    """Return the peak resident memory of this process in MiB (2^20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (MIB if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU or this machine is out of memory."""
    on_cpu = isinstance(error, RuntimeError) and any(text in str(error) for text in CPU_ALLOCATOR)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on, by name."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or that of the processor with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({torch.get_num_threads()} threads)"


def processor_name() -> str:
    """Return the model of the processor on Linux, else what Python knows: at least the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, models), platform.processor() or platform.machine())


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DeviceEvent:
    """A point in time of a device, recorded without synchronization: a CUDA event, or the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.event: torch.cuda.Event | None = None
        self.at = 0.0
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.at = time.perf_counter()

    def query(self) -> bool:
        """Return whether the device has passed the event, so that its time can be read without synchronization."""
        return self.event is None or bool(self.event.query())

    def synchronize(self) -> None:
        """Wait until the device has passed the event."""
        if self.event is not None:
            self.event.synchronize()

    def seconds_since(self, earlier: DeviceEvent) -> float:
        """Return the seconds since an earlier event of the same device, after synchronization."""
        if self.event is None or earlier.event is None:
            return self.at - earlier.at
        self.synchronize()
        return float(earlier.event.elapsed_time(self.event)) / 1000
