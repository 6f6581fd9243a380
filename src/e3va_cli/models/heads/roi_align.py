"""RoIAlign (arXiv 1703.06870) on the levels of a pyramid."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import LevelMapper

from e3va_cli.models.necks.fpn import LEVEL_NAMES, STRIDES


class PyramidRoIAlign(MultiScaleRoIAlign):
    """Torchvision's pooling layer, with the choice of alignment that its operator has.

    Args:
        size: height and width of what is cut out.
        sampling_ratio: samples along a side of each of its cells; 0 takes about one for each cell of the feature map.
        aligned: the center of a feature map's first cell is at half a stride, as in detectron2 and mmdetection; false
            puts it at the image's corner, as in torchvision's detectors.
    """

    def __init__(self, size: int, sampling_ratio: int, *, aligned: bool) -> None:
        super().__init__(LEVEL_NAMES, size, sampling_ratio)
        self.aligned = aligned
        self.map_levels = LevelMapper(*(stride.bit_length() - 1 for stride in (STRIDES[0], STRIDES[-1])))

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> Tensor:
        """Return the regions `boxes` [(N_i, 4)] of all images, each cut out of one level: (N, C, size, size)."""
        levels = self.map_levels(boxes)
        image = torch.cat([torch.full_like(b[:, :1], index) for index, b in enumerate(boxes)])
        rois = torch.cat([image, torch.cat(boxes)], 1)
        first = pyramid[LEVEL_NAMES[0]]
        pooled = first.new_zeros(len(rois), first.shape[1], *self.output_size)
        for level, (name, stride) in enumerate(zip(LEVEL_NAMES, STRIDES, strict=True)):
            at = torch.where(levels == level)[0]
            of_level = roi_align(
                pyramid[name], rois[at], self.output_size, 1 / stride, self.sampling_ratio, self.aligned
            )
            pooled[at] = of_level.to(pooled.dtype)
        return pooled
