"""The typed schema of the configuration, and the checks that span several options.

The values live in the YAML files of `conf/`; here are the names and types that Hydra holds them to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

PRECISIONS = ("32", "16-mixed", "bf16-mixed")


@dataclass
class BackboneConfig:
    """A frozen network and its weights."""

    name: str = MISSING
    timm_name: str = MISSING
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None
    seed: int = 0


@dataclass
class AdapterConfig:
    """A tuning method; each has options of its own."""

    name: str = MISSING


@dataclass
class E3VAConfig(AdapterConfig):
    """Options of E3VA."""

    rank: int = MISSING
    hidden_ratio: float = MISSING


@dataclass
class BottleneckConfig(AdapterConfig):
    """Options of Adapter and Mona."""

    hidden: int = MISSING
    dropout: float = MISSING


@dataclass
class AdaptFormerConfig(BottleneckConfig):
    """Options of AdaptFormer."""

    scale: float = MISSING


@dataclass
class LoRAConfig(AdapterConfig):
    """Options of LoRA."""

    rank: int = MISSING
    alpha: float = MISSING


@dataclass
class LoRandConfig(AdapterConfig):
    """Options of LoRand."""

    hidden_ratio: float = MISSING
    branches: int = MISSING
    rank: int = MISSING


@dataclass
class HeadConfig:
    """A head; each has options of its own."""

    name: str = MISSING


@dataclass
class RPNConfig:
    """Region proposal network."""

    anchor_sizes: list[int] = MISSING
    aspect_ratios: list[float] = MISSING
    fg_iou: float = MISSING
    bg_iou: float = MISSING
    batch_size_per_image: int = MISSING
    positive_fraction: float = MISSING
    pre_nms_train: int = MISSING
    pre_nms_test: int = MISSING
    post_nms_train: int = MISSING
    post_nms_test: int = MISSING
    nms_iou: float = MISSING


@dataclass
class BoxConfig:
    """Box branch of a two-stage detector."""

    roi_size: int = MISSING
    sampling_ratio: int = MISSING
    hidden: int = MISSING
    fg_iou: float = MISSING
    bg_iou: float = MISSING
    batch_size_per_image: int = MISSING
    positive_fraction: float = MISSING
    regression_weights: list[float] = MISSING
    score_threshold: float = MISSING
    nms_iou: float = MISSING
    detections_per_image: int = MISSING


@dataclass
class MaskConfig:
    """Mask branch of a two-stage detector."""

    roi_size: int = MISSING
    sampling_ratio: int = MISSING
    channels: list[int] = MISSING
    predictor_channels: int = MISSING


@dataclass
class MaskRCNNConfig(HeadConfig):
    """Options of Mask R-CNN."""

    fpn_channels: int = MISSING
    rpn: RPNConfig = field(default_factory=RPNConfig)
    box: BoxConfig = field(default_factory=BoxConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)


@dataclass
class DatasetConfig:
    """Images, their classes, and how they are resized."""

    name: str = MISSING
    train_short_sides: list[int] = MISSING
    val_short_side: int = MISSING
    max_size: int = MISSING
    flip: float = MISSING


@dataclass
class ShapesConfig(DatasetConfig):
    """Images generated from a seed."""

    image_size: int = MISSING
    train_images: int = MISSING
    val_images: int = MISSING
    seed: int = MISSING


@dataclass
class CocoConfig(DatasetConfig):
    """A data set in COCO's format; file and folder names are relative to `root`."""

    root: str = MISSING
    train_images: str = MISSING
    train_annotations: str = MISSING
    val_images: str = MISSING
    val_annotations: str = MISSING


@dataclass
class DataConfig:
    """Loading of batches."""

    batch_size: int = MISSING
    val_batch_size: int = MISSING
    num_workers: int = MISSING


@dataclass
class OptimizerConfig:
    """AdamW."""

    lr: float = MISSING
    weight_decay: float = MISSING
    betas: list[float] = MISSING


@dataclass
class ScheduleConfig:
    """Learning rate over the run, after a linear warm-up; each kind has options of its own."""

    name: str = MISSING
    warmup_steps: int = MISSING
    warmup_ratio: float = MISSING


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
    """How long, on what and in which precision; passed on to Lightning's Trainer."""

    max_epochs: int = MISSING
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

    checkpoint: str = MISSING


@dataclass
class CheckDataConfig(Config):
    """`e3va check-data`."""


@dataclass
class BenchmarkMemoryConfig(Config):
    """`e3va benchmark-memory`."""

    methods: list[str] = MISSING
    image_size: list[int] | None = None
    instances_per_image: int = MISSING
    num_classes: int = MISSING
    measure: Any = MISSING
    warmup: int = MISSING
    repeats: int = MISSING
    budget: str | None = None
    reserve_mib: float = MISSING


