"""A run built from a configuration: data, model, LightningModule and trainer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch

from e3va_cli.config.compatibility import check_compatibility, check_targets
from e3va_cli.config.run_config import RunConfig
from e3va_cli.data import DenseDataModule, DenseDataset, build_datasets
from e3va_cli.errors import UserError
from e3va_cli.evaluation import build_evaluator
from e3va_cli.models.backbones import BackboneFingerprint, ResidualBackbone
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import DenseModel, build_model
from e3va_cli.optim.lr_schedules import build_schedule
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.optim.train_schedule import TrainSchedule, build_train_schedule
from e3va_cli.training.checkpoint_callback import CheckpointCallback
from e3va_cli.training.checkpoints import FINGERPRINTS_KEY, METADATA_KEY, build_metadata
from e3va_cli.training.lightning_module import DenseLightningModule
from e3va_cli.training.trainer import build_trainer


@dataclass
class TrainingRun:
    """Everything that training or evaluation needs.

    Attributes:
        train: training images; None for an evaluation alone.
        val: validation images.
        model: the network.
        lightning_module: trains and evaluates it.
        data: loads batches of both splits.
        trainer: Lightning's, with the callbacks of the run folder.
        train_schedule: length and learning rate of the run; None for an evaluation alone.
        checkpoint_contents: metadata of the model and fingerprints of the data, which each checkpoint has.
    """

    train: DenseDataset | None
    val: DenseDataset
    model: DenseModel
    lightning_module: DenseLightningModule
    data: DenseDataModule
    trainer: L.Trainer
    train_schedule: TrainSchedule | None
    checkpoint_contents: dict[str, Any]


def build_run(
    config: RunConfig,
    folder: Path,
    *,
    evaluate_only: bool = False,
    backbone: tuple[ResidualBackbone, BackboneFingerprint] | None = None,
) -> TrainingRun:
    """Open the data, whose errors show fastest, then build the model and the trainer.

    Args:
        config: of the run.
        folder: the run folder.
        evaluate_only: omit what only training needs.
        backbone: to use in place of a new one.

    Raises:
        UserError: data, weights or devices cannot be used.
    """
    check_compatibility(config)
    L.seed_everything(config.seed, workers=True, verbose=False)
    needs = HEADS[config.head.name].target_types
    train, val = build_datasets(config.dataset, train=not evaluate_only, targets=needs)
    for split in filter(None, (train, val)):
        check_targets(config, split.target_types)
    torch.manual_seed(config.seed)
    model = build_model(config, num_classes=len(val.classes), backbone=backbone)
    evaluator = build_evaluator(config.dataset.metric, val, sorted(model.head.target_types))
    data = DenseDataModule(train, val, config.data, seed=config.seed)
    splits = {} if train is None else {"train": train, "val": val}
    contents = {
        METADATA_KEY: build_metadata(model.identity, config, val.classes, val.category_ids),
        FINGERPRINTS_KEY: {name: asdict(split.fingerprint()) for name, split in splits.items()},
    }
    monitor = f"val/{evaluator.monitor}"
    trainer = build_trainer(config, folder, monitor=monitor, evaluate_only=evaluate_only, checkpoint_contents=contents)
    check_devices(trainer.world_size, train, val, skip_oom=config.trainer.skip_oom)
    train_schedule = factor = None
    optimizer = config.optimizer
    if not evaluate_only:
        devices = trainer.world_size
        train_schedule = train_schedule_from_config(
            config, batches_per_epoch=data.batches_per_epoch(devices), devices=devices
        )
        apply_train_schedule(train_schedule, trainer)
        optimizer = replace(optimizer, lr=train_schedule.lr)
        factor = build_schedule(config.schedule, train_schedule)
    lightning_module = DenseLightningModule(
        model,
        evaluator,
        optimizer=partial(build_optimizer, options=optimizer),
        schedule=factor,
        seed=config.seed,
        skip_oom=config.trainer.skip_oom,
    )
    return TrainingRun(train, val, model, lightning_module, data, trainer, train_schedule, contents)


def evaluate_last_step(run: TrainingRun, data: L.LightningDataModule | None = None) -> None:
    """Evaluate the trained model unless its last step was evaluated; `data` replaces the run's own."""
    if run.lightning_module.evaluated_step != run.trainer.global_step:
        run.trainer.validate(run.lightning_module, data or run.data, verbose=False)


def train_schedule_from_config(config: RunConfig, *, batches_per_epoch: int, devices: int) -> TrainSchedule:
    """Return the schedule of a run.

    Args:
        config: of the run.
        batches_per_epoch: batches of each device in one pass over the training images.
        devices: number of devices that share the images.
    """
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


def apply_train_schedule(schedule: TrainSchedule, trainer: L.Trainer) -> None:
    """Set the length of the run, which depends on the trainer's number of devices.

    A run with more and shorter epochs than its recipe evaluates and saves its state as often as the recipe.
    """
    trainer.fit_loop.max_epochs = schedule.epochs
    assert trainer.check_val_every_n_epoch is not None
    trainer.check_val_every_n_epoch = max(1, round(trainer.check_val_every_n_epoch * schedule.stretch))
    if isinstance(trainer.checkpoint_callback, CheckpointCallback):
        trainer.checkpoint_callback.every_epochs = max(1, round(schedule.stretch))


def check_devices(devices: int, train: DenseDataset | None, val: DenseDataset, *, skip_oom: bool) -> None:
    """Check that a run can use this number of devices.

    Raises:
        UserError: there are fewer images than devices, or `skip_oom` is set for more than one device.
    """
    for name, split in (("train", train), ("val", val)):
        if split is not None and len(split) < devices:
            raise UserError(
                f"trainer.devices: {devices} devices for {len(split)} {name} images; use at most one device per image"
            )
    if devices > 1 and skip_oom:
        raise UserError(
            f"trainer.skip_oom=true: does not work on {devices} devices, as a device that skips a step would leave the "
            "others waiting; use trainer.skip_oom=false"
        )
