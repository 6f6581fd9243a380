"""The progress bar of a run: loss, memory and images per second; lines of text without a terminal."""

from __future__ import annotations

import time
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

from e3va_cli.training.resources import Resources
from e3va_cli.utils.terminal import Throttle, is_interactive

MIN_WIDTH = 100  # characters of a terminal that shows time and speed beside the metrics
NARROW_COLUMNS = 3
REFRESH_S = 1.0  # reading a metric synchronizes with the device


class TrainingProgressBar(RichProgressBar):
    """Lightning's Rich progress bar; without a terminal, prints a line per epoch and every 30 s.

    Epochs are counted from 1. Metrics are read at most once a second, so that few steps wait for a GPU.

    Args:
        resources: measures the memory and speed that are shown in training.
    """

    def __init__(self, resources: Resources | None = None) -> None:
        super().__init__()
        self.resources = resources
        self.prints_lines = not is_interactive()
        if self.prints_lines:
            self.disable()
        self._throttle = Throttle()
        self._metrics: dict[str, Any] = {}
        self._loss: dict[str, float] = {}  # of the last training step that was read
        self._read_at = -REFRESH_S

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """Return the metrics beside the bar, at most a second old."""
        if time.monotonic() - self._read_at >= REFRESH_S:
            self._metrics = self._read(trainer, pl_module)
            self._read_at = time.monotonic()
        return self._metrics

    def _read(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        metrics = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        if self.resources is None:
            return metrics
        # Logged by Lightning with prog_bar=True, the loss would be read after each batch.
        losses = {name.removeprefix("train/"): value for name, value in pl_module.step_metrics().items()}
        if "loss" in losses:
            self._loss = {"loss": float(losses["loss"])}
        memory = {"memory": f"{self.resources.shown_mib:,.0f} MiB"} if self.resources.shown_mib else {}
        return {**self._loss, **metrics, "img/s": self.resources.rate, **memory}

    def configure_columns(self, trainer: L.Trainer) -> Any:
        """Return Lightning's columns: description, bar, batches, and in a wide terminal time and speed."""
        return super().configure_columns(trainer)[: None if get_console().width >= MIN_WIDTH else NARROW_COLUMNS]

    def _get_train_description(self, current_epoch: int) -> str:
        """Return the epoch, padded to the width of an evaluation's description."""
        return f"{format_epoch(self.trainer):{len(self.validation_description)}}"

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Update the bar, or print a line every 30 s."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._prints(trainer) and self._throttle.ready():
            position = f"{format_epoch(trainer)}, batch {batch_idx + 1:,} of {trainer.num_training_batches:,}"
            self.print(f"{position}: {format_values(self._read(trainer, pl_module))}", flush=True)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Update the bar, or print a line every 30 s."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self._prints(trainer) and self._throttle.ready():
            self.print(f"Validation: batch {batch_idx + 1:,} of {sum(trainer.num_val_batches):,}", flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read the metrics of the last training step before the evaluation replaces its batches."""
        self._read(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print a line if there is no bar."""
        super().on_train_epoch_end(trainer, pl_module)
        if self._prints(trainer):
            self.print(f"{format_epoch(trainer)}: {format_values(self._read(trainer, pl_module))}", flush=True)

    def _prints(self, trainer: L.Trainer) -> bool:
        return self.prints_lines and trainer.is_global_zero


def format_epoch(trainer: L.Trainer) -> str:
    """Return the current epoch, counted from 1, and the number of epochs."""
    return f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"


def format_values(values: dict[str, Any]) -> str:
    """Return names and values separated by commas."""
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in values.items())
