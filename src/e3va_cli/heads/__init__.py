"""Detection and segmentation heads: each one file, all behind the protocol of `head.py`."""

from e3va_cli.heads import mask_rcnn
from e3va_cli.heads.detections import Detections
from e3va_cli.heads.head import HEADS, Head, Target, build_head

__all__ = ["HEADS", "Detections", "Head", "Target", "build_head", "mask_rcnn"]
