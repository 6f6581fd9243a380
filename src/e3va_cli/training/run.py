"""A run put together from a configuration: data, model, task and trainer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch

from e3va_cli.config.compatibility import check_compatibility, check_targets
from e3va_cli.config.run_config import RunConfig
from e3va_cli.data import DenseDataModule, DenseDataset, build_datasets
from e3va_cli.errors import UserError
from e3va_cli.evaluation import build_evaluator
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import DenseModel, build_model
from e3va_cli.optim.lr_schedules import build_schedule
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.optim.train_schedule import TrainSchedule, build_train_schedule
from e3va_cli.runs.folder import SKIPPED_STEPS
from e3va_cli.training.checkpoint_callback import CheckpointCallback
from e3va_cli.training.checkpoints import about_model
from e3va_cli.training.lightning_module import DenseLightningModule
from e3va_cli.training.nonfinite_guard import NonFiniteGuard
from e3va_cli.training.trainer import build_trainer


@dataclass
class Run:
    """Everything that training or evaluation needs; `train` and `course` are None where only evaluation is wanted."""

    train: DenseDataset | None
    val: DenseDataset
    model: DenseModel
    task: DenseLightningModule
    data: DenseDataModule
    trainer: L.Trainer
    course: TrainSchedule | None


def build_run(config: RunConfig, folder: Path, *, evaluate_only: bool = False) -> Run:
    """Open the data first, as that fails fastest, then build the model and the trainer.

    Raises:
        UserError: data or weights that cannot be used.
    """
    check_compatibility(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    needs = HEADS[config.head.name].target_types
    train, val = build_datasets(config.dataset, train=not evaluate_only, targets=needs)
    for split in filter(None, (train, val)):
        check_targets(config, split.target_types)
    torch.manual_seed(config.seed)
    model = build_model(config, num_classes=len(val.classes))
    evaluator = build_evaluator(config.dataset.metric, val, sorted(model.head.target_types))
    data = DenseDataModule(train, val, config.data, seed=config.seed)
    trainer = build_trainer(config, folder, monitor=f"val/{evaluator.monitor}", evaluate_only=evaluate_only)
    options = config.trainer
    require_enough(trainer.world_size, train, val, skip_oom=options.skip_oom)
    course = schedule = None
    optimizer = config.optimizer
    if not evaluate_only:
        devices = trainer.world_size
        course = train_schedule_of(config, batches_per_epoch=data.batches_per_epoch(devices), devices=devices)
        follow(course, trainer)
        optimizer = replace(optimizer, lr=course.lr)
        schedule = build_schedule(config.schedule, course)
    task = DenseLightningModule(
        model,
        evaluator,
        optimizer=partial(build_optimizer, options=optimizer),
        schedule=schedule,
        about=about_model(model.identity, config, val.classes, val.category_ids),
        seed=config.seed,
        guard=NonFiniteGuard(folder / SKIPPED_STEPS, options.max_nonfinite_steps, skip_oom=options.skip_oom),
        data={name: asdict(split.fingerprint()) for name, split in (("train", train), ("val", val)) if split and train},
    )
    return Run(train, val, model, task, data, trainer, course)


def train_schedule_of(config: RunConfig, *, batches_per_epoch: int, devices: int) -> TrainSchedule:
    """Return the course of a run whose devices get so many batches each of one pass over the training images."""
    trainer = config.trainer
    return build_train_schedule(
        config.schedule,
        lr=config.optimizer.lr,
        batch_size=config.data.batch_size,
        accumulated=trainer.accumulate_grad_batches,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        batches_per_epoch=min(batches_per_epoch, trainer.limit_train_batches or batches_per_epoch),
        devices=devices,
    )


def follow(course: TrainSchedule, trainer: L.Trainer) -> None:
    """Give the trainer the length of the run, known only now that the devices are counted.

    A run with more and shorter epochs than its recipe evaluates as often as the recipe does, and keeps its state.
    """
    trainer.fit_loop.max_epochs = course.epochs
    assert trainer.check_val_every_n_epoch is not None
    trainer.check_val_every_n_epoch = max(1, round(trainer.check_val_every_n_epoch * course.stretch))
    if isinstance(trainer.checkpoint_callback, CheckpointCallback):
        trainer.checkpoint_callback.every_epochs = max(1, round(course.stretch))


def require_enough(devices: int, train: DenseDataset | None, val: DenseDataset, *, skip_oom: bool) -> None:
    """Check what several devices need.

    Raises:
        UserError: an image for each of them, and no step that one leaves out while the others wait for it.
    """
    for name, split in (("train", train), ("val", val)):
        if split is not None and len(split) < devices:
            raise UserError(f"trainer.devices: {devices} devices cannot share {len(split)} {name} images; use fewer")
    if devices > 1 and skip_oom:
        raise UserError(
            f"trainer.skip_oom=true: works on one device, not on {devices}; those that have the memory for a step "
            "would wait for the one that has not"
        )
