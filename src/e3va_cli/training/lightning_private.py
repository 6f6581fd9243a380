"""Everything that uses a part of Lightning without a public name, see `tests/training/test_lightning_private.py`."""

from __future__ import annotations

import logging
import signal
import subprocess
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.plugins.precision.amp import _optimizer_handles_unscaling
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

optimizer_handles_unscaling = _optimizer_handles_unscaling  # true of fused optimizers: their step unscales gradients
launcher_log = logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script")


def is_optimizer_step(trainer: L.Trainer) -> bool:
    """Return whether the current batch ends an optimizer step; the batches accumulated before it do not."""
    return not trainer.fit_loop._should_accumulate()


def child_processes(trainer: L.Trainer) -> list[subprocess.Popen[bytes]]:
    """Return the processes of a run on several devices that this process has started."""
    launcher = trainer.strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def kill_children(trainer: L.Trainer) -> bool:
    """Kill the processes that this process has started, and return whether there were any."""
    if not child_processes(trainer):
        return False
    trainer.strategy.launcher.kill(signal.SIGKILL)  # type: ignore[union-attr]
    return True


def forget_previous_evaluations(trainer: L.Trainer) -> None:
    """Reset the count of evaluated batches to those of the current evaluation.

    Lightning counts the batches of all attempts at an evaluation, and would skip an evaluation that is started for
    the third time.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.total.load_state_dict(progress.current.state_dict())


def completed_epochs(checkpoint: dict[str, Any]) -> int:
    """Return the number of epochs that a checkpoint's run has completed.

    Raises:
        LookupError, TypeError: the checkpoint has no such number.
    """
    # "processed", as "completed" is increased only after the checkpoint of an epoch's end has been saved
    return int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
