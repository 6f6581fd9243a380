"""`e3va benchmark-memory`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from e3va_cli.commands.console import console
from e3va_cli.commands.memory_tables import (
    measured_lines,
    operations_line,
    peak_lines,
    print_budget_table,
    print_claims_table,
    print_kinds_table,
    print_results_table,
)
from e3va_cli.config.composition import load_config, parse
from e3va_cli.config.run_config import BenchmarkMemoryConfig
from e3va_cli.errors import UserError
from e3va_cli.memory.benchmark import BenchmarkSpec, benchmark_spec, largest_batch_of, results_of
from e3va_cli.memory.benchmark_json import benchmark_json
from e3va_cli.memory.budget import parse_budget
from e3va_cli.memory.plot import draw
from e3va_cli.memory.result import Result
from e3va_cli.models.adapters import METHODS
from e3va_cli.paper.claims import Claim, Run, compare_with_paper
from e3va_cli.paper.published import COCO, SETTINGS, VOC, published_setting
from e3va_cli.utils.environment import device_name, package_versions
from e3va_cli.utils.files import write_json
from e3va_cli.utils.terminal import TerminalProgress

BENCHMARK, DETAILS, PLOT = "benchmark.json", "details.json", "memory.png"
COMMAND = "benchmark_memory"


def run(config: BenchmarkMemoryConfig, *, folder: Path) -> None:
    """Plan or measure each method, judge the claims, write the files; exit code 1 if a claim does not hold."""
    words = list(HydraConfig.get().overrides.task)
    configs = {method: of_method(words, method) for method in known(config.methods)}
    setting = benchmark_spec(config)
    limit = None if config.budget is None else parse_budget(config.budget) - config.reserve_mib
    console.print(describe(config, setting))
    with TerminalProgress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as bar:
        results = follow(bar, "Measuring" if setting.device else "Planning", configs, setting)
        others = published_runs(bar, config, setting)
        batches = None if limit is None else batches_within(bar, configs, setting, limit)
    ours = Run(config.backbone.name, config.head.name, setting.size.image_size, results)
    claims = compare_with_paper([ours, *others], reserve_mib=config.reserve_mib)
    write(folder, config, setting, results, claims, batches)
    show(config, setting, results, claims, batches, folder)
    if any(claim.verdict == "does not hold" for claim in claims):
        sys.exit(1)


def known(methods: list[str]) -> list[str]:
    """The methods asked for, once each.

    Raises:
        UserError: none, or unknown ones.
    """
    mistakes = []
    for method in methods:
        if method not in METHODS:
            near = get_close_matches(method, METHODS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            mistakes.append(f"methods: no method {method}; {hint}choices: {', '.join(METHODS)}")
    if mistakes or not methods:
        raise UserError(*(mistakes or ["methods=[]: at least one method"]))
    return list(dict.fromkeys(methods))


def of_method(words: list[str], method: str) -> BenchmarkMemoryConfig:
    """The configuration with `adapter=method`; of the options `adapter.*` given, those that this method has."""
    given = [o for o in parse(words) if o.key_or_group != "adapter"]
    shared = [str(o.input_line) for o in given if not o.key_or_group.startswith("adapter.")]
    base = [*shared, f"adapter={method}"]
    options = compose(COMMAND, overrides=base)
    own = [
        str(o.input_line)
        for o in given
        if o.key_or_group.startswith("adapter.") and o.key_or_group.removeprefix("adapter.") in options.adapter
    ]
    config: BenchmarkMemoryConfig = load_config(COMMAND, [*base, *own], complete=False)
    return config


def follow(
    bar: TerminalProgress, doing: str, configs: dict[str, BenchmarkMemoryConfig], setting: BenchmarkSpec
) -> list[Result]:
    """All results, one method after another."""
    task = bar.add_task(doing, total=len(configs))
    results: list[Result] = []
    names = iter(configs)
    bar.update(task, description=f"{doing} {next(names)}")
    for result in results_of(configs, setting):
        results.append(result)
        bar.update(task, advance=1, description=f"{doing} {next(names, '')}".strip())
    return results


def published_runs(bar: TerminalProgress, config: BenchmarkMemoryConfig, setting: BenchmarkSpec) -> list[Run]:
    """If this is one of the two published settings: plans of the other, and of Swin-L for the 11 GB card."""
    chosen = published_setting(config.backbone.name)
    if chosen is None or setting.size.image_size != chosen.image_size:
        return []
    shared = [f"data.batch_size={setting.size.batch_size}", f"trainer.precision={setting.size.precision}"]
    other = next(s for s in SETTINGS if s is not chosen)
    on_card = [f"experiment={COCO.experiment}", f"backbone={VOC.backbone}", "data.batch_size=1", shared[1]]
    runs = []
    for words, methods in (([f"experiment={other.experiment}", *shared], ("full", "e3va")), (on_card, ("e3va",))):
        configs = {method: of_method([*words, "measure=false"], method) for method in methods}
        first = next(iter(configs.values()))
        theirs = benchmark_spec(first)
        results = follow(bar, f"Planning {first.backbone.name} for the claims:", configs, theirs)
        runs.append(Run(first.backbone.name, first.head.name, theirs.size.image_size, results))
    return runs


def batches_within(
    bar: TerminalProgress, configs: dict[str, BenchmarkMemoryConfig], setting: BenchmarkSpec, limit_mib: float
) -> dict[str, int]:
    """The largest batch of each method within the budget."""
    task = bar.add_task("Largest batch", total=len(configs))
    batches = {}
    for method, config in configs.items():
        bar.update(task, description=f"Largest batch of {method}")
        batches[method] = largest_batch_of(config, setting, limit_mib)
        bar.update(task, advance=1)
    return batches


def describe(config: BenchmarkMemoryConfig, setting: BenchmarkSpec) -> str:
    """One line on what is compared."""
    size = setting.size
    height, width = size.image_size
    where = f"measured on {setting.device}" if setting.device else "planned: no GPU and no weights needed"
    return (
        f"{config.backbone.name} with {config.head.name}, batch {size.batch_size} of {height}x{width}, "
        f"{size.instances_per_image} instances an image, precision {size.precision}, AdamW; {where}"
    )


def settings_entry(config: BenchmarkMemoryConfig, setting: BenchmarkSpec) -> dict[str, Any]:
    """`settings` of `benchmark.json`."""
    import torch

    size = setting.size
    device = setting.device
    return {
        "backbone": config.backbone.name,
        "head": config.head.name,
        "dataset": config.dataset.name,
        "batch_size": size.batch_size,
        "image_size": list(size.image_size),
        "instances_per_image": size.instances_per_image,
        "precision": size.precision,
        "optimizer": "adamw",
        "num_classes": setting.num_classes,
        "device": device,
        "device_name": None if device is None else device_name(torch.device(device)),
        "planned_for": setting.semantics,
        "budget": config.budget,
        "reserve_mib": config.reserve_mib,
        "versions": package_versions(),
    }


def write(
    folder: Path,
    config: BenchmarkMemoryConfig,
    setting: BenchmarkSpec,
    results: list[Result],
    claims: list[Claim],
    batches: dict[str, int] | None,
) -> None:
    """Leave the files in the run folder."""
    write_json(
        folder / BENCHMARK,
        benchmark_json(settings_entry(config, setting), results, [claim.entry() for claim in claims]),
    )
    details = {r.method: {**r.details, "largest_batch_size": (batches or {}).get(r.method)} for r in results}
    write_json(folder / DETAILS, {"methods": details, "config": asdict(config)})
    if any(r.peak_mib is not None for r in results):
        title = f"{config.backbone.name} + {config.head.name}: memory of a training step"
        draw(results, folder / PLOT, title=title, subtitle=describe(config, setting).partition(", ")[2])


def show(
    config: BenchmarkMemoryConfig,
    setting: BenchmarkSpec,
    results: list[Result],
    claims: list[Claim],
    batches: dict[str, int] | None,
    folder: Path,
) -> None:
    """Print the tables and where the files lie."""
    print_results_table(results, config.backbone.name)
    for result in results:
        for warning in [*result.details.get("warnings", []), result.details.get("error")]:
            if warning:
                console.print(f"{result.method}: {warning}", style="yellow", markup=False)
    print_kinds_table(results)
    for line in [*measured_lines(results), operations_line(results), *peak_lines(results)]:
        console.print(line)
    if batches is not None:
        print_budget_table(config, setting, batches)
        height, width = setting.size.image_size
        if config.image_size is None and height != width:
            console.print(
                f"A batch with an upright and a lying image is padded to both their sides: plan for it with "
                f"image_size=[{width},{width}]."
            )
    print_claims_table(claims)
    files = [folder / name for name in (BENCHMARK, DETAILS, PLOT)]
    console.print(f"Results: {', '.join(str(file) for file in files if file.is_file())}", markup=False)
