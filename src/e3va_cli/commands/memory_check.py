"""`e3va train budget=11GiB`: refuse a run that cannot fit before anything is loaded, and suggest what would."""

from __future__ import annotations

from dataclasses import fields, replace

from e3va_cli.commands.console import console
from e3va_cli.config.composition import load_config
from e3va_cli.config.run_config import BenchmarkMemoryConfig, RunConfig
from e3va_cli.errors import UserError
from e3va_cli.memory.benchmark import BenchmarkSpec, benchmark_spec, largest_batch_of
from e3va_cli.memory.budget import parse_budget
from e3va_cli.memory.estimate import plan
from e3va_cli.models.adapters.e3va import E3VAOptions
from e3va_cli.utils.environment import MIB


def check_memory(config: RunConfig, budget: str) -> None:
    """Plan the largest step of a run; numbers that a training run does not have are those of benchmark_memory.yaml.

    Raises:
        UserError: it needs more than `budget`; names what would fit.
    """
    setting = setting_of_run(config)
    reserve_mib = benchmark_options().reserve_mib
    limit_mib = parse_budget(budget) - reserve_mib
    needed = peak_mib(config, setting)
    height, width = setting.size.image_size
    about = f"{needed:.0f} MiB at the largest image, {height}x{width}, and {reserve_mib:.0f} MiB of CUDA's own"
    if needed <= limit_mib:
        console.print(f"Within budget={budget}: planned {about}")
        return
    remedies = what_would_fit(config, setting, limit_mib)
    hint = "; this would fit: " + ", or ".join(remedies) if remedies else "; nothing smaller fits either"
    raise UserError(f"budget={budget}: this run cannot fit: it needs {about}{hint}")


def benchmark_options() -> BenchmarkMemoryConfig:
    """Return what `e3va benchmark-memory` has by default."""
    config: BenchmarkMemoryConfig = load_config("benchmark_memory", complete=False)
    return config


def setting_of_run(config: RunConfig) -> BenchmarkSpec:
    """Return the largest step of a run, on a GPU; what a training run does not have is benchmark_memory.yaml's."""
    shared = {one.name: getattr(config, one.name) for one in fields(RunConfig)}
    return benchmark_spec(replace(benchmark_options(), **shared, measure=False, budget=None))


def peak_mib(config: RunConfig, setting: BenchmarkSpec) -> float:
    """Return the peak memory of a step's tensors in MiB."""
    return plan(config, setting.size, num_classes=setting.num_classes).peak.total_bytes / MIB


def what_would_fit(config: RunConfig, setting: BenchmarkSpec, limit_mib: float) -> list[str]:
    """Return overrides, each of which alone makes the run fit."""
    remedies = []
    batch, accumulated = setting.size.batch_size, config.trainer.accumulate_grad_batches
    largest = largest_batch_of(config, setting, limit_mib)
    if largest:
        steps = -(-batch * accumulated // largest)
        remedies.append(f"data.batch_size={largest} trainer.accumulate_grad_batches={steps}")
    if setting.size.precision == "32":
        mixed = replace(setting, size=replace(setting.size, precision="bf16-mixed"))
        if peak_mib(config, mixed) <= limit_mib:
            remedies.append("trainer.precision=bf16-mixed")
    if isinstance(config.adapter, E3VAOptions):
        for activations in (one for one in ("compress", "recompute") if one != config.adapter.activations):
            other = replace(config, adapter=replace(config.adapter, activations=activations))
            if peak_mib(other, setting) <= limit_mib:
                remedies.append(f"adapter.activations={activations}")
    else:
        ours = load_config("train", ["adapter=e3va"]).adapter
        if peak_mib(replace(config, adapter=ours), setting) <= limit_mib:
            remedies.append("adapter=e3va")
    return remedies
