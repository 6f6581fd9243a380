"""Options of optimizer, schedule and trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = MISSING
    weight_decay: float = MISSING
    betas: list[float] = MISSING
    decay_biases: bool = False


@dataclass
class ScheduleConfig:
    """Learning rate over the run, after a linear warm-up; each kind has options of its own."""

    name: str = MISSING
    epochs: int | None = None
    min_steps: int = 0
    iterations: int | None = None
    warmup_steps: int = MISSING
    warmup_ratio: float = MISSING
    warmup_max_fraction: float = 1.0
    total_batch: int | None = None
    lr_scaling: str = MISSING


@dataclass
class MultiStepConfig(ScheduleConfig):
    """Falls by `gamma` at the end of each milestone epoch."""

    milestones: list[int] = MISSING
    gamma: float = MISSING


@dataclass
class CosineConfig(ScheduleConfig):
    """Falls along a half cosine to `min_ratio` of its height."""

    min_ratio: float = MISSING


@dataclass
class PolyConfig(ScheduleConfig):
    """Falls as (1 - progress) ** power to `min_ratio` of its height."""

    power: float = MISSING
    min_ratio: float = MISSING


@dataclass
class TrainerConfig:
    """How long, on what, in which precision, and what to do when something goes wrong."""

    max_epochs: int | None = MISSING
    max_steps: int | None = None
    limit_train_batches: int | None = None
    limit_val_batches: int | None = None
    val_every_epochs: int = MISSING
    accelerator: str = MISSING
    devices: Any = MISSING
    num_nodes: int = MISSING
    strategy: str = MISSING
    precision: str = MISSING
    accumulate_grad_batches: int = MISSING
    gradient_clip_norm: float | None = None
    early_stopping_patience: int | None = None
    deterministic: bool = MISSING
    log_every_n_steps: int = MISSING
    tensorboard: bool = MISSING
    checkpoint_every_steps: int | None = None
    preemption_signal: str | None = None
    max_bad_losses: int | None = None
    skip_oom: bool = MISSING
