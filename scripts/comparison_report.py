"""Table and plot of the experiments that `compare_methods.py` has run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from e3va_cli.memory.plot import BASELINE as BASELINE_COLOR
from e3va_cli.memory.plot import GRAY, NAMES, OURS
from e3va_cli.utils.files import atomic_write

TABLE, PLOT = "comparison.md", "comparison.png"
COLUMNS = ("method", "params, M", "memory, MiB", "step time / full", "lr", "adapter lr", "equal steps", "equal time")
Experiment = dict[str, Any]


def values(experiment: Experiment, method: str, phase: str) -> list[float]:
    """Return the results of a method over the seeds, in percent."""
    runs = experiment["runs"]
    return [100 * one["value"] for one in runs if one["method"] == method and one["phase"] == phase]


def spread(numbers: Sequence[float]) -> str:
    """Return the mean and the sample standard deviation as text."""
    if not numbers:
        return "-"
    deviation = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.1f}{deviation}"


def methods_of(experiment: Experiment) -> list[str]:
    """Return the methods that have run, by their mean at equal steps, best first."""
    methods = {one["method"] for one in experiment["runs"] if one["phase"] == "steps"}
    return sorted(methods, key=lambda method: -statistics.fmean(values(experiment, method, "steps")))


def rows(experiment: Experiment) -> list[list[str]]:
    """Return the table of an experiment."""
    costs = experiment["costs"]
    table = []
    for method in methods_of(experiment):
        cost = costs[method]
        one = next(run for run in experiment["runs"] if run["method"] == method)
        at_steps = values(experiment, method, "steps")
        faster = cost["step_time_s"] <= costs["e3va"]["step_time_s"]
        at_time = at_steps if faster else values(experiment, method, "time")  # E3VA's time
        table.append(
            [
                method,
                f"{cost['trainable_params'] / 1e6:.2f}",
                f"{cost['estimated_peak_mib']:,.0f}",
                f"{cost['step_time_s'] / costs['full']['step_time_s']:.2f}",
                f"{one['lr']:g}",
                f"{one['lr'] * one['scale']:g}",
                spread(at_steps),
                spread(at_time),
            ]
        )
    return table


def write_report(experiments: Sequence[Experiment], folder: Path, console: Console) -> None:
    """Print the tables of experiments with finished runs, and write them and the plot to `folder`."""
    experiments = [one for one in experiments if methods_of(one)]
    if not experiments:
        return
    text = []
    for experiment in experiments:
        metric, seeds = experiment["runs"][0]["metric"], {one["seed"] for one in experiment["runs"]}
        title = (
            f"{experiment['experiment']}: {metric} in percent, {experiment['steps']} steps, {len(seeds)} seeds "
            f"(mean ± sample standard deviation)"
        )
        setting = f"{experiment['device']}, torch {experiment['versions']['torch']}, {experiment['date']}"
        table = Table(box=MARKDOWN)
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        for row in rows(experiment):
            table.add_row(*row)
        wide = Console(width=200, highlight=False)
        with wide.capture() as captured:
            wide.print(table)
        lines = [line.rstrip() for line in captured.get().strip().splitlines()]
        text += [f"## {title}", "", f"Step times and runs: {setting}. Memory: estimated for a GPU.", "", *lines, ""]
        console.print("\n".join([title, *lines]))
    with atomic_write(folder / TABLE) as temporary:
        temporary.write_text("\n".join(text), encoding="utf-8")
    plot(experiments, folder / PLOT)
    console.print(f"Wrote {folder / TABLE} and {folder / PLOT}")


def plot(experiments: Sequence[Experiment], path: Path) -> None:
    """Write accuracy against memory and against step time, a row for each experiment, to a PNG file."""
    style: Any = {"font.family": "DejaVu Sans", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(12, 4.2 * len(experiments)), layout="constrained")
        axes = figure.subplots(len(experiments), 2, squeeze=False)
        for (left, right), experiment in zip(axes, experiments, strict=True):
            full = experiment["costs"]["full"]
            costs = experiment["costs"].items()
            memory = {method: cost["estimated_peak_mib"] for method, cost in costs}
            times = {method: cost["step_time_s"] / full["step_time_s"] for method, cost in costs}
            scatter(left, experiment, memory, "memory of a step on a GPU, estimated, MiB")
            scatter(right, experiment, times, "step time / full")
            left.set_title(experiment["experiment"], loc="left", fontweight="bold")
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110)


def scatter(axes: Axes, experiment: Experiment, cost: dict[str, float], label: str) -> None:
    """Plot mean and spread of each method against a cost."""
    for method in methods_of(experiment):
        numbers = values(experiment, method, "steps")
        ours = method.startswith("e3va")
        error = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
        color = OURS if ours else BASELINE_COLOR
        mean = statistics.fmean(numbers)
        axes.errorbar(cost[method], mean, yerr=error, fmt="o", color=color, capsize=3)
        axes.annotate(
            NAMES[method],
            (cost[method], mean),
            xytext=(7, 3),
            textcoords="offset points",
            color=color,
            fontweight="bold" if ours else "normal",
        )
    axes.set_xlabel(label, color=GRAY)
    axes.set_ylabel(f"{experiment['runs'][0]['metric']}, %", color=GRAY)
    axes.grid(alpha=0.25)
    axes.margins(0.15)
