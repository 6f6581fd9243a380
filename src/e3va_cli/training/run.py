"""A run put together from a plain configuration: data, model, task and trainer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L  # noqa: N812 (Lightning's own alias)
import torch

from e3va_cli.data import DetectionData, DetectionDataset, open_splits
from e3va_cli.errors import UserError
from e3va_cli.metrics import AveragePrecision
from e3va_cli.model import DenseModel, build_model
from e3va_cli.training.checkpoints import about_model
from e3va_cli.training.optimizer import build_optimizer
from e3va_cli.training.schedules import build_schedule
from e3va_cli.training.task import DenseTask
from e3va_cli.training.trainer import build_trainer


@dataclass
class Run:
    """Everything that training or evaluation needs."""

    train: DetectionDataset | None
    val: DetectionDataset
    model: DenseModel
    task: DenseTask
    data: DetectionData
    trainer: L.Trainer


def build_run(config: dict[str, Any], folder: Path, *, evaluate_only: bool = False) -> Run:
    """Open the data first, as that fails fastest, then build the model and the trainer.

    Raises:
        UserError: data or weights that cannot be used.
    """
    L.seed_everything(config["seed"], workers=True, verbose=False)
    train, val = open_splits(config["dataset"], train=not evaluate_only)
    torch.manual_seed(config["seed"])
    model = build_model(config, num_classes=len(val.classes))
    if model.head.needs_masks and not (val.has_masks and (train is None or train.has_masks)):
        raise UserError(f"head={config['head']['name']} needs masks, and the annotations of this data set have none")
    kinds = model.head.metrics
    task = DenseTask(
        model,
        AveragePrecision(val.ground_truth(), val.category_ids, kinds),
        optimizer=partial(build_optimizer, **config["optimizer"]),
        schedule=lambda total, per_epoch: build_schedule(
            **config["schedule"], total_steps=total, steps_per_epoch=per_epoch
        ),
        about=about_model(model.identity, config, val.classes, val.category_ids),
        seed=config["seed"],
    )
    data = DetectionData(train, val, **config["data"], seed=config["seed"])
    trainer = build_trainer(config, folder, monitor=f"val/{kinds[-1]}_AP", evaluate_only=evaluate_only)
    return Run(train, val, model, task, data, trainer)
