"""Measure memory and time of a training step by running it, in a separate process.

    python -m e3va_cli.memory.measure        # reads requests from stdin, writes results to stdout, one JSON per line

On CUDA the peak is the allocator's. One process measures several steps in turn; where a step leaves memory allocated,
the next one runs in a new process. On a CPU the tracker follows the tensors of one step, as in an estimate, and the
times are those of further steps without the tracker.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Self

import torch

from e3va_cli.config.run_config import RunConfig, from_dict
from e3va_cli.memory.rois import add_matching_proposals, count_rois
from e3va_cli.memory.step import StepSize, init_optimizer_state, random_batch, train_step
from e3va_cli.memory.torch_private import clear_cublas_workspaces
from e3va_cli.memory.trace import trace_step
from e3va_cli.models.model import build_random_model, parameter_counts
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.utils.environment import MIB, device_name, is_out_of_memory, synchronize

OUT_OF_MEMORY = "out of memory"
BUSY_MIB = 1200  # in use on a GPU at the start: more than one CUDA context, so other processes use it


@dataclasses.dataclass(frozen=True)
class Request:
    """A step to measure.

    Attributes:
        config: of a run; `backbone`, `adapter`, `head` and `optimizer` are used.
        size: of the step.
        device: cpu or cuda.
        warmup, repeats: untimed and timed steps.
        memory_limit_mib: limit of the CUDA allocator.
    """

    config: RunConfig
    size: StepSize
    num_classes: int
    device: str
    warmup: int
    repeats: int
    memory_limit_mib: float | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Memory and times of a step; `None` where the device does not report it or memory ran out.

    Attributes:
        step_times_s: of each timed step, in seconds.
        outside_allocator_mib: used on the GPU outside PyTorch's allocator: CUDA context, loaded kernels and other
            processes.
        by_category_mib: breakdown of the peak, on a CPU.
        rois: number of pooled RoIs, by pooling layer.
        error: reason of a failure.
    """

    device_name: str
    parameters: dict[str, int | float]
    peak_mib: float | None = None
    peak_reserved_mib: float | None = None
    outside_allocator_mib: float | None = None
    by_category_mib: dict[str, float] | None = None
    peak_at: str = ""
    step_times_s: list[float] = dataclasses.field(default_factory=list)
    rois: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def step_time_s(self) -> float | None:
        """Return the median."""
        return statistics.median(self.step_times_s) if self.step_times_s else None

    @property
    def interquartile_range_s(self) -> float | None:
        """Return the distance of the first and the third quartile."""
        if len(self.step_times_s) < 2:
            return None
        first, _, third = statistics.quantiles(self.step_times_s, n=4, method="inclusive")
        return third - first


