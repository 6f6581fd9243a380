"""The history of a run's metrics as one CSV file, one row per step; a resumed run goes on in it."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from e3va_cli.files import replacing

FIRST = ("epoch", "step")


class MetricsHistory(Logger):
    """Writes every logged metric to a CSV file with a column per metric.

    Lightning's CSVLogger deletes the file of a folder that is used again; this one keeps it.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    @property
    def name(self) -> str:
        """Of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """There is one."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The configuration has a file of its own."""

    def drop_after(self, step: int) -> None:
        """Forget rows later than `step`: the resumed run will make those steps again."""
        self.rows = [row for row in self.rows if int(row["step"]) <= step]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of `step`."""
        if not self.rows or int(self.rows[-1]["step"]) != step:
            self.rows.append({"step": step})
        self.rows[-1].update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write all rows."""
        if not self.rows:
            return
        names = {name: None for row in self.rows for name in row}
        columns = [*FIRST, *(name for name in sorted(names) if name not in FIRST)]
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write at the end."""
        self.save()
