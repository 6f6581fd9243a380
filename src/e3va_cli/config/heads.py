"""Options of heads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from e3va_cli.config.free import free


@dataclass
class HeadConfig:
    """A head; each has options of its own."""

    name: str = MISSING
    recompute_neck: bool = free(False)  # in the backward pass: less memory, a little more time


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
    pre_nms_test: int = free()
    post_nms_train: int = MISSING
    post_nms_test: int = free()
    nms_iou: float = MISSING
    inside_only: bool = MISSING
    exact_anchors: bool = MISSING


@dataclass
class BoxConfig:
    """What the box branches of two-stage detectors share."""

    roi_size: int = MISSING
    sampling_ratio: int = MISSING
    hidden: int = MISSING
    batch_size_per_image: int = MISSING
    positive_fraction: float = MISSING
    score_threshold: float = free()
    nms_iou: float = free()
    detections_per_image: int = free()


@dataclass
class SingleBoxConfig(BoxConfig):
    """Box branch of Mask R-CNN."""

    fg_iou: float = MISSING
    bg_iou: float = MISSING
    regression_weights: list[float] = MISSING


@dataclass
class CascadeBoxConfig(BoxConfig):
    """Box branches of Cascade Mask R-CNN; of what is a list, one for each stage."""

    aligned: bool = MISSING
    class_agnostic: bool = MISSING
    score_averaging: str = free()
    conv_channels: list[int] = MISSING
    fg_iou: list[float] = MISSING
    regression_weights: list[Any] = MISSING
    stage_loss_weights: list[float] = MISSING
    loss: str = MISSING
    loss_weight: float = MISSING


@dataclass
class MaskConfig:
    """Mask branch of a two-stage detector."""

    roi_size: int = MISSING
    sampling_ratio: int = MISSING
    channels: list[int] = MISSING
    predictor_channels: int = MISSING


@dataclass
class CascadeMaskConfig(MaskConfig):
    """Mask branches of Cascade Mask R-CNN."""

    aligned: bool = MISSING
    every_stage: bool = MISSING


@dataclass
class MaskRCNNConfig(HeadConfig):
    """Options of Mask R-CNN."""

    fpn_channels: int = MISSING
    rpn: RPNConfig = field(default_factory=RPNConfig)
    box: SingleBoxConfig = field(default_factory=SingleBoxConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)


@dataclass
class CascadeMaskRCNNConfig(HeadConfig):
    """Options of Cascade Mask R-CNN."""

    fpn_channels: int = MISSING
    rpn: RPNConfig = field(default_factory=RPNConfig)
    box: CascadeBoxConfig = field(default_factory=CascadeBoxConfig)
    mask: CascadeMaskConfig = field(default_factory=CascadeMaskConfig)


@dataclass
class RetinaNetConfig(HeadConfig):
    """Options of RetinaNet."""

    fpn_channels: int = MISSING
    p6_from: str = MISSING
    anchor_sizes: list[int] = MISSING
    anchors_per_octave: int = MISSING
    aspect_ratios: list[float] = MISSING
    exact_anchors: bool = MISSING
    fg_iou: float = MISSING
    bg_iou: float = MISSING
    score_threshold: float = free()
    candidates_per_level: int = free()
    nms_iou: float = free()
    detections_per_image: int = free()


@dataclass
class UPerNetConfig(HeadConfig):
    """Options of UPerNet."""

    fpn_channels: int = MISSING
    pool_scales: list[int] = MISSING
    dropout: float = MISSING
    auxiliary_stage: int = MISSING
    auxiliary_channels: int = MISSING
    auxiliary_weight: float = MISSING
    window: int | None = free(None)
    stride: int = free()
