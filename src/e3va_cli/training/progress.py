"""The progress bar: loss, memory and images per second beside Lightning's own columns."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's rich bar without the version number; where there is no terminal for a bar, a line per epoch."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """The values shown beside the bar."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print what the bar would have shown."""
        super().on_train_epoch_end(trainer, pl_module)
        if trainer.is_global_zero and not sys.stdout.isatty():
            values = ", ".join(f"{k} {v:.4g}" for k, v in self.get_metrics(trainer, pl_module).items())
            print(f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}: {values}", flush=True)
