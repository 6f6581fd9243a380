"""Options that two-stage detectors share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from e3va_cli.components.options import Options, option


@dataclass
class BoxOptions(Options):
    """Options of the box branches of two-stage detectors."""

    roi_size: int = option(help="height and width that regions are cut out at", above=0)
    sampling_ratio: int = option(
        help="samples along a side of a cell; 0: as many as the region's size asks for", least=0
    )
    hidden: int = option(help="width of the linear layers", above=0)
    batch_size_per_image: int = option(help="regions that training samples in an image; fewer reduces memory", above=0)
    positive_fraction: float = option(help="most of them that hold an object", least=0, most=1)
    score_threshold: float = option(help="least score of a detection", least=0, most=1, free=True)
    nms_iou: float = option(help="overlap above which NMS drops a detection", least=0, most=1, free=True)
    detections_per_image: int = option(help="most detections in an image", above=0, free=True)


@dataclass
class MaskOptions(Options):
    """Options of the mask branches of two-stage detectors."""

    roi_size: int = option(help="height and width that regions are cut out at", above=0)
    sampling_ratio: int = option(help="as that of boxes", least=0)
    channels: list[int] = option(help="of the convolutions")
    predictor_channels: int = option(help="of the transposed convolution that doubles the resolution", above=0)


def is_box_weights(numbers: Any) -> bool:
    """Return whether these are four factors of box deltas."""
    is_list = isinstance(numbers, Sequence) and not isinstance(numbers, str)
    return is_list and len(numbers) == 4 and all(isinstance(n, int | float) and n > 0 for n in numbers)
