"""Sampling of RoIs and their targets for training a two-stage detector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from e3va_cli.models.heads.base import Target
from e3va_cli.models.heads.torchvision_private import BalancedPositiveNegativeSampler, Matcher


@dataclass
class SampledRoIs:
    """The sampled RoIs of a batch; lists have one tensor per image.

    Attributes:
        boxes: (N, 4), x1 y1 x2 y2.
        labels: (N,), 1..K, 0 for background.
        matched: (N,), index of the ground-truth box with the highest IoU.
        proposed: (N,) bool, false for ground-truth boxes, which are added to the proposals.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    matched: list[Tensor]
    proposed: list[Tensor]

    def positives(self) -> list[Tensor]:
        """Return the indices of positive RoIs for each image."""
        return [torch.where(labels > 0)[0] for labels in self.labels]


def sample_rois(
    proposals: list[Tensor], targets: list[Target], matcher: Matcher, sampler: BalancedPositiveNegativeSampler
) -> SampledRoIs:
    """Add ground-truth boxes to the proposals, match them to objects and draw a sample from each image."""
    candidates, labels, matched = [], [], []
    for boxes, target in zip(proposals, targets, strict=True):
        gt_boxes = target["boxes"].to(boxes)
        candidates.append(torch.cat((boxes, gt_boxes)))
        image_matched, image_labels = match(candidates[-1], gt_boxes, target["labels"], matcher)
        matched.append(image_matched)
        labels.append(image_labels)
    rois = SampledRoIs([], [], [], [])
    for index, masks in enumerate(zip(*sampler(labels), strict=True)):
        chosen = torch.where(masks[0] | masks[1])[0]
        rois.boxes.append(candidates[index][chosen])
        rois.labels.append(labels[index][chosen])
        rois.matched.append(matched[index][chosen])
        rois.proposed.append(chosen < len(proposals[index]))
    return rois


def match(boxes: Tensor, gt_boxes: Tensor, labels: Tensor, matcher: Matcher) -> tuple[Tensor, Tensor]:
    """Match boxes (N, 4) to ground-truth boxes (G, 4) with `labels` (G,).

    Returns:
        Indices of matched objects (N,), 0 without one, and their labels (N,), 0 for background.
    """
    if len(gt_boxes) == 0:
        zeros = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        return zeros, zeros.clone()
    matches = matcher(box_iou(gt_boxes, boxes))
    indices = matches.clamp(min=0)
    return indices, labels[indices].to(torch.int64) * (matches >= 0)
