"""The last evaluation of a run, in `metrics.json`."""

from __future__ import annotations

from pathlib import Path

import lightning as L  # noqa: N812 (Lightning's own alias)

from e3va_cli.runs.folder import METRICS
from e3va_cli.utils.files import write_json


class MetricsFile(L.Callback):
    """Writes the results of every evaluation over those of the one before."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file, on the first rank."""
        if trainer.is_global_zero and pl_module.results is not None:
            write_json(self.path, pl_module.results)
