"""Plot of precision-recall curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from e3va_cli.utils.files import atomic_write
from e3va_cli.visualization.fonts import plot_labels

RECALL = np.linspace(0.0, 1.0, 101)  # where COCO samples precision
MAX_NAMED = 12  # classes with own color and legend entry; more are thin lines
MEAN_COLOR, CLASS_COLOR = "#222222", "#9fb0cc"
COLORS = (
    "#d1495b",
    "#edae49",
    "#66a182",
    "#2e86ab",
    "#8e6c8a",
    "#c77dff",
    "#7f5539",
    "#00a6a6",
    "#f26419",
    "#5b8e23",
    "#5b5f97",
    "#e56b9c",
)


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision-recall curves of all classes at IoU 0.5.

    Attributes:
        names: of the K classes.
        precision: (K, 101), at each recall of `RECALL`, -1 for a class without objects.
        average: AP of each class at IoU 0.5, None for a class without objects.
    """

    names: Sequence[str]
    precision: NDArray[np.float64]
    average: Sequence[float | None]


def plot_precision_recall(curves_by_type: dict[str, PrecisionRecall], path: Path) -> None:
    """Plot one panel each for box and mask to a PNG file: a line for each class, and their mean."""
    labels, families = zip(*(plot_labels(curves.names) for curves in curves_by_type.values()), strict=True)
    with rc_context({"font.family": families[0], "font.size": 11}):
        figure = Figure(figsize=(9.5 * len(curves_by_type), 6), layout="constrained")
        panels = figure.subplots(1, len(curves_by_type), squeeze=False)[0]
        for axes, (iou_type, curves), names in zip(panels, curves_by_type.items(), labels, strict=True):
            _draw_panel(axes, iou_type, curves, names)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def _draw_panel(axes: Axes, iou_type: str, curves: PrecisionRecall, names: Sequence[str]) -> None:
    present = [k for k, average in enumerate(curves.average) if average is not None]
    _frame(axes, f"Precision and recall, {iou_type}, IoU 0.5")
    if not present:
        return
    few = len(present) <= MAX_NAMED
    for k, color in zip(present, COLORS if few else [CLASS_COLOR] * len(present), strict=False):
        label = f"{names[k]}  {100 * (curves.average[k] or 0.0):.1f}" if few else "_"  # not in the legend
        if not few and k == present[0]:
            label = "each class"
        axes.plot(RECALL, curves.precision[k], color=color, linewidth=1.6 if few else 0.7, label=label)
    mean = float(np.mean([curves.average[k] or 0.0 for k in present]))
    label = f"mean of {len(present)} classes  {100 * mean:.1f}"
    axes.plot(RECALL, curves.precision[present].mean(0), color=MEAN_COLOR, linewidth=3, label=label)
    # Beside the axes, as curves can be anywhere.
    axes.legend(title="AP50, percent", loc="upper left", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)


def _frame(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, pad=10)
    axes.set_xlabel("recall")
    axes.set_ylabel("precision")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
