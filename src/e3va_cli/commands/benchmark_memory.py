"""`e3va benchmark-memory`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from e3va_cli.commands.console import console
from e3va_cli.commands.memory_tables import (
    flops_line,
    measured_lines,
    offload_lines,
    peak_lines,
    print_breakdown_table,
    print_budget_table,
    print_claims_table,
    print_results_table,
)
from e3va_cli.config.composition import load_config, parse
from e3va_cli.config.run_config import BenchmarkMemoryConfig
from e3va_cli.errors import UserError
from e3va_cli.memory.benchmark import BenchmarkSpec, benchmark_spec, find_max_batch_size, run_benchmark
from e3va_cli.memory.budget import parse_budget
from e3va_cli.memory.plot import plot_benchmark
from e3va_cli.memory.result import Result, benchmark_json
from e3va_cli.models.adapters import METHODS
from e3va_cli.paper.claims import BenchmarkRun, Claim, compare_with_paper
from e3va_cli.paper.published import COCO, EXPERIMENTS, SETTINGS, VOC, published_setting
from e3va_cli.utils.environment import device_name, package_versions
from e3va_cli.utils.files import write_json
from e3va_cli.utils.terminal import TerminalProgress

BENCHMARK, DETAILS, PLOT = "benchmark.json", "details.json", "memory.png"
COMMAND = "benchmark_memory"


def run(config: BenchmarkMemoryConfig, *, folder: Path) -> None:
    """Estimate or measure each method and write the results; with `claims`, exit with 1 if a claim does not hold."""
    overrides = list(HydraConfig.get().overrides.task)
    configs = {method: load_method_config(overrides, method) for method in validate_methods(config.methods)}
    spec = benchmark_spec(config)
    limit = None if config.budget is None else parse_budget(config.budget) - config.reserve_mib
    console.print(describe(config, spec))
    claims: list[Claim] = []
    with TerminalProgress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        results = run_with_progress(bar, "Measuring" if spec.device else "Estimating", configs, spec)
        if compares_with_paper(config.claims, overrides):
            this = BenchmarkRun(config.backbone.name, config.head.name, spec.size.image_size, results)
            claims = compare_with_paper([this, *published_runs(bar, config, spec)], reserve_mib=config.reserve_mib)
        batch_sizes = None if limit is None else max_batch_sizes(bar, configs, spec, limit)
    write_results(folder, config, spec, results, claims, batch_sizes)
    print_results(config, spec, results, claims, batch_sizes, folder)
    if any(claim.verdict == "does not hold" for claim in claims):
        sys.exit(1)


def compares_with_paper(claims: bool | None, overrides: list[str]) -> bool:
    """Return the option `claims`; None stands for whether an experiment of the paper is given."""
    if claims is None:
        return any(o.key_or_group == "experiment" and o.value() in EXPERIMENTS for o in parse(overrides))
    return claims


def validate_methods(methods: list[str]) -> list[str]:
    """Return the methods without duplicates.

    Raises:
        UserError: no methods, or unknown ones.
    """
    errors = []
    for method in methods:
        if method not in METHODS:
            near = get_close_matches(method, METHODS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            errors.append(f"methods: no method {method}; {hint}choices: {', '.join(METHODS)}")
    if errors or not methods:
        raise UserError(*(errors or ["methods=[]: at least one method is required"]))
    return list(dict.fromkeys(methods))


def load_method_config(overrides: list[str], method: str) -> BenchmarkMemoryConfig:
    """Return the configuration with `adapter=method`, without overrides `adapter.*` that this method does not have."""
    parsed = [o for o in parse(overrides) if o.key_or_group != "adapter"]
    shared = [str(o.input_line) for o in parsed if not o.key_or_group.startswith("adapter.")]
    base = [*shared, f"adapter={method}"]
    options = compose(COMMAND, overrides=base)
    own = [
        str(o.input_line)
        for o in parsed
        if o.key_or_group.startswith("adapter.") and o.key_or_group.removeprefix("adapter.") in options.adapter
    ]
    config: BenchmarkMemoryConfig = load_config(COMMAND, [*base, *own], complete=False)
    return config


def run_with_progress(
    bar: TerminalProgress, verb: str, configs: dict[str, BenchmarkMemoryConfig], spec: BenchmarkSpec
) -> list[Result]:
    """Return the results of all methods."""
    task = bar.add_task(verb, total=len(configs))
    results: list[Result] = []
    names = iter(configs)
    bar.update(task, description=f"{verb} {next(names)}")
    for result in run_benchmark(configs, spec):
        results.append(result)
        bar.update(task, advance=1, description=f"{verb} {next(names, '')}".strip())
    return results


def published_runs(bar: TerminalProgress, config: BenchmarkMemoryConfig, spec: BenchmarkSpec) -> list[BenchmarkRun]:
    """Return estimates for the remaining claims, if `config` is one of the two published settings.

    These are the other published setting, and Swin-L on an 11 GB card.
    """
    published = published_setting(config.backbone.name)
    if published is None or spec.size.image_size != published.image_size:
        return []
    shared = [f"data.batch_size={spec.size.batch_size}", f"trainer.precision={spec.size.precision}"]
    other = next(s for s in SETTINGS if s is not published)
    on_card = [f"experiment={COCO.experiment}", f"backbone={VOC.backbone}", "data.batch_size=1", shared[1]]
    runs = []
    for overrides, methods in (([f"experiment={other.experiment}", *shared], ("full", "e3va")), (on_card, ("e3va",))):
        configs = {method: load_method_config([*overrides, "measure=false"], method) for method in methods}
        first = next(iter(configs.values()))
        run_spec = benchmark_spec(first)
        results = run_with_progress(bar, f"Estimating {first.backbone.name} for the claims:", configs, run_spec)
        runs.append(BenchmarkRun(first.backbone.name, first.head.name, run_spec.size.image_size, results))
    return runs


def max_batch_sizes(
    bar: TerminalProgress, configs: dict[str, BenchmarkMemoryConfig], spec: BenchmarkSpec, limit_mib: float
) -> dict[str, int]:
    """Return the largest batch of each method within the budget."""
    task = bar.add_task("Largest batch", total=len(configs))
    batch_sizes = {}
    for method, config in configs.items():
        bar.update(task, description=f"Largest batch of {method}")
        batch_sizes[method] = find_max_batch_size(config, spec, limit_mib)
        bar.update(task, advance=1)
    return batch_sizes


def describe(config: BenchmarkMemoryConfig, spec: BenchmarkSpec) -> str:
    """Return a one-line description of the benchmark."""
    size = spec.size
    height, width = size.image_size
    source = f"measured on {spec.device}" if spec.device else "estimated without GPU and weights"
    return (
        f"{config.backbone.name} with {config.head.name}, batch {size.batch_size} of {height}x{width}, "
        f"{size.instances_per_image} instances per image, precision {size.precision}, AdamW; {source}"
    )


def settings_entry(config: BenchmarkMemoryConfig, spec: BenchmarkSpec) -> dict[str, Any]:
    """Return `settings` of `benchmark.json`."""
    size = spec.size
    return {
        "backbone": config.backbone.name,
        "head": config.head.name,
        "dataset": config.dataset.name,
        "batch_size": size.batch_size,
        "image_size": list(size.image_size),
        "instances_per_image": size.instances_per_image,
        "precision": size.precision,
        "optimizer": "adamw",
        "num_classes": spec.num_classes,
        "device": spec.device,
        "device_name": None if spec.device is None else device_name(torch.device(spec.device)),
        "planned_for": spec.device_type,
        "budget": config.budget,
        "reserve_mib": config.reserve_mib,
        "versions": package_versions(),
    }


def write_results(
    folder: Path,
    config: BenchmarkMemoryConfig,
    spec: BenchmarkSpec,
    results: list[Result],
    claims: list[Claim],
    batch_sizes: dict[str, int] | None,
) -> None:
    """Write the JSON files and the plot to the run folder."""
    write_json(
        folder / BENCHMARK,
        benchmark_json(settings_entry(config, spec), results, [claim.entry() for claim in claims]),
    )
    details = {r.method: {**r.details, "largest_batch_size": (batch_sizes or {}).get(r.method)} for r in results}
    write_json(folder / DETAILS, {"methods": details, "config": asdict(config)})
    if any(r.peak_mib is not None for r in results):
        title = f"{config.backbone.name} + {config.head.name}: memory of a training step"
        plot_benchmark(results, folder / PLOT, title=title, subtitle=describe(config, spec).partition(", ")[2])


def print_results(
    config: BenchmarkMemoryConfig,
    spec: BenchmarkSpec,
    results: list[Result],
    claims: list[Claim],
    batch_sizes: dict[str, int] | None,
    folder: Path,
) -> None:
    """Print the tables and the paths of the files."""
    print_results_table(results, config.backbone.name)
    for result in results:
        for warning in [*result.details.get("warnings", []), result.details.get("error")]:
            if warning:
                console.print(f"{result.method}: {warning}", style="yellow", markup=False)
    print_breakdown_table(results)
    for line in [*measured_lines(results), flops_line(results), *offload_lines(results), *peak_lines(results)]:
        console.print(line)
    if batch_sizes is not None:
        print_budget_table(config, spec, batch_sizes)
        height, width = spec.size.image_size
        if config.image_size is None and height != width:
            console.print(
                f"A batch of portrait and landscape images is padded to the longer sides of both; estimate it with "
                f"image_size=[{width},{width}]."
            )
    if claims:
        print_claims_table(claims)
    files = [folder / name for name in (BENCHMARK, DETAILS, PLOT)]
    console.print(f"Results: {', '.join(str(file) for file in files if file.is_file())}", markup=False)