SCHEMAS: dict[str, dict[str, type]] = {
    "": {
        "train_schema": TrainConfig,
        "evaluate_schema": EvaluateConfig,
        "check_data_schema": CheckDataConfig,
        "benchmark_memory_schema": BenchmarkMemoryConfig,
    },
    "backbone": {"swin_schema": BackboneConfig},
    "adapter": {
        "plain_schema": AdapterConfig,
        "e3va_schema": E3VAConfig,
        "adapter_schema": BottleneckConfig,
        "mona_schema": BottleneckConfig,
        "adaptformer_schema": AdaptFormerConfig,
        "lora_schema": LoRAConfig,
        "lorand_schema": LoRandConfig,
    },
    "head": {"mask_rcnn_schema": MaskRCNNConfig},
    "dataset": {"shapes_schema": ShapesConfig, "coco_schema": CocoConfig},
    "data": {"loader_schema": DataConfig},
    "optimizer": {"adamw_schema": OptimizerConfig},
    "schedule": {
        "multistep_schema": MultiStepConfig,
        "cosine_schema": CosineConfig,
        "poly_schema": PolyConfig,
    },
    "trainer": {"lightning_schema": TrainerConfig},
}


def register_schemas() -> None:
    """Tell Hydra the types that the YAML files are held to."""
    store = ConfigStore.instance()
    for group, nodes in SCHEMAS.items():
        for name, node in nodes.items():
            store.store(name=name, node=node, group=group or None)


POSITIVE = (
    "adapter.rank",
    "adapter.hidden_ratio",
    "adapter.hidden",
    "adapter.scale",
    "adapter.alpha",
    "adapter.branches",
    "head.fpn_channels",
    "data.batch_size",
    "data.val_batch_size",
    "optimizer.lr",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.num_nodes",
    "trainer.accumulate_grad_batches",
    "trainer.val_every_epochs",
    "trainer.log_every_n_steps",
    "trainer.gradient_clip_norm",
    "dataset.image_size",
    "dataset.train_images",
    "dataset.val_images",
    "dataset.val_short_side",
    "dataset.max_size",
    "instances_per_image",
    "num_classes",
    "repeats",
)
NOT_NEGATIVE = (
    "data.num_workers",
    "optimizer.weight_decay",
    "schedule.warmup_steps",
    "trainer.limit_train_batches",
    "trainer.limit_val_batches",
    "trainer.early_stopping_patience",
    "pictures",
    "warmup",
    "reserve_mib",
)

NEEDED = "a value is needed"


def problems(cfg: DictConfig) -> list[str]:
    """Every mistake that types alone do not show, one line each, naming the option and what would be right."""
    reads_data = OmegaConf.get_type(cfg) is not BenchmarkMemoryConfig
    needed = sorted(key for key in OmegaConf.missing_keys(cfg) if reads_data or key != "dataset.root")
    found = [f"{key}: {NEEDED}" for key in needed]

    def value(key: str) -> Any:
        return None if key in OmegaConf.missing_keys(cfg) else OmegaConf.select(cfg, key)

    for key in (*POSITIVE, *NOT_NEGATIVE):
        number = value(key)
        if not isinstance(number, int | float):
            continue
        if key in POSITIVE and not number > 0:
            found.append(f"{key}={number}: must be above 0")
        elif key in NOT_NEGATIVE and not number >= 0:
            found.append(f"{key}={number}: must be 0 or above")
    precision = value("trainer.precision")
    if precision == "bf16-true":
        found.append(
            "trainer.precision=bf16-true: torchvision has no NMS in bfloat16, and box coordinates up to 1333 need "
            "more than its 8 bits; use bf16-mixed"
        )
    elif precision is not None and precision not in PRECISIONS:
        found.append(f"trainer.precision={precision}: one of {', '.join(PRECISIONS)}")
    devices = value("trainer.devices")
    is_list = OmegaConf.is_list(devices) and len(devices) > 0 and all(isinstance(d, int) for d in devices)
    is_count = isinstance(devices, int) and not isinstance(devices, bool) and (devices > 0 or devices == -1)
    if devices is not None and devices != "auto" and not is_list and not is_count:
        found.append(f"trainer.devices={devices}: a count, auto, or a list of device indices such as [0,1]")
    for key in ("dataset.flip", "adapter.dropout"):
        probability = value(key)
        if probability is not None and not 0 <= probability <= 1:
            found.append(f"{key}={probability}: a probability from 0 to 1")
    sides = value("dataset.train_short_sides")
    if sides is not None and (not sides or min(sides) < 1):
        found.append(f"dataset.train_short_sides={sides}: at least one size, in pixels")
    ratio = value("schedule.warmup_ratio")
    if ratio is not None and not 0 < ratio <= 1:
        found.append(f"schedule.warmup_ratio={ratio}: above 0 and at most 1")
    milestones = value("schedule.milestones")
    if milestones is not None and list(milestones) != sorted(set(milestones)):
        found.append(f"schedule.milestones={milestones}: must rise")
    if value("backbone.pretrained") and value("backbone.model_args"):
        found.append(
            f"backbone.pretrained=true: nobody publishes weights for {value('backbone.name')}; "
            "choose swin_t, swin_s, swin_b or swin_l, or give backbone.weights=FILE"
        )
    if value("backbone.pretrained") and value("backbone.weights"):
        found.append("backbone.pretrained=true and backbone.weights= exclude each other: give one of them")
    measure = value("measure")
    if measure is not None and measure not in ("auto", True, False):
        found.append(f"measure={measure}: auto, true or false")
    image_size = value("image_size")
    if image_size is not None and (len(image_size) != 2 or min(image_size) < 32):
        found.append(f"image_size={image_size}: [height,width] in pixels, at least 32 each")
    return found
