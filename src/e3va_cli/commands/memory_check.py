"""`e3va train budget=11GiB`: refuse a run that does not fit, before anything is loaded, and name what would fit."""

from __future__ import annotations

from dataclasses import fields, replace

from e3va_cli.commands.console import console
from e3va_cli.config.composition import load_config
from e3va_cli.config.run_config import BenchmarkMemoryConfig, RunConfig
from e3va_cli.errors import UserError
from e3va_cli.memory.benchmark import BenchmarkSpec, benchmark_spec, find_max_batch_size
from e3va_cli.memory.budget import parse_budget
from e3va_cli.models.adapters.highway import HighwayOptions
from e3va_cli.utils.environment import MIB


def check_memory(config: RunConfig, budget: str) -> None:
    """Estimate the largest step of a run, with the options of benchmark_memory.yaml that a training run does not have.

    Raises:
        UserError: it needs more than `budget`; names what would fit.
    """
    spec = run_spec(config)
    reserve_mib = benchmark_options().reserve_mib
    limit_mib = parse_budget(budget) - reserve_mib
    needed = peak_mib(config, spec)
    height, width = spec.size.image_size
    about = f"{needed:.0f} MiB at the largest image, {height}x{width}, and {reserve_mib:.0f} MiB for CUDA itself"
    if needed <= limit_mib:
        console.print(f"Within budget={budget}: estimate {about}")
        return
    remedies = what_would_fit(config, spec, limit_mib)
    hint = "; would fit: " + ", or ".join(remedies) if remedies else "; nothing smaller fits either"
    raise UserError(f"budget={budget}: this run cannot fit: it needs {about}{hint}")


def benchmark_options() -> BenchmarkMemoryConfig:
    """Return the default options of `e3va benchmark-memory`."""
    config: BenchmarkMemoryConfig = load_config("benchmark_memory", complete=False)
    return config


def run_spec(config: RunConfig) -> BenchmarkSpec:
    """Return the largest step of a run on a GPU, with the options of `benchmark_options` that it does not have."""
    shared = {one.name: getattr(config, one.name) for one in fields(RunConfig)}
    return benchmark_spec(replace(benchmark_options(), **shared, measure=False, budget=None))


def peak_mib(config: RunConfig, spec: BenchmarkSpec) -> float:
    """Return the estimated peak memory of a step in MiB."""
    return spec.estimate(config).peak.total_bytes / MIB


def what_would_fit(config: RunConfig, spec: BenchmarkSpec, limit_mib: float) -> list[str]:
    """Return overrides each of which makes the run fit."""
    remedies = []
    batch, accumulated = spec.size.batch_size, config.trainer.accumulate_grad_batches
    largest = find_max_batch_size(config, spec, limit_mib)
    if largest:
        steps = -(-batch * accumulated // largest)
        remedies.append(f"data.batch_size={largest} trainer.accumulate_grad_batches={steps}")
    if spec.size.precision == "32":
        mixed = replace(spec, size=replace(spec.size, precision="bf16-mixed"))
        if peak_mib(config, mixed) <= limit_mib:
            remedies.append("trainer.precision=bf16-mixed")
    if isinstance(config.adapter, HighwayOptions):
        for activations in (one for one in ("compress", "recompute") if one != config.adapter.activations):
            other = replace(config, adapter=replace(config.adapter, activations=activations))
            if peak_mib(other, spec) <= limit_mib:
                remedies.append(f"adapter.activations={activations}")
    else:
        ours = load_config("train", ["adapter=e3va"]).adapter
        if peak_mib(replace(config, adapter=ours), spec) <= limit_mib:
            remedies.append("adapter=e3va")
    return remedies
