"""The metrics of a run: every row in `metrics.csv`, the last evaluation in `metrics.json`."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from e3va_cli.training.lightning_private import is_optimizer_step
from e3va_cli.utils.files import atomic_append, atomic_write, write_json

FIRST_COLUMNS = ("epoch", "step")


class MetricsHistory(Logger):
    """Logs all metrics to a CSV file: a row per step, a column per metric. A resumed run continues the file.

    Rows are appended; a new metric, or a value for a row already on disk, rewrites the file as a whole. The row of the
    current step is written when the next step begins. (Lightning's CSVLogger deletes an existing file.)

    Args:
        path: of the file.

    Attributes:
        last_step: after training, its last step: a later evaluation is logged in that row.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.last_step: int | None = None
        self.rows: list[dict[str, Any]] = []
        self.columns = list(FIRST_COLUMNS)
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            whole = text[: text.rfind("\n") + 1]  # a full disk may have cut the last row
            reader = csv.DictReader(whole.splitlines())
            self.rows = [row for row in reader if (row["step"] or "").isdigit()]
            self.columns = list(reader.fieldnames or FIRST_COLUMNS)
            if self.rows and self.rows[0].get("epoch") == "0":  # written by an older version
                self.rows = [one_based_epoch(row) for row in self.rows]
        self.written = len(self.rows)  # rows in the file
        self.outdated = True  # whether a row in the file has new values

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """Version of the logger: none."""
        return ""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration is in `config.yaml`."""

    def drop_from(self, step: int) -> None:
        """Remove the rows from `step` on, which a resumed run repeats."""
        self.rows = [row for row in self.rows if int(row["step"]) < step]
        self.written = len(self.rows)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add values to the row of `step`."""
        metrics = one_based_epoch(metrics)
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
        """Write the row of the current step too, which may get more values."""
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


def one_based_epoch(values: dict[str, Any]) -> dict[str, Any]:
    """Return metrics with the epoch counted from 1, as in all output; Lightning counts from 0."""
    return {**values, "epoch": int(values["epoch"]) + 1} if values.get("epoch") not in (None, "") else dict(values)


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger, with epochs counted from 1."""

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Log values of `step`."""
        super().log_metrics(one_based_epoch(metrics), step)


def histories(trainer: L.Trainer) -> list[MetricsHistory]:
    """Return the loggers of a trainer that write a history."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsHistory)]


class StepLog(L.Callback):
    """Logs the metrics of a step before its checkpoint is saved.

    Lightning would log them afterwards, so that a run killed in between would never get the row.

    Args:
        every_n_steps: optimizer steps between two rows.
    """

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the means over the batches of a step."""
        if trainer.global_step % self.every_n_steps == 0 and is_optimizer_step(trainer):
            values = {name: float(value) for name, value in pl_module.step_metrics().items()}
            for logger in trainer.loggers:
                logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)
                logger.save()


class MetricsFile(L.Callback):
    """Writes the results of each evaluation to a JSON file, in place of those of the one before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the file on rank 0."""
        if trainer.is_global_zero and pl_module.results is not None:
            write_json(self.path, pl_module.results)
