"""RoIAlign (arXiv 1703.06870) on the levels of a feature pyramid."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from e3va_cli.models.necks.fpn import LEVEL_NAMES, STRIDES


class PyramidRoIAlign(MultiScaleRoIAlign):
    """Torchvision's `MultiScaleRoIAlign` with the `aligned` option of its operator.

    Args:
        size: height and width of the output.
        sampling_ratio: samples per side of an output cell; 0 samples about every cell of the feature map.
        aligned: place the center of a map's first cell at half a stride, as in detectron2 and mmdetection; false places
            it at the image's corner, as in torchvision's detectors.
    """

    def __init__(self, size: int, sampling_ratio: int, *, aligned: bool) -> None:
        super().__init__(LEVEL_NAMES, size, sampling_ratio)
        self.aligned = aligned
        self.map_levels = LevelMapper(*(stride.bit_length() - 1 for stride in (STRIDES[0], STRIDES[-1])))

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Pool the RoIs `boxes` [(N_i, 4)] of all images, each from one level, to (N, C, size, size)."""
        levels = self.map_levels(boxes)
        image = torch.cat([torch.full_like(b[:, :1], index) for index, b in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(boxes)], 1)
        first = pyramid[LEVEL_NAMES[0]]
        pooled = first.new_zeros(len(rois), first.shape[1], *self.output_size)
        for level, (name, stride) in enumerate(zip(LEVEL_NAMES, STRIDES, strict=True)):
            at = torch.where(levels == level)[0]
            level_pooled = roi_align(
                pyramid[name], rois[at], self.output_size, 1 / stride, self.sampling_ratio, self.aligned
            )
            pooled[at] = level_pooled.to(pooled.dtype)
        return pooled
