"""Which regions a stage of a two-stage detector is trained on, and what it shall find in them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from e3va_cli.models.heads.base import Target
from e3va_cli.models.heads.torchvision_private import BalancedPositiveNegativeSampler, Matcher


@dataclass
class SampledRoIs:
    """The sampled regions of a batch; every list has one tensor for each image.

    Attributes:
        boxes: (N, 4), x1 y1 x2 y2.
        labels: (N,), 1..K, 0 for background.
        matched: (N,), index of the annotated object that each region overlaps most with.
        proposed: (N,) bool, false for annotated boxes, which are sampled beside the proposals.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    matched: list[Tensor]
    proposed: list[Tensor]

    def positives(self) -> list[Tensor]:
        """Indices of the regions that hold an object."""
        return [torch.where(labels > 0)[0] for labels in self.labels]


def sample_rois(
    proposals: list[Tensor], targets: list[Target], matcher: Matcher, sampler: BalancedPositiveNegativeSampler
) -> SampledRoIs:
    """Match proposals and annotated boxes to the annotated objects and draw a sample of them, image by image."""
    candidates, labels, matched = [], [], []
    for boxes, target in zip(proposals, targets, strict=True):
        annotated = target["boxes"].to(boxes)
        with_annotated = torch.cat((boxes, annotated))
        nearest, found = match(with_annotated, annotated, target["labels"], matcher)
        candidates.append(with_annotated)
        matched.append(nearest)
        labels.append(found)
    regions = SampledRoIs([], [], [], [])
    for index, masks in enumerate(zip(*sampler(labels), strict=True)):
        chosen = torch.where(masks[0] | masks[1])[0]
        regions.boxes.append(candidates[index][chosen])
        regions.labels.append(labels[index][chosen])
        regions.matched.append(matched[index][chosen])
        regions.proposed.append(chosen < len(proposals[index]))
    return regions


def match(boxes: Tensor, annotated: Tensor, labels: Tensor, matcher: Matcher) -> tuple[Tensor, Tensor]:
    """For every box the annotated object that it overlaps most with, and that object's label if it is enough.

    Returns:
        (N,) indices, 0 where there is no object, and (N,) labels, 0 for background.
    """
    if len(annotated) == 0:
        nothing = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return nothing, nothing.clone()
    nearest = matcher(box_iou(annotated, boxes))
    objects = nearest.clamp(min=0)
    return objects, labels[objects].to(torch.int64) * (nearest >= 0)
