"""The progress bar: loss, memory and images per second beside Lightning's own columns."""

from __future__ import annotations

from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.callbacks import RichProgressBar


class Progress(RichProgressBar):
    """Lightning's rich bar without the version number."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        """The values shown beside the bar."""
        return {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
