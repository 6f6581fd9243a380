"""Plot a benchmark: memory against trainable parameters, and the memory breakdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from e3va_cli.memory.result import Result
from e3va_cli.utils.files import atomic_write

NAMES = {
    "full": "Full",
    "frozen": "Frozen",
    "partial_1": "Partial-1",
    "bitfit": "BitFit",
    "ln_tune": "LN-tune",
    "adapter": "Adapter",
    "adaptformer": "AdaptFormer",
    "lora": "LoRA",
    "lorand": "LoRand",
    "mona": "Mona",
    "colin": "CoLin",
    "e3va": "E3VA",
    "e3va_plus": "E3VA+",
}
STACK = {  # label: categories, color
    "weights": (("weights", "buffers", "batch"), "#3b4a6b"),
    "gradients": (("gradients",), "#6f86b5"),
    "optimizer": (("optimizer",), "#b4c3e0"),
    "backbone activations": (("backbone",), "#d1495b"),
    "adapter activations": (("adapters",), "#edae49"),
    "neck and head activations": (("neck", "head"), "#66a182"),
    "temporary, workspaces": (("transient", "workspaces"), "#c9c9c9"),
}
OURS, BASELINE, GRAY = "#d1495b", "#3b4a6b", "#5f6368"


def plot_benchmark(results: list[Result], path: Path, *, title: str, subtitle: str) -> None:
    """Write the plot of all methods with a peak to a PNG file, 16:9."""
    plotted = sorted((r for r in results if r.peak_mib is not None), key=lambda r: r.peak_mib or 0.0)
    style: Any = {"font.family": "DejaVu Sans", "font.size": 13, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(16, 9))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        figure.suptitle(title, x=0.03, y=0.97, ha="left", fontsize=22, fontweight="bold")
        figure.text(0.03, 0.895, subtitle, ha="left", fontsize=13, color=GRAY)
        plot_scatter(left, plotted)
        plot_breakdown(right, plotted)
        figure.subplots_adjust(left=0.07, right=0.975, top=0.80, bottom=0.10, wspace=0.28)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def plot_scatter(axes: Axes, results: list[Result]) -> None:
    """Plot peak memory against the backbone's trainable parameters."""
    axes.set_title("Memory against trainable parameters", loc="left", fontsize=15, pad=12)
    axes.set_xscale("log")
    axes.set_xlabel("trainable backbone parameters (million, output norms included)")
    axes.set_ylabel("peak memory (GiB)")
    axes.grid(alpha=0.25)
    points = [(r.trainable_params / 1e6, (r.peak_mib or 0.0) / 1024) for r in results]
    highest = max(y for _, y in points)
    for result, (x, y) in zip(results, points, strict=True):
        ours = result.method == "e3va"
        axes.scatter(x, y, s=220 if ours else 110, color=OURS if ours else BASELINE, zorder=3, edgecolor="white")
        label_left = any(
            abs(y - b) < 0.03 * highest and x < a < 4 * x for a, b in points
        )  # another point is close to the right
        axes.annotate(
            NAMES.get(result.method, result.method),
            (x, y),
            xytext=(-12, 0) if label_left else (12, 0),
            textcoords="offset points",
            ha="right" if label_left else "left",
            va="center",
            fontsize=15 if ours else 12,
            fontweight="bold" if ours else "normal",
            color=OURS if ours else BASELINE,
        )
    axes.set_ylim(bottom=0, top=1.08 * highest)
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2.5, high * 4)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def plot_breakdown(axes: Axes, results: list[Result]) -> None:
    """Plot the breakdown of each method's peak as a bar."""
    axes.set_title("Memory breakdown at the peak", loc="left", fontsize=15, pad=12)
    rows = list(reversed(results))  # the most memory at the bottom, the least at the top
    full = next((r.peak_mib for r in results if r.method == "full"), None)
    start = [0.0] * len(rows)
    for label, (categories, color) in STACK.items():
        widths = [sum(r.by_category_mib.get(c, 0.0) for c in categories) / 1024 for r in rows]
        axes.barh(range(len(rows)), widths, left=start, color=color, label=label, height=0.68)
        start = [s + w for s, w in zip(start, widths, strict=True)]
    for row, (result, end) in enumerate(zip(rows, start, strict=True)):
        assert result.peak_mib is not None
        saved = (
            ""
            if full is None or result.method == "full"
            else f"  \N{MINUS SIGN}{100 * (1 - result.peak_mib / full):.0f} %"
        )
        axes.text(end, row, f" {result.peak_mib / 1024:.1f}{saved}", va="center", fontsize=12)
    axes.set_yticks(range(len(rows)), [NAMES.get(r.method, r.method) for r in rows])
    for tick, result in zip(axes.get_yticklabels(), rows, strict=True):
        if result.method == "e3va":
            tick.set(color=OURS, fontweight="bold")
    axes.set_xlabel("peak memory (GiB)")
    axes.set_xlim(0, 1.22 * max(start))
    axes.set_ylim(-0.6, max(len(rows), 6) - 0.4)  # room for the legend above few bars
    axes.legend(frameon=False, fontsize=11, loc="upper right")
