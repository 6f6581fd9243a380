"""Plot of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from e3va_cli.utils.files import atomic_write
from e3va_cli.visualization.fonts import plot_labels

MAX_ANNOTATED_CLASSES = 30  # above which cells have no numbers
EMPTY_ROW = "#e6e6e6"  # of classes without annotated pixels
GRAY = "#5f6368"


def plot_confusion_matrix(matrix: NDArray[np.int64], classes: Sequence[str], path: Path) -> None:
    """Plot a confusion matrix (K, K), annotated by predicted, in percent of each row, to a PNG file.

    Cells have numbers for up to 30 classes; the plot grows with the number of classes.
    """
    count = len(classes)
    annotated = matrix.sum(1, keepdims=True)
    shares = np.divide(100 * matrix, annotated, out=np.full(matrix.shape, np.nan), where=annotated > 0)
    side = max(7.0, 0.62 * count if count <= MAX_ANNOTATED_CLASSES else 0.145 * count + 3)  # inches
    size = 10.0 if count <= MAX_ANNOTATED_CLASSES else 7.0  # points
    large = max(11.0, 0.6 * side)
    names, families = plot_labels(classes)
    with rc_context({"font.family": families, "font.size": size}):
        figure = Figure(figsize=(side + 1.2, side), layout="constrained")
        axes = figure.subplots()
        axes.set_facecolor(EMPTY_ROW)
        # Square-root color scale, so that a few percent of confusion are visible.
        image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
        axes.set_xticks(range(count), names, rotation=90)
        axes.set_yticks(range(count), names)
        axes.tick_params(length=0)
        axes.set_xlabel("predicted", fontsize=large)
        axes.set_ylabel("annotated", fontsize=large)
        title = "Confusion, percent of the annotated pixels of each class"
        empty = "" if annotated.all() else "\ngray: none annotated"
        axes.set_title(title + empty, loc="left", fontsize=large)
        if count <= MAX_ANNOTATED_CLASSES:
            for row, column in np.argwhere(shares >= 0.5):
                share = shares[row, column]
                color = "white" if share > 35 else GRAY
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=9, color=color)
        scale = figure.colorbar(image, ax=axes, shrink=0.6, fraction=0.04, ticks=[0, 1, 5, 10, 25, 50, 100])
        scale.set_label("percent", fontsize=large)
        scale.ax.tick_params(labelsize=large)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)
