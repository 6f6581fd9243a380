"""The tables that `e3va benchmark-memory` prints."""

from __future__ import annotations

from e3va_cli.commands.console import print_table
from e3va_cli.config.run_config import BenchmarkMemoryConfig
from e3va_cli.memory.benchmark import BenchmarkSpec
from e3va_cli.memory.budget import MAX_BATCH_SIZE
from e3va_cli.memory.result import Result, relative_saving
from e3va_cli.memory.tracker import CATEGORIES
from e3va_cli.paper.claims import Claim
from e3va_cli.paper.published import published_setting

SHORT = {
    "gradients": "grads",
    "optimizer": "optim.",
    "transient": "temp.",
    "workspaces": "worksp.",
    "planned": "estimated",
    "measured and planned": "both",
}
COLORS = {"holds": "green", "does not hold": "red", "not measured": "dim"}


def print_results_table(results: list[Result], backbone: str) -> None:
    """Print parameters, memory and time of each method, with the published values."""
    published = published_setting(backbone)
    timed = any(r.step_time_s is not None for r in results)
    columns = ["method", "trainable", "%", "peak MiB", "saved"]
    columns += ["step s", "saved"] if timed else []
    columns += ["paper:\nparams", "paper:\nsaved"] if published else []
    rows = []
    for result in results:
        row = [
            result.method,
            f"{result.trainable_params / 1e6:.2f} M",
            f"{result.trainable_pct:.2f}",
            number(result.peak_mib, 0),
            percent(relative_saving(results, result.method, "peak_mib")),
        ]
        if timed:
            row += [number(result.step_time_s, 3), percent(relative_saving(results, result.method, "step_time_s"))]
        if published:
            params = published.methods.get(result.method)
            row += ["-" if params is None else f"{params[0]:.2f} M", percent(published.saved_pct(result.method))]
        rows.append(row)
    title = "Backbone parameters include output norms; memory in MiB (2^20 bytes); saved against full fine-tuning"
    styles = ["bold" if result.method == "e3va" else "" for result in results]
    print_table(title, columns, rows, compact=True, styles=styles)


def measured_lines(results: list[Result]) -> list[str]:
    """Return the spread of step times and the estimated peaks, of measured methods."""
    measured = [r for r in results if r.source == "measured" and r.peak_mib is not None]
    if not measured:
        return []
    spreads = [f"{r.method} {number(r.details['step_time_interquartile_range_s'], 3)} s" for r in measured]
    estimates = [f"{r.method} {number(r.details['planned_peak_memory_mib'], 0)} MiB" for r in measured]
    return [f"Interquartile range of step times: {', '.join(spreads)}", f"Estimated peaks: {', '.join(estimates)}"]


def flops_line(results: list[Result]) -> str:
    """Return the floating-point operations of a step."""
    counts = {r.method: r.details["operations_tflop"] for r in results}
    full = counts.get("full")
    shares = [f"{m} {count:.2f}" + (f" ({count / full:.0%})" if full else "") for m, count in counts.items()]
    return f"TFLOPs per step (matrix products, convolutions): {', '.join(shares)}"


def offload_lines(results: list[Result]) -> list[str]:
    """Return the size of offloaded weights, and of their copies to the device per step, of the methods with some."""
    sizes = {
        r.method: [number(r.details.get(key, 0.0), 0) for key in ("offloaded_mib", "streamed_mib")] for r in results
    }
    return [
        f"Offloaded weights of {method}: {offloaded} MiB, two blocks at a time on the device; copies per step: "
        f"{streamed} MiB"
        for method, (offloaded, streamed) in sizes.items()
        if offloaded != "0"
    ]


def print_breakdown_table(results: list[Result]) -> None:
    """Print the breakdown of each peak."""
    shown = [c for c in CATEGORIES if any(r.by_category_mib.get(c, 0) >= 1 for r in results)]
    rows = [[result.method, *(number(result.by_category_mib.get(c), 0) for c in shown)] for result in results]
    header = ["method", *(SHORT.get(c, c) for c in shown)]
    print_table("Memory breakdown at the peak, MiB", header, rows, compact=True)


def peak_lines(results: list[Result]) -> list[str]:
    """Return where the peak occurs, one line per location."""
    locations: dict[str, list[str]] = {}
    for result in results:
        if result.peak_mib is not None:
            locations.setdefault(result.details["peak_at"], []).append(result.method)
    return [f"Peak in {location}: {', '.join(methods)}" for location, methods in locations.items()]


def print_budget_table(config: BenchmarkMemoryConfig, spec: BenchmarkSpec, batches: dict[str, int]) -> None:
    """Print which methods fit the budget, the largest batch of each, and the overrides for it."""
    height, width = spec.size.image_size
    rows = []
    for method, batch in batches.items():
        fits = "[green]yes[/]" if batch >= spec.size.batch_size else "[red]no[/]"
        largest = f"{batch} or more" if batch >= MAX_BATCH_SIZE else str(batch)
        overrides = f"adapter={method} data.batch_size={batch}" if batch else "-"
        rows.append([method, fits, largest, overrides])
    print_table(
        f"Budget {config.budget}, of which {config.reserve_mib:.0f} MiB are reserved for CUDA context and workspaces; "
        f"images of {height}x{width}",
        ["method", "fits", "largest batch", "overrides"],
        rows,
    )


def print_claims_table(claims: list[Claim]) -> None:
    """Print the paper's claims."""
    rows = []
    for claim in claims:
        bound = "" if claim.at_least else "≤ "
        source = SHORT.get(claim.source or "-", claim.source or "-")
        verdict = f"[{COLORS[claim.verdict]}]{claim.verdict}[/]"
        rows.append([claim.claim, f"{bound}{claim.published:g}", number(claim.value, 1), source, verdict])
    header = ["claim", "published", "ours", "source", "verdict"]
    print_table("The paper's claims (arXiv 2306.09729)", header, rows)


def number(value: float | None, digits: int) -> str:
    """Return a number as text, None as a dash."""
    return "-" if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """Return a percentage as text, None as a dash."""
    return "-" if value is None else f"{value:.1f} %"
