"""The history of a run's metrics as one CSV file, one row per step; a resumed run goes on in it."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from e3va_cli.training.steps import is_optimizer_step
from e3va_cli.utils.files import atomic_append, atomic_write

FIRST = ("epoch", "step")


class MetricsHistory(Logger):
    """Writes every logged metric to a CSV file: a row per step, a column per metric.

    Rows are appended; a new metric, or one more value in a row that is on disk, rewrites the file as a whole. The row
    of the current step is written once the next step begins. Lightning's CSVLogger deletes the file of a folder that
    is used again; this one goes on in it.

    Args:
        path: of the file.

    Attributes:
        last_step: after training, its last step, to whose row an evaluation then belongs.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.last_step: int | None = None
        self.rows: list[dict[str, Any]] = []
        self.columns = list(FIRST)
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a full disk may leave half a row, and half a number in it
            reader = csv.DictReader(whole.splitlines())
            self.rows = [row for row in reader if (row["step"] or "").isdigit()]
            self.columns = list(reader.fieldnames or FIRST)
            if self.rows and self.rows[0].get("epoch") == "0":  # as an older e3va counted
                self.rows = [counted_from_one(row) for row in self.rows]
        self.written = len(self.rows)  # rows that the file holds, under the columns that it has
        self.outdated = True  # whether the file lacks something of these rows

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
        self.written = len(self.rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of `step`."""
        metrics = counted_from_one(metrics)
        if self.last_step is not None:
            step, metrics = self.last_step, {name: value for name, value in metrics.items() if name != "epoch"}
        if not self.rows or int(self.rows[-1]["step"]) != step:
            self.rows.append({"step": step})
        elif self.written == len(self.rows):
            self.outdated = True
        self.rows[-1].update(metrics)

    @rank_zero_only
    def save(self) -> None:
        """Write the rows of all steps but the current one."""
        self._write(len(self.rows) - 1)

    @rank_zero_only
    def flush(self) -> None:
        """Write the current step's row too, though more may come to it."""
        self._write(len(self.rows))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the last row too."""
        self._write(len(self.rows))

    def _write(self, end: int) -> None:
        end = max(end, self.written)
        unwritten = self.rows[self.written : end]
        named = self.rows[:end] if self.outdated else unwritten
        new = sorted({name for row in named for name in row} - set(self.columns))
        if new or (self.outdated and end) or (unwritten and not self.path.is_file()):
            self.columns += new
            with atomic_write(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(self.rows[:end])
            self.outdated = False
        elif unwritten:
            with atomic_append(self.path) as file:
                csv.DictWriter(file, self.columns).writerows(unwritten)
        self.written = end


def counted_from_one(values: dict[str, Any]) -> dict[str, Any]:
    """Metrics with their epoch as users see it everywhere; Lightning counts from 0."""
    return {**values, "epoch": int(values["epoch"]) + 1} if values.get("epoch") not in (None, "") else dict(values)


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, with epochs counted from 1."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Add values at `step`."""
        super().log_metrics(counted_from_one(metrics), step)


def histories(trainer: L.Trainer) -> list[MetricsHistory]:
    """Those of a trainer's loggers that keep a history."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsHistory)]


class StepLog(L.Callback):
    """Logs what a step has measured, before the step's checkpoint is written.

    Lightning logs it after that, so that a run killed between the two would lack the step's row for good.

    Args:
        window: steps between two rows.
    """

    def __init__(self, window: int) -> None:
        self.window = window

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the batches of a step measured on the mean."""
        if trainer.global_step % self.window == 0 and is_optimizer_step(trainer):
            values = {name: float(value) for name, value in pl_module.measured().items()}
            for logger in trainer.loggers:
                logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)
                logger.save()
