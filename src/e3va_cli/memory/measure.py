"""Measure the memory and the time of a training step by running it, in a separate process.

    python -m e3va_cli.memory.measure        # requests on stdin, answers on stdout, a line of JSON each

On CUDA the peak is the allocator's. One process measures several steps one after another: each ends with an empty
allocator, or the next one gets a new process. On a CPU the tensors of one step are followed op by op, as in a plan; the
times are those of other steps, which nothing watches.
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
from tempfile import TemporaryFile
from types import TracebackType
from typing import Any, Self

import torch

from e3va_cli.config.run_config import RunConfig, from_dict
from e3va_cli.memory.regions import counted_regions, matching_proposals
from e3va_cli.memory.step import StepSize, init_optimizer_state, make_batch, train_step
from e3va_cli.memory.trace import trace_step
from e3va_cli.models.model import build_random_model, parameter_counts
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.utils.environment import MIB, device_name, is_out_of_memory, synchronize

OUT_OF_MEMORY = "out of memory"
BUSY_MIB = 1200  # in use on a GPU before we start: more than this process's own CUDA context


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        config: of the run; of it `backbone`, `adapter`, `head` and `optimizer`.
        size: of the step.
        device: cpu or cuda.
        warmup, repeats: steps that are not timed, and that are.
        memory_limit_mib: no more of a GPU than this may be used.
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
    """What was measured; `None` where the device does not tell, or where there was not enough memory.

    Attributes:
        step_times_s: of each timed step, in seconds.
        outside_allocator_mib: in use on the GPU beside what PyTorch's allocator reserved: the CUDA context and loaded
            kernels, and other programs.
        by_kind_mib: what held the memory at the peak, on a CPU.
        regions: cut out of the feature maps in a step, by pooling layer.
        error: why nothing was measured.
    """

    device_name: str
    parameters: dict[str, int | float]
    peak_mib: float | None = None
    peak_reserved_mib: float | None = None
    outside_allocator_mib: float | None = None
    by_kind_mib: dict[str, float] | None = None
    peak_at: str = ""
    step_times_s: list[float] = dataclasses.field(default_factory=list)
    regions: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    error: str = ""

    @property
    def step_time_s(self) -> float | None:
        """The median."""
        return statistics.median(self.step_times_s) if self.step_times_s else None

    @property
    def spread_s(self) -> float | None:
        """Between the first and the third quartile."""
        if len(self.step_times_s) < 2:
            return None
        first, _, third = statistics.quantiles(self.step_times_s, n=4, method="inclusive")
        return third - first


class MeasuringProcess:
    """A process that measures one request after another, within a `with` block.

    It is replaced where it ended, or where a measurement left memory allocated on the GPU.
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
        """Measure one step; a failure is a `Measurement` with its `error`."""
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
        answer = process.stdout.readline()
        if not answer:
            return Measurement(request.device, parameters={}, error=self._end())
        content = json.loads(answer)
        if not content.pop("clean"):
            self._end()
        return Measurement(**content)

    def _end(self) -> str:
        """End the process; return why it had ended, if it had."""
        if self._process is None:
            return ""
        self._process.communicate()  # closes its input, which ends it
        code, self._process = self._process.returncode, None
        if code in (-9, 137):
            return OUT_OF_MEMORY
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [""]
        return f"exit code {code}: {lines[-1]}"


def measure_here(request: Request) -> Measurement:
    """Measure in this process."""
    device = torch.device(request.device)
    torch.manual_seed(0)
    with device:  # a large network is made on a GPU in a fraction of the time
        model = build_random_model(request.config, num_classes=request.num_classes).to(device).train()
    optimizer = build_optimizer(model, request.config.optimizer)
    batch = make_batch(
        request.size, num_classes=request.num_classes, needs=model.head.target_types, device=request.device
    )
    about: dict[str, Any] = {
        "device_name": device_name(device),
        "parameters": parameter_counts(model),
    }
    fp16 = device.type == "cuda" and request.size.precision == "16-mixed"
    scaler = torch.amp.GradScaler(device.type) if fp16 else None

    def step() -> None:
        train_step(model, optimizer, batch, request.size, device=device.type, scaler=scaler)

    with matching_proposals(model):
        if device.type == "cpu":
            followed = trace_step(model, optimizer, batch, request.size)
            peak = followed.peak
            about |= {
                "peak_mib": peak.total_bytes / MIB,
                "by_kind_mib": {kind: nbytes / MIB for kind, nbytes in peak.by_kind.items()},
                "peak_at": peak.place,
                "regions": followed.regions,
            }
            return Measurement(**about, step_times_s=timed(step, request, device))
        with counted_regions(model) as regions:
            init_optimizer_state(optimizer, accumulates=request.size.accumulates)
            for _ in range(request.warmup):
                step()
            torch.cuda.reset_peak_memory_stats(device)
            times = timed(step, dataclasses.replace(request, warmup=0), device)
    return Measurement(
        **about,
        peak_mib=torch.cuda.max_memory_allocated(device) / MIB,
        peak_reserved_mib=torch.cuda.max_memory_reserved(device) / MIB,
        outside_allocator_mib=outside_allocator_mib(),
        step_times_s=times,
        regions=regions,
    )


def timed(step: Any, request: Request, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` steps, after `warmup` others."""
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
    """Return the memory in use on the GPU that PyTorch's allocator has not reserved, in MiB."""
    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved()) / MIB


def prepare_gpu(request: Request) -> list[str]:
    """Cap this process's share of the GPU if asked to; warn if others are on it."""
    _, total = torch.cuda.mem_get_info()
    limit = total if request.memory_limit_mib is None else request.memory_limit_mib * MIB
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    used = outside_allocator_mib()
    if used <= BUSY_MIB:
        return []
    return [f"{used:.0f} MiB of the GPU are in use, by other programs too: times and limits mean less"]


def answer(request: Request) -> Measurement:
    """Measure in this process; running out of memory is an answer, too."""
    warnings = prepare_gpu(request) if request.device == "cuda" else []
    try:
        measurement = measure_here(request)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        measurement = Measurement(device_name(torch.device(request.device)), parameters={}, error=OUT_OF_MEMORY)
    return dataclasses.replace(measurement, warnings=[*measurement.warnings, *warnings])


def released() -> bool:
    """Give back all memory; return whether nothing is left allocated on the GPU, so that its peak can be reset."""
    gc.collect()
    if not torch.cuda.is_initialized():
        return True
    torch._C._cuda_clearCublasWorkspaces()  # they count as allocated, and are made again at the next product
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated() == 0


def main() -> None:
    """Answer each line of the standard input with one of the standard output."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    for line in sys.stdin:
        content = json.loads(line)
        size = content.pop("size")
        size = StepSize(**{**size, "image_size": tuple(size["image_size"])})
        config = from_dict(content.pop("config"))
        found = dataclasses.asdict(answer(Request(**content, config=config, size=size)))
        print(json.dumps({**found, "clean": released()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
