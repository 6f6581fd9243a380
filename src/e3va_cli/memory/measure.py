"""The memory and the time of a training step by running it, in a process of its own.

    python -m e3va_cli.memory.measure REQUEST.json ANSWER.json

On CUDA the peak is the allocator's. On a CPU the tensors of one step are followed op by op, as in a plan; the times are
those of other steps, which nothing watches.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from e3va_cli.files import write_json
from e3va_cli.machine import MIB, device_name, is_out_of_memory, synchronise
from e3va_cli.memory.follow import follow_step
from e3va_cli.memory.regions import counted_regions, matching_proposals
from e3va_cli.memory.step import StepSize, make_batch, steady, train_step
from e3va_cli.model import build_random_model, parameter_counts
from e3va_cli.training.optimizer import build_optimizer

OUT_OF_MEMORY = "out of memory"
BUSY_MIB = 1200  # in use on a GPU before we start: more than this process's own CUDA context


@dataclasses.dataclass(frozen=True)
class Request:
    """What to measure.

    Attributes:
        config: the plain configuration, with `backbone`, `adapter`, `head` and `optimizer`.
        size: of the step.
        device: cpu or cuda.
        warmup, repeats: steps that are not timed, and that are.
        memory_limit_mib: no more of a GPU than this may be used.
    """

    config: dict[str, Any]
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
        by_kind_mib: what held the memory at the peak, on a CPU.
        regions: cut out of the feature maps in a step, by pooling layer.
        error: why nothing was measured.
    """

    device_name: str
    parameters: dict[str, int | float]
    peak_mib: float | None = None
    peak_reserved_mib: float | None = None
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


def measure(request: Request) -> Measurement:
    """Measure in a new process, so that nothing of another method is left."""
    with TemporaryDirectory() as folder:
        question, answer = Path(folder) / "request.json", Path(folder) / "answer.json"
        write_json(question, dataclasses.asdict(request))
        command = [sys.executable, "-m", "e3va_cli.memory.measure", str(question), str(answer)]
        done = subprocess.run(command, capture_output=True, text=True)
        if not answer.is_file():
            lines = done.stderr.strip().splitlines() or [""]
            killed = done.returncode in (-9, 137)
            reason = OUT_OF_MEMORY if killed else f"exit code {done.returncode}: {lines[-1]}"
            return Measurement(device_name=request.device, parameters={}, error=reason)
        return Measurement(**json.loads(answer.read_text()))


def measure_here(request: Request) -> Measurement:
    """Measure in this process."""
    device = torch.device(request.device)
    torch.manual_seed(0)
    model = build_random_model(request.config, num_classes=request.num_classes).to(device).train()
    optimizer = build_optimizer(model, **request.config["optimizer"])
    batch = make_batch(request.size, num_classes=request.num_classes, needs=model.head.needs, device=request.device)
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
            followed = follow_step(model, optimizer, batch, request.size)
            peak = followed.peak
            about |= {
                "peak_mib": peak.total_bytes / MIB,
                "by_kind_mib": {kind: nbytes / MIB for kind, nbytes in peak.by_kind.items()},
                "peak_at": peak.place,
                "regions": followed.regions,
            }
            return Measurement(**about, step_times_s=timed(step, request, device))
        with counted_regions(model) as regions:
            steady(optimizer, accumulates=request.size.accumulates)
            for _ in range(request.warmup):
                step()
            torch.cuda.reset_peak_memory_stats(device)
            times = timed(step, dataclasses.replace(request, warmup=0), device)
    return Measurement(
        **about,
        peak_mib=torch.cuda.max_memory_allocated(device) / MIB,
        peak_reserved_mib=torch.cuda.max_memory_reserved(device) / MIB,
        step_times_s=times,
        regions=regions,
    )


def timed(step: Any, request: Request, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` steps, after `warmup` others."""
    times = []
    for index in range(request.warmup + request.repeats):
        synchronise(device)
        started = time.perf_counter()
        step()
        synchronise(device)
        if index >= request.warmup:
            times.append(time.perf_counter() - started)
    return times


def prepare_gpu(request: Request) -> list[str]:
    """Cap this process's share of the GPU if asked to; warn if others are on it."""
    free, total = torch.cuda.mem_get_info()
    if request.memory_limit_mib is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, request.memory_limit_mib * MIB / total))
    used = (total - free) / MIB - torch.cuda.memory_reserved() / MIB
    if used <= BUSY_MIB:
        return []
    return [f"{used:.0f} MiB of the GPU are in use, by other programs too: times and limits mean less"]


def main() -> None:
    """Answer the request in the first file with the second."""
    content = json.loads(Path(sys.argv[1]).read_text())
    size = content.pop("size")
    size = StepSize(**{**size, "image_size": tuple(size["image_size"])})
    request = Request(**content, size=size)
    warnings = prepare_gpu(request) if request.device == "cuda" else []
    try:
        measurement = measure_here(request)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        measurement = Measurement(device_name(torch.device(request.device)), parameters={}, error=OUT_OF_MEMORY)
    answer = dataclasses.asdict(measurement)
    write_json(Path(sys.argv[2]), answer | {"warnings": answer["warnings"] + warnings})


if __name__ == "__main__":
    main()