class MeasuringProcess:
    """A process that measures requests in turn, within a `with` block.

    A new process replaces it if it ended, or if a measurement left memory allocated on the GPU.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._errors = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._errors.close()

    def measure(self, request: Request) -> Measurement:
        """Measure one step; after a failure, return a `Measurement` with its `error`."""
        if self._process is None:
            self._errors.seek(0)
            self._errors.truncate()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "e3va_cli.memory.measure"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(dataclasses.asdict(request)), file=process.stdin, flush=True)
        line = process.stdout.readline()
        if not line:
            return Measurement(request.device, parameters={}, error=self._end())
        content = json.loads(line)
        if not content.pop("clean"):
            self._end()
        return Measurement(**content)

    def _end(self) -> str:
        """End the process; return the reason if it ended by itself."""
        if self._process is None:
            return ""
        self._process.communicate()  # closes its input, which ends it
        code, self._process = self._process.returncode, None
        if code in (-9, 137):
            return OUT_OF_MEMORY
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [""]
        return f"exit code {code}: {lines[-1]}"


def measure_in_process(request: Request) -> Measurement:
    """Measure in this process."""
    device = torch.device(request.device)
    torch.manual_seed(0)
    with device:  # building a large model is much faster on a GPU
        model = build_random_model(request.config, num_classes=request.num_classes).to(device).train()
    optimizer = build_optimizer(model, request.config.optimizer)
    batch = random_batch(
        request.size, num_classes=request.num_classes, target_types=model.head.target_types, device=request.device
    )
    common: dict[str, Any] = {
        "device_name": device_name(device),
        "parameters": parameter_counts(model),
    }
    fp16 = device.type == "cuda" and request.size.precision == "16-mixed"
    scaler = torch.amp.GradScaler(device.type) if fp16 else None

    def step() -> None:
        train_step(model, optimizer, batch, request.size, device=device.type, scaler=scaler)

    with add_matching_proposals(model):
        if device.type == "cpu":
            trace = trace_step(model, optimizer, batch, request.size)
            peak = trace.peak
            common |= {
                "peak_mib": peak.total_bytes / MIB,
                "by_category_mib": {kind: nbytes / MIB for kind, nbytes in peak.by_category.items()},
                "peak_at": peak.location,
                "rois": trace.rois,
            }
            return Measurement(**common, step_times_s=time_steps(step, request, device))
        with count_rois(model) as rois:
            init_optimizer_state(optimizer, accumulates=request.size.accumulates)
            for _ in range(request.warmup):
                step()
            torch.cuda.reset_peak_memory_stats(device)
            times = time_steps(step, dataclasses.replace(request, warmup=0), device)
    return Measurement(
        **common,
        peak_mib=torch.cuda.max_memory_allocated(device) / MIB,
        peak_reserved_mib=torch.cuda.max_memory_reserved(device) / MIB,
        outside_allocator_mib=outside_allocator_mib(),
        step_times_s=times,
        rois=rois,
    )


def time_steps(step: Callable[[], None], request: Request, device: torch.device) -> list[float]:
    """Return the seconds of each of `repeats` steps, after `warmup` steps."""
    times = []
    for index in range(request.warmup + request.repeats):
        synchronize(device)
        started = time.perf_counter()
        step()
        synchronize(device)
        if index >= request.warmup:
            times.append(time.perf_counter() - started)
    return times


def outside_allocator_mib() -> float:
    """Return the memory in use on the GPU outside PyTorch's allocator, in MiB."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / MIB


def prepare_gpu(request: Request) -> list[str]:
    """Set the allocator's limit; return a warning if other processes use the GPU."""
    _, total = torch.cuda.mem_get_info()
    limit = total if request.memory_limit_mib is None else request.memory_limit_mib * MIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    used = outside_allocator_mib()
    if used <= BUSY_MIB:
        return []
    return [f"{used:.0f} MiB of the GPU are in use by other processes; times and limits are less reliable"]


def measure_request(request: Request) -> Measurement:
    """Measure in this process; return out of memory as a `Measurement` with its `error`."""
    warnings = prepare_gpu(request) if request.device == "cuda" else []
    try:
        measurement = measure_in_process(request)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        measurement = Measurement(device_name(torch.device(request.device)), parameters={}, error=OUT_OF_MEMORY)
    return dataclasses.replace(measurement, warnings=[*measurement.warnings, *warnings])


def free_memory() -> bool:
    """Free unused memory; return whether the GPU has none allocated, so that its peak can be reset."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return True
    clear_cublas_workspaces()  # they count as allocated; the next matrix product allocates them again
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() == 0


def main() -> None:
    """Measure the request of each line of standard input; write its result as a line of standard output."""
    output = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries may print
    for line in sys.stdin:
        content = json.loads(line)
        size = content.pop("size")
        size = StepSize(**{**size, "image_size": tuple(size["image_size"])})
        config = from_dict(content.pop("config"))
        measurement = dataclasses.asdict(measure_request(Request(**content, config=config, size=size)))
        print(json.dumps({**measurement, "clean": free_memory()}), file=output, flush=True)


if __name__ == "__main__":
    main()
