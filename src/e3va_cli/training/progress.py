"""The progress bar: loss, memory and images per second beside Lightning's own columns."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.callbacks import RichProgressBar

from e3va_cli.training.resources import Resources

REFRESH_S = 1.0  # the values come from the device, and reading one waits for it


class Progress(RichProgressBar):
    """Lightning's rich bar without the version number; where there is no terminal for a bar, a line per epoch.

    The values beside the bar are read at most once a second, so that hardly a step waits for a GPU.

    Args:
        resources: whose memory and rate are shown in training.
    """

    def __init__(self, resources: Resources | None = None) -> None:
        super().__init__()
        self.resources = resources
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
        return {**self._loss, **values, "img/s": self.resources.rate, "MiB": self.resources.shown_mib}

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what the training steps measured, before the evaluation's batches take their place."""
        self._current(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what the bar would have shown."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.is_global_zero and not sys.stdout.isatty():
            values = ", ".join(f"{k} {v:.4g}" for k, v in self._current(trainer, pl_module).items())
            print(f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {values}", flush=True)
