"""Methods side by side under one setting, each planned or measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from e3va_cli.config.compatibility import check_compatibility
from e3va_cli.config.run_config import BenchmarkMemoryConfig, RunConfig
from e3va_cli.memory.budget import largest_batch, parse_budget
from e3va_cli.memory.estimate import Semantics, plan
from e3va_cli.memory.measure import Measurement, MeasuringProcess, Request
from e3va_cli.memory.result import Result, measured, planned
from e3va_cli.memory.step import StepSize
from e3va_cli.utils.environment import MIB

ON_CPU_AT_MOST = 0.9  # of the free memory, before a measurement on the CPU is not even tried


@dataclass(frozen=True)
class BenchmarkSpec:
    """What all methods share.

    Attributes:
        size: of the step.
        num_classes: of the head.
        device: that is measured on, `None` to plan only.
        warmup, repeats: steps that are not timed, and that are.
        gpu_limit_mib: what the allocator may take of a GPU in a measurement: a budget less its reserve.
    """

    size: StepSize
    num_classes: int
    device: str | None
    warmup: int
    repeats: int
    gpu_limit_mib: float | None = None

    @property
    def semantics(self) -> Semantics:
        """Whose rules plans follow: the measured device's, a GPU's if nothing is measured."""
        return "cpu" if self.device == "cpu" else "cuda"


def benchmark_spec(config: BenchmarkMemoryConfig) -> BenchmarkSpec:
    """Return the setting of a configuration of `e3va benchmark-memory`."""
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


def results_of(configs: Mapping[str, RunConfig], setting: BenchmarkSpec) -> Iterator[Result]:
    """The result of each method, as it comes in."""
    with MeasuringProcess() as process:
        for method, config in configs.items():
            of_plan = plan(config, setting.size, num_classes=setting.num_classes, semantics=setting.semantics)
            if setting.device is None:
                yield planned(method, of_plan)
                continue
            needed = of_plan.peak.total_bytes / MIB
            if setting.device == "cpu" and needed > ON_CPU_AT_MOST * free_mib():
                reason = f"needs {needed:.0f} MiB, {free_mib():.0f} MiB are free"
                measurement = Measurement(device_name="cpu", parameters={}, error=reason)
            else:
                request = Request(
                    config,
                    setting.size,
                    setting.num_classes,
                    device=setting.device,
                    warmup=setting.warmup,
                    repeats=setting.repeats,
                    memory_limit_mib=setting.gpu_limit_mib,
                )
                measurement = process.measure(request)
            yield measured(method, measurement, of_plan)


def largest_batch_of(config: RunConfig, setting: BenchmarkSpec, limit_mib: float) -> int:
    """The most images that a step of one method can take within `limit_mib` of tensors."""

    def peak_mib(batch_size: int) -> float:
        size = dataclasses.replace(setting.size, batch_size=batch_size)
        followed = plan(config, size, num_classes=setting.num_classes, semantics=setting.semantics)
        return followed.peak.total_bytes / MIB

    return largest_batch(peak_mib, limit_mib)


def free_mib() -> float:
    """Memory that this machine could give a process now."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(line for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")
    return int(available.split()[1]) / 1024
