"""Tables of a reproduction: printed, and written to `results.md` next to `results.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from e3va_cli.utils.files import atomic_write, write_json

PARAMS, PEAK, STEP = "trainable_backbone_params", "peak_memory_allocated_mib", "step_time_s"  # in resources.json
Results = dict[str, Any]
console = Console(highlight=False, markup=False, soft_wrap=True)


def about(results: Results) -> list[str]:
    """Return settings, overrides, devices, versions and date, one line each."""
    settings = results["settings"]
    parts = ", ".join(f"{part} {settings[part]['name']}" for part in ("backbone", "head", "dataset"))
    batch = f"{'/'.join(map(str, results['total_batch'])) or '-'} (the recipe's: {settings['schedule']['total_batch']})"
    versions = [", ".join(f"{name} {number}" for name, number in one.items()) for one in results["versions"]]
    lines = [f"Not the paper's setting: {' '.join(results['not_the_papers'])}"] if results["not_the_papers"] else []
    lines += [
        f"Settings: {parts}, metric {settings['dataset']['metric']}, precision {settings['trainer']['precision']}, "
        f"total batch {batch}",
        f"Overrides: {' '.join(results['overrides']) or 'none'}",
        f"Device: {'; '.join(results['devices']) or '-'}",
        f"Versions: {'; '.join(versions) or '-'}",
        f"Date: {results['date']}",
    ]
    if len(results["devices"]) > 1:
        lines.append("No savings, as the runs were on different devices")
    if results["not_finished"]:
        lines.append(f"Not finished: {'; '.join(results['not_finished'])}")
    return lines + [f"Left out: {text}" for text in results["unreadable"]]


def tables(results: Results) -> list[tuple[str, list[str], list[list[str]]]]:
    """Return title, heading and rows of the accuracy and the cost table."""
    accuracy, cost = [], []
    for e in results["methods"]:
        paper, saved = e["published"], f"{PEAK}_saved_pct"
        accuracy.append([e["method"], ",".join(map(str, e["seeds"])) or "-"])
        for name in results["metrics"]:
            digits = 2 if name == "mIoU" else 1  # as published
            accuracy[-1] += [spread(e[name], digits), number(paper[name], digits)]
        params = [number(value, 2, 1e-6) for value in (e[PARAMS]["mean"], paper[PARAMS])]
        memory = [spread(e[PEAK], 0), number(e[saved], 1), number(paper[saved], 1)]
        cost.append([e["method"], *params, *memory, spread(e[STEP], 3), number(e[f"{STEP}_saved_pct"], 1)])
    headings = [text for name in results["metrics"] for text in (name.replace("_", " "), "paper")]
    columns = ["method", "trainable\nM", "paper\nM", "peak\nMiB", "saved\n%", "paper\n%", "step\ns", "saved\n%"]
    return [
        ("Last evaluation, percent: mean ± sample standard deviation", ["method", "seeds", *headings], accuracy),
        ("Trainable backbone parameters, peak memory and step time; saved against full", columns, cost),
    ]


def number(value: float | None, digits: int, scale: float = 1.0) -> str:
    """Return a number as text, None as a dash."""
    return "-" if value is None else f"{scale * value:,.{digits}f}"


def spread(over: Results, digits: int) -> str:
    """Return the mean with the standard deviation, if there is one."""
    return number(over["mean"], digits) + ("" if over["std"] is None else f" ± {number(over['std'], digits)}")


def report(results: Results, output: Path) -> None:
    """Print the results and write `results.json` and `results.md`."""
    text = [f"# {results['experiment']}", "", *(f"- {line}" for line in about(results))]
    for title, columns, rows in tables(results):
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in columns:
            table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
        heading = " | ".join(column.replace("\n", " ") for column in columns)
        text += ["", title, "", f"| {heading} |", f"|---{'|--:' * (len(columns) - 1)}|"]
        for row in rows:
            table.add_row(*row)
            text.append(f"| {' | '.join(row)} |")
        console.print(table)
    console.print(*about(results), sep="\n")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    with atomic_write(output / "results.md") as temporary:
        temporary.write_text("\n".join([*text, ""]), encoding="utf-8")
    console.print(f"Results: {output}/results.md and results.json")
