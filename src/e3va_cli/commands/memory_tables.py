"""The tables that `e3va benchmark-memory` prints."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table

from e3va_cli.memory.benchmark import Setting
from e3va_cli.memory.budget import LARGEST_BATCH
from e3va_cli.memory.claims import Claim
from e3va_cli.memory.published import published_setting
from e3va_cli.memory.result import Result, against_full
from e3va_cli.memory.tracker import KINDS
from e3va_cli.run_config import BenchmarkMemoryConfig

SHORT = {
    "gradients": "grads",
    "optimizer": "optim.",
    "transient": "passing",
    "workspaces": "cuBLAS",
    "measured and planned": "both",
}
COLOURS = {"holds": "green", "does not hold": "red", "not measured": "dim"}


def results_table(results: list[Result], backbone: str) -> Table:
    """Parameters, memory and time of each method, the published figures beside ours."""
    published = published_setting(backbone)
    timed = any(r.step_time_s is not None for r in results)
    columns = ["method", "trainable", "%", "peak MiB", "saved"]
    columns += ["step s", "saved"] if timed else []
    columns += ["paper:\nparams", "paper:\nsaved"] if published else []
    table = Table(
        title="Backbone parameters with output norms; saved: against full fine-tuning",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
        pad_edge=False,
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for result in results:
        row = [
            result.method,
            f"{result.trainable_params / 1e6:.2f} M",
            f"{result.trainable_pct:.2f}",
            number(result.peak_mib, 0),
            percent(against_full(results, result.method, "peak_mib")),
        ]
        if timed:
            row += [number(result.step_time_s, 3), percent(against_full(results, result.method, "step_time_s"))]
        if published:
            params = published.methods.get(result.method)
            row += ["-" if params is None else f"{params[0]:.2f} M", percent(published.saved_pct(result.method))]
        table.add_row(*row, style="bold" if result.method == "e3va" else "")
    return table


def measured_lines(results: list[Result]) -> list[str]:
    """The spread of measured step times, and what the plan said of measured peaks."""
    measured = [r for r in results if r.source == "measured" and r.peak_mib is not None]
    if not measured:
        return []
    spreads = [f"{r.method} {number(r.details['step_time_interquartile_range_s'], 3)} s" for r in measured]
    plans = [f"{r.method} {number(r.details['planned_peak_memory_mib'], 0)} MiB" for r in measured]
    return [f"Interquartile range of step times: {', '.join(spreads)}", f"Planned peaks: {', '.join(plans)}"]


def operations_line(results: list[Result]) -> str:
    """What arithmetic a step holds, which is what bounds its time where nothing else does."""
    counts = {r.method: r.details["operations_tflop"] for r in results}
    full = counts.get("full")
    shares = [f"{m} {count:.2f}" + (f" ({count / full:.0%})" if full else "") for m, count in counts.items()]
    return f"Operations of a step (matrix products, convolutions), TFLOP: {', '.join(shares)}"


def kinds_table(results: list[Result]) -> Table:
    """What holds the memory at the peak."""
    table = Table(
        title="What holds the memory at the peak, MiB",
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    shown = [kind for kind in KINDS if any(r.by_kind_mib.get(kind, 0) >= 1 for r in results)]
    for kind in shown:
        table.add_column(SHORT.get(kind, kind), justify="right", no_wrap=True)
    for result in results:
        values = [number(result.by_kind_mib.get(kind), 0) for kind in shown]
        table.add_row(result.method, *values)
    return table


def peak_lines(results: list[Result]) -> list[str]:
    """Where the peak falls, one line for each place."""
    places: dict[str, list[str]] = {}
    for result in results:
        if result.peak_mib is not None:
            places.setdefault(result.details["peak_at"], []).append(result.method)
    return [f"The peak falls in the {place}: {', '.join(methods)}" for place, methods in places.items()]


def budget_table(config: BenchmarkMemoryConfig, setting: Setting, batches: dict[str, int]) -> Table:
    """Which methods fit, how large a batch does, and the words to use."""
    height, width = setting.size.image_size
    table = Table(
        "method",
        "fits",
        "largest batch",
        "overrides",
        title=f"Within {config.budget}, {config.reserve_mib:.0f} MiB of it kept for what no tensor tells of; "
        f"images of {height}x{width}",
    )
    for method, batch in batches.items():
        fits = "[green]yes[/]" if batch >= setting.size.batch_size else "[red]no[/]"
        largest = f"{batch} or more" if batch >= LARGEST_BATCH else str(batch)
        words = f"adapter={method} data.batch_size={batch}" if batch else "-"
        table.add_row(method, fits, largest, words)
    return table


def claims_table(claims: list[Claim]) -> Table:
    """The paper's claims."""
    table = Table("claim", title="The paper's claims (arXiv 2306.09729)")
    for column in ("published", "found", "source", "verdict"):
        table.add_column(column, justify="right")
    for claim in claims:
        bound = "" if claim.at_least else "≤ "
        source = SHORT.get(claim.source or "-", claim.source or "-")
        verdict = f"[{COLOURS[claim.verdict]}]{claim.verdict}[/]"
        table.add_row(claim.claim, f"{bound}{claim.published:g}", number(claim.found, 1), source, verdict)
    return table


def number(value: float | None, digits: int) -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A percentage, or a dash."""
    return "-" if value is None else f"{value:.1f} %"
