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
    """Writes every logged metric to a CSV file: a row per step, a column per metric.

    Rows are appended; a new metric rewrites the file with one more column. The row of the current step is written once
    the next step begins. Lightning's CSVLogger deletes the file of a folder that is used again; this one goes on in it.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.columns = list(FIRST)
        self.written = 0  # rows that the file holds, under the columns that it has
        if path.is_file():
            with path.open(newline="") as file:
                reader = csv.DictReader(file)
                self.rows = [
                    row for row in reader if (row["step"] or "").isdigit()
                ]  # a killed run may leave half a row
                self.columns = list(reader.fieldnames or FIRST)

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

    def drop_from(self, step: int) -> None:
        """Forget the rows from `step` on: the resumed run will make those steps again."""
        self.rows = [row for row in self.rows if int(row["step"]) < step]

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of `step`."""
        if not self.rows or int(self.rows[-1]["step"]) != step:
            self.rows.append({"step": step})
        self.rows[-1].update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write the rows of all steps but the current one."""
        self._write(len(self.rows) - 1)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last row too."""
        self._write(len(self.rows))

    def _write(self, end: int) -> None:
        rows = self.rows[self.written : end]
        new = sorted({name for row in rows for name in row} - set(self.columns))
        if new or (rows and not self.written):
            self.columns += new
            with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows[:end])
        elif rows:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns).writerows(rows)
        self.written = max(self.written, end)
