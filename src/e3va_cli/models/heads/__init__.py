"""Detection and segmentation heads: one file each, behind the protocol of `base.py`."""

from e3va_cli.models.heads import cascade_mask_rcnn, mask_rcnn, retinanet, upernet
from e3va_cli.models.heads.base import HEADS, ClassRows, Extract, Head, HeadOptions, Target, build_head
from e3va_cli.models.heads.predictions import Detections, Segmentation

__all__ = [
    "HEADS",
    "ClassRows",
    "Detections",
    "Extract",
    "Head",
    "HeadOptions",
    "Segmentation",
    "Target",
    "build_head",
    "cascade_mask_rcnn",
    "mask_rcnn",
    "retinanet",
    "upernet",
]
