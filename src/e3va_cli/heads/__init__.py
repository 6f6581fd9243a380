"""Detection and segmentation heads: each one file, all behind the protocol of `head.py`."""

from e3va_cli.heads import cascade_mask_rcnn, mask_rcnn, retinanet, upernet
from e3va_cli.heads.detections import Detections
from e3va_cli.heads.head import HEADS, Extract, Head, HeadOptions, Target, build_head
from e3va_cli.heads.segmentation import Segmentation

__all__ = [
    "HEADS",
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
