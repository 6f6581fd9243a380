"""The progress bar: loss, memory and images per second beside Lightning's own columns; lines where there is none."""

from __future__ import annotations

import time
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.callbacks import RichProgressBar
from rich import get_console

from e3va_cli.training.resources import Resources
from e3va_cli.utils.terminal import Throttle, is_interactive

ROOMY = 100  # characters in which time and speed have room beside the values
BASIC_COLUMNS = 3
REFRESH_S = 1.0  # the values come from the device, and reading one waits for it


class TrainingProgressBar(RichProgressBar):
    """Lightning's rich bar without the version number; without a terminal, a line per epoch and every 30 s.

    Epochs are counted from 1. The values beside the bar are read at most once a second, so that hardly a step waits for
    a GPU.

    Args:
        resources: whose memory and rate are shown in training.
    """

    def __init__(self, resources: Resources | None = None) -> None:
        super().__init__()
        self.resources = resources
        self.speaks = not is_interactive()
        if self.speaks:
            self.disable()
        self._pace = Throttle()
        self._values: dict[str, Any] = {}
        self._loss: dict[str, float] = {}  # of the last training step that was read
        self._read_at = -REFRESH_S

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """Return the values shown beside the bar, at most a second old."""
        if time.monotonic() - self._read_at >= REFRESH_S:
            self._values = self._current(trainer, pl_module)
            self._read_at = time.monotonic()
        return self._values

    def _current(self, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        values = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        if self.resources is None:
            return values
        # A metric that Lightning logs for the bar is read after each batch, which waits for a GPU each time.
        losses = {name.removeprefix("train/"): value for name, value in pl_module.measured().items()}
        if "loss" in losses:
            self._loss = {"loss": float(losses["loss"])}
        memory = {"memory": f"{self.resources.shown_mib:,.0f} MiB"} if self.resources.shown_mib else {}
        return {**self._loss, **values, "img/s": self.resources.rate, **memory}

    def configure_columns(self, trainer: L.Trainer) -> Any:
        """Lightning's columns, as many as have room: description, bar, batches; then time and speed."""
        return super().configure_columns(trainer)[: None if get_console().width >= ROOMY else BASIC_COLUMNS]

    def _get_train_description(self, current_epoch: int) -> str:
        """The epoch, as long as the bar of an evaluation has it."""
        return f"{format_epoch(self.trainer):{len(self.validation_description)}}"

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the bar, or write a line where it is due."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self.speaks and trainer.is_global_zero and self._pace.due():
            place = f"{format_epoch(trainer)}, batch {batch_idx + 1:,} of {trainer.num_training_batches:,}"
            print(f"{place}: {format_values(self._current(trainer, pl_module))}", flush=True)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Move the bar, or write a line where it is due."""
        super().on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if self.speaks and trainer.is_global_zero and self._pace.due():
            print(f"Validation: batch {batch_idx + 1:,} of {sum(trainer.num_val_batches):,}", flush=True)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what the training steps measured, before the evaluation's batches take their place."""
        self._current(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what the bar would have shown."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.speaks and trainer.is_global_zero:
            print(f"{format_epoch(trainer)}: {format_values(self._current(trainer, pl_module))}", flush=True)


def format_epoch(trainer: L.Trainer) -> str:
    """The epoch at hand, counted from 1."""
    return f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"


def format_values(values: dict[str, Any]) -> str:
    """Names and values in a row."""
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in values.items())
