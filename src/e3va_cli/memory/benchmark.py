"""Compare tuning methods under one specification, each estimated or measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from e3va_cli.config.compatibility import check_compatibility
from e3va_cli.config.run_config import BenchmarkMemoryConfig, RunConfig
from e3va_cli.memory.budget import max_batch_size, parse_budget
from e3va_cli.memory.estimate import DeviceType, MemoryEstimate, estimate_memory
from e3va_cli.memory.measure import Measurement, MeasuringProcess, Request
from e3va_cli.memory.result import Result, estimated_result, measured_result
from e3va_cli.memory.step import StepSize
from e3va_cli.utils.environment import MIB

MAX_CPU_FRACTION = 0.9  # of the free memory; larger steps are not measured on a CPU


@dataclass(frozen=True)
class BenchmarkSpec:
    """What all methods share.

    Attributes:
        size: of the step.
        num_classes: of the head.
        device: to measure on, `None` to estimate only.
        warmup, repeats: untimed and timed steps.
        gpu_limit_mib: limit of the CUDA allocator in a measurement, the budget less its reserve.
    """

    size: StepSize
    num_classes: int
    device: str | None
    warmup: int
    repeats: int
    gpu_limit_mib: float | None = None

    @property
    def device_type(self) -> DeviceType:
        """Return the device to estimate for: the measured one, else a GPU."""
        return "cpu" if self.device == "cpu" else "cuda"

    def estimate(self, config: RunConfig) -> MemoryEstimate:
        """Estimate a step of one method."""
        return estimate_memory(config, self.size, num_classes=self.num_classes, device_type=self.device_type)


def benchmark_spec(config: BenchmarkMemoryConfig) -> BenchmarkSpec:
    """Return the specification of a configuration of `e3va benchmark-memory`."""
    check_compatibility(config)
    image_size = config.image_size or config.dataset.largest_image
    size = StepSize(
        batch_size=config.data.batch_size,
        image_size=(image_size[0], image_size[1]),
        instances_per_image=config.instances_per_image,
        precision=config.trainer.precision,
        clip_norm=config.trainer.gradient_clip_norm,
        accumulates=config.trainer.accumulate_grad_batches > 1,
    )
    gpu = torch.cuda.is_available() and config.trainer.accelerator != "cpu"
    wanted = gpu if config.measure == "auto" else config.measure
    device = ("cuda" if gpu else "cpu") if wanted else None
    limit = None if config.budget is None else parse_budget(config.budget) - config.reserve_mib
    return BenchmarkSpec(size, config.dataset.planned_classes, device, config.warmup, config.repeats, limit)


def run_benchmark(configs: Mapping[str, RunConfig], spec: BenchmarkSpec) -> Iterator[Result]:
    """Yield the result of each method."""
    with MeasuringProcess() as process:
        for method, config in configs.items():
            estimate = spec.estimate(config)
            if spec.device is None:
                yield estimated_result(method, estimate)
                continue
            needed = estimate.peak.total_bytes / MIB
            if spec.device == "cpu" and needed > MAX_CPU_FRACTION * free_mib():
                reason = f"needs {needed:.0f} MiB, {free_mib():.0f} MiB are free"
                measurement = Measurement(device_name="cpu", parameters={}, error=reason)
            else:
                request = Request(
                    config,
                    spec.size,
                    spec.num_classes,
                    device=spec.device,
                    warmup=spec.warmup,
                    repeats=spec.repeats,
                    memory_limit_mib=spec.gpu_limit_mib,
                )
                measurement = process.measure(request)
            yield measured_result(method, measurement, estimate)


def find_max_batch_size(config: RunConfig, spec: BenchmarkSpec, limit_mib: float) -> int:
    """Return the largest batch of one method whose step stays within `limit_mib`."""

    def peak_mib(batch_size: int) -> float:
        sized = dataclasses.replace(spec, size=dataclasses.replace(spec.size, batch_size=batch_size))
        return sized.estimate(config).peak.total_bytes / MIB

    return max_batch_size(peak_mib, limit_mib)


def free_mib() -> float:
    """Return the memory available to a new process, in MiB."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
    return int(available.split()[1]) / 1024
