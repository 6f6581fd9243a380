"""Options common to two-stage detectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from e3va_cli.components.options import Options, option


@dataclass
class BoxOptions(Options):
    """Options of the box branches of two-stage detectors."""

    roi_size: int = option(help="height and width of pooled RoIs", gt=0)
    sampling_ratio: int = option(help="samples per side of a RoI cell; 0: adaptive to the RoI's size", ge=0)
    hidden: int = option(help="width of the linear layers", gt=0)
    batch_size_per_image: int = option(help="RoIs sampled per image in training; fewer reduces memory", gt=0)
    positive_fraction: float = option(help="maximum fraction of positive RoIs among them", ge=0, le=1)
    score_threshold: float = option(help="minimum score of detections", ge=0, le=1, free=True)
    nms_iou: float = option(help="IoU above which NMS drops a detection", ge=0, le=1, free=True)
    detections_per_image: int = option(help="maximum detections per image", gt=0, free=True)


@dataclass
class MaskOptions(Options):
    """Options of the mask branches of two-stage detectors."""

    roi_size: int = option(help="height and width of pooled RoIs", gt=0)
    sampling_ratio: int = option(help="samples per side of a RoI cell; 0: adaptive to the RoI's size", ge=0)
    channels: list[int] = option(help="output channels of each convolution")
    predictor_channels: int = option(help="channels of the transposed convolution that doubles the resolution", gt=0)


def is_box_weights(numbers: Any) -> bool:
    """Return whether `numbers` are four positive factors of box deltas."""
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    return is_list and len(numbers) == 4 and all(isinstance(n, int | float) and n > 0 for n in numbers)
