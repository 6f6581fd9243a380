"""The whole configuration of each command."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from e3va_cli.config.adapters import AdapterConfig
from e3va_cli.config.backbones import BackboneConfig
from e3va_cli.config.datasets import DataConfig, DatasetConfig
from e3va_cli.config.heads import HeadConfig
from e3va_cli.config.training import OptimizerConfig, ScheduleConfig, TrainerConfig


@dataclass
class Config:
    """Everything that a run depends on."""

    backbone: BackboneConfig = MISSING
    adapter: AdapterConfig = MISSING
    head: HeadConfig = MISSING
    dataset: DatasetConfig = MISSING
    data: DataConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    schedule: ScheduleConfig = MISSING
    trainer: TrainerConfig = MISSING
    seed: int = MISSING
    pictures: int = MISSING


@dataclass
class TrainConfig(Config):
    """`e3va train`."""

    resume: str | None = None
    budget: str | None = None


@dataclass
class EvaluateConfig(Config):
    """`e3va evaluate`."""

    checkpoint: Any = MISSING


@dataclass
class MovedBackboneConfig:
    """Where a trained adapter's backbone has its weights, if no longer where the run had them."""

    weights: str | None = None
    pretrained: bool | None = None


@dataclass
class PredictConfig:
    """`e3va predict`."""

    checkpoint: Any = MISSING
    input: Any = MISSING
    output: str | None = None
    score: float = MISSING
    batch_size: int = MISSING
    accelerator: str = MISSING
    pictures: bool = MISSING
    backbone: MovedBackboneConfig = field(default_factory=MovedBackboneConfig)


@dataclass
class ExportAdapterConfig:
    """`e3va export-adapter`."""

    checkpoint: str = MISSING
    output: str | None = None
    precision: str = MISSING


@dataclass
class ExportOnnxConfig:
    """`e3va export-onnx`."""

    checkpoint: str = MISSING
    output: str | None = None
    image_size: list[int] | None = None
    tolerance: float = MISSING
    backbone: MovedBackboneConfig = field(default_factory=MovedBackboneConfig)


@dataclass
class CheckDataConfig(Config):
    """`e3va check-data`."""


@dataclass
class BenchmarkMemoryConfig(Config):
    """`e3va benchmark-memory`."""

    methods: list[str] = MISSING
    image_size: list[int] | None = None
    instances_per_image: int = MISSING
    measure: Any = MISSING
    warmup: int = MISSING
    repeats: int = MISSING
    budget: str | None = None
    reserve_mib: float = MISSING
