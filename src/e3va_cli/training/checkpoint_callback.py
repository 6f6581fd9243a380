"""When the state of a run is saved, and what of it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from e3va_cli.optim.optimizer import set_fused, update_options
from e3va_cli.runs.folder import BEST_CHECKPOINT, LAST_CHECKPOINT
from e3va_cli.training.checkpoints import MODEL_PREFIX, trainable_state_dict
from e3va_cli.training.graceful_shutdown import GracefulShutdown
from e3va_cli.training.history import histories
from e3va_cli.training.lightning_private import forget_previous_evaluations, is_optimizer_step


class CheckpointCallback(Checkpoint):
    """Saves the last state and the best one, with trainable weights only; a file is replaced as a whole.

    A run resumed from any of these states repeats the rest exactly. Lightning calls this callback after all others.
    `last.ckpt` is written

    - before the first step;
    - after every `every_steps`-th step, and after the step at which a signal or `trainer.max_steps` ends the run;
    - at the start of an evaluation, which a resumed run then repeats;
    - after every epoch, with the results of its evaluation; after every `every_epochs`-th if epochs are short.

    Args:
        folder: of `last.ckpt`, and of `best.ckpt`, which is written after an evaluation with a new best result.
        monitor: logged metric that decides which state is best; higher is better.
        every_steps: optimizer steps between two saved states within an epoch, or None.
        shutdown: tells whether a signal ends the run.
        contents: further entries of a checkpoint, such as its metadata.
    """

    def __init__(
        self, folder: Path, monitor: str, every_steps: int | None, shutdown: GracefulShutdown, contents: dict[str, Any]
    ) -> None:
        super().__init__()
        self.folder, self.monitor = folder, monitor
        self.every_steps, self.shutdown = every_steps, shutdown
        self.contents = contents
        self.best = -math.inf
        self.every_epochs = 1

    @property
    def state_key(self) -> str:
        """Key of the callback's state in a checkpoint, which must not change with the name of the class."""
        return "Checkpoints"

    def state_dict(self) -> dict[str, Any]:
        """Return the best result so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best result of the resumed run."""
        self.best = state_dict["best"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Reduce the weights to the trainable ones, and add the further contents."""
        state = trainable_state_dict(pl_module.model)
        checkpoint["state_dict"] = {f"{MODEL_PREFIX}{name}": value for name, value in state.items()}
        checkpoint |= self.contents

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Let the optimizer and schedule of the resumed run have the options of this run, on its device."""
        optimizer = pl_module.build_optimizer(pl_module.model)
        states = zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True)
        for optimizer_state, scheduler_state in states:
            set_fused(optimizer_state, trainer.strategy.root_device)
            update_options(optimizer_state, scheduler_state, optimizer, pl_module.schedule)

    def save(self, trainer: L.Trainer) -> None:
        """Write `last.ckpt`, after the history of the steps before it."""
        for history in histories(trainer):
            history.flush()
        trainer.save_checkpoint(self.folder / LAST_CHECKPOINT)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state before the first step."""
        if trainer.global_step == 0:
            self.save(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save the state after a step, if it is due and not the epoch's last step, which an evaluation follows."""
        if trainer.is_last_batch or not is_optimizer_step(trainer):
            return
        due = self.every_steps is not None and trainer.global_step % self.every_steps == 0
        if due or self.shutdown.agreed or trainer.global_step == trainer.max_steps:
            self.save(trainer)

    def on_evaluation_start(self, trainer: L.Trainer) -> None:
        """Save the state that an evaluation starts from, if a training run evaluates.

        To be called within the first `validation_step`: Lightning repeats the evaluation only if the state is from
        there; resumed from a hook before or after that step, it would skip the evaluation.
        """
        if trainer.state.fn == TrainerFn.FITTING:
            forget_previous_evaluations(trainer)
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state if its result is the best so far."""
        value = trainer.callback_metrics.get(self.monitor)
        if trainer.sanity_checking or value is None or not value > self.best:
            return
        self.best = float(value)
        trainer.save_checkpoint(self.folder / BEST_CHECKPOINT)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the state after an epoch; an epoch cut short by `trainer.max_steps` has been saved already."""
        epoch, evaluates = trainer.current_epoch + 1, trainer.check_val_every_n_epoch or 1
        due = epoch % self.every_epochs == 0 or epoch % evaluates == 0 or epoch == trainer.max_epochs
        if trainer.is_last_batch and due:
            self.save(trainer)
