"""Lightning's Trainer for a configuration, with the callbacks and loggers of a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import lightning as L  # noqa: N812 (Lightning's own alias)
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from e3va_cli.config.run_config import RunConfig, to_dict
from e3va_cli.errors import UserError, first_line
from e3va_cli.runs.folder import CHECKPOINTS, METRICS, METRICS_HISTORY, RESOURCES, SKIPPED_STEPS
from e3va_cli.training.checkpoint_callback import CheckpointCallback
from e3va_cli.training.checkpoints import AtomicCheckpointIO
from e3va_cli.training.graceful_shutdown import GracefulShutdown
from e3va_cli.training.history import MetricsFile, MetricsHistory, StepLog, TensorBoard
from e3va_cli.training.nonfinite_guard import NonFiniteGuard
from e3va_cli.training.process_watchdog import ProcessWatchdog
from e3va_cli.training.progress import TrainingProgressBar
from e3va_cli.training.resources import Resources
from e3va_cli.utils.files import report_write_errors


class StepLimit(L.Callback):
    """Ends a run after a number of optimizer steps.

    The trainer gets the limit after a checkpoint has been loaded: with a limit from the start, Lightning resumes from
    the end of an epoch as if from its middle, and counts that epoch twice.
    """

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the limit."""
        trainer.fit_loop.epoch_loop.max_steps = self.max_steps


def build_trainer(
    config: RunConfig,
    folder: Path,
    *,
    monitor: str,
    evaluate_only: bool = False,
    checkpoint_contents: dict[str, Any] | None = None,
) -> L.Trainer:
    """Return a trainer that writes to `folder`.

    Args:
        config: of the run.
        folder: the run folder.
        monitor: metric that decides which state is best; higher is better.
        evaluate_only: omit what only training needs.
        checkpoint_contents: entries of each checkpoint beside Lightning's.

    Raises:
        UserError: this machine does not have the accelerator, devices or strategy.
    """
    options = config.trainer
    with report_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shutdown = GracefulShutdown(None if evaluate_only else folder, options.preemption_signal)
    resources = (
        None if evaluate_only else Resources(folder / RESOURCES, to_dict(config), window=options.log_every_n_steps)
    )
    callbacks: list[Callback] = [
        ProcessWatchdog(),
        TrainingProgressBar(resources),
        MetricsFile(folder / METRICS),
        shutdown,
    ]
    loggers: list[Logger] = []
    if resources is not None:
        loggers.append(MetricsHistory(folder / METRICS_HISTORY))
        if options.tensorboard:
            loggers.append(TensorBoard(folder, name="tensorboard", version=""))
        checkpoints, every_steps = folder / CHECKPOINTS, options.checkpoint_every_steps
        callbacks += [
            NonFiniteGuard(folder / SKIPPED_STEPS, options.max_nonfinite_steps),
            resources,
            LearningRateMonitor("step"),
            StepLog(options.log_every_n_steps),
            CheckpointCallback(checkpoints, monitor, every_steps, shutdown, checkpoint_contents or {}),
        ]
        if options.max_steps is not None:
            callbacks.append(StepLimit(options.max_steps))
        if options.early_stopping_patience is not None:
            # Not strict: an evaluation without results neither stops the run nor counts as a worse one.
            patience = options.early_stopping_patience
            callbacks.append(EarlyStopping(monitor, mode="max", patience=patience, strict=False))
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # it would save within a step; see GracefulShutdown
    try:
        return L.Trainer(
            default_root_dir=folder,
            accelerator=options.accelerator,
            devices=options.devices,
            num_nodes=options.num_nodes,
            strategy=options.strategy,
            precision=cast(Any, options.precision),
            max_epochs=-1 if options.max_epochs is None else options.max_epochs,
            limit_train_batches=options.limit_train_batches,
            limit_val_batches=options.limit_val_batches,
            check_val_every_n_epoch=options.val_every_epochs,
            accumulate_grad_batches=options.accumulate_grad_batches,
            gradient_clip_val=options.gradient_clip_norm,
            deterministic=options.deterministic,
            log_every_n_steps=options.log_every_n_steps,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # the data module builds its samplers
            callbacks=callbacks,
            logger=loggers or False,
            plugins=plugins,
            enable_model_summary=False,
            enable_checkpointing=not evaluate_only,
        )
    except (MisconfigurationException, ImportError, RuntimeError, ValueError) as error:
        raise UserError(f"trainer: {first_line(error)}") from error
