"""Names of classes as matplotlib writes them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from e3va_cli.visualization.fonts import families_for, legible_names

logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # of fonts that have one weight alone

LONGEST = 24  # letters


def as_labels(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return names as far as there is room, and the fonts that draw them, for matplotlib's `font.family`.

    They have nothing that matplotlib takes for mathematics, or for a line that is not in the legend.
    """
    short = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}" for name in shown(names)]
    return [name.replace("$", r"\$") for name in short], families_for(short)


def shown(names: Sequence[str]) -> list[str]:
    """Return legible names; an underscore at the beginning is kept from hiding a line."""
    return [f" {name}" if name.startswith("_") else name for name in legible_names(names)]
