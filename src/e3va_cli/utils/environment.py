"""The machine and the packages that a result comes from: their names, and what concerns its memory and its clock."""

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
CPU_ALLOCATOR = ("can't allocate memory", "not enough memory")  # what PyTorch's says, in an error of no type of its own


def process_peak_rss_mib() -> float:
    """Most physical memory that this process ever held, in MiB (2^20 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak / (MIB if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU or of this machine did not suffice."""
    of_cpu = isinstance(error, RuntimeError) and any(words in str(error) for words in CPU_ALLOCATOR)
    return of_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


def package_versions() -> dict[str, str]:
    """Of Python and the packages that results depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()} ({torch.get_num_threads()} threads)"


def processor_name() -> str:
    """The model where Linux tells it, else what Python knows: at least the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(filter(None, models), platform.processor() or platform.machine())


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given, so that a clock tells its time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DeviceEvent:
    """A moment in the work of a device, taken without waiting for it: on a GPU, when it gets there."""

    def __init__(self, device: torch.device) -> None:
        self.event: torch.cuda.Event | None = None
        self.at = 0.0
        if device.type == "cuda":
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.at = time.perf_counter()

    @property
    def is_past(self) -> bool:
        """Whether the device has got there, so that its time can be read without waiting."""
        return self.event is None or bool(self.event.query())

    def wait(self) -> None:
        """Wait until the device has got there."""
        if self.event is not None:
            self.event.synchronize()

    def seconds_since(self, earlier: DeviceEvent) -> float:
        """Return the seconds since an earlier moment of the same device, which must be past."""
        if self.event is None or earlier.event is None:
            return self.at - earlier.at
        self.wait()
        return float(earlier.event.elapsed_time(self.event)) / 1000
