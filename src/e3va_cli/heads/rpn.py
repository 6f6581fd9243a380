"""The region proposal network of two-stage detectors (arXiv 1506.01497), of torchvision's parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from e3va_cli.heads.anchor_matching import MaxIoUMatcher, match_anchors
from e3va_cli.heads.anchors import build_anchors
from e3va_cli.heads.head import Target
from e3va_cli.heads.predictors import Float32RPNHead
from e3va_cli.heads.pyramid import STRIDES


class InsideRPN(RegionProposalNetwork):
    """Trained on the anchors that lie inside their image, as mmdetection does with `allowed_border=0`.

    Each object has its best anchors where they overlap it by the background's threshold at least (`min_pos_iou`): at
    the border no anchor inside may come near it.
    """

    proposal_matcher: Matcher

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        high, low = self.proposal_matcher.high_threshold, self.proposal_matcher.low_threshold
        self.proposal_matcher = MaxIoUMatcher(high, low, least_iou=low)

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[Target] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return proposals [(N, 4)] and, in training, the losses."""
        if targets is not None:
            sizes = images.image_sizes
            targets = [{"boxes": t["boxes"], "size": size} for t, size in zip(targets, sizes, strict=True)]
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[Target]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return for each image labels (A,), 1 object, 0 background, -1 neither, and objects' boxes (A, 4)."""
        labels, matched = [], []
        for of_image, target in zip(anchors, targets, strict=True):
            boxes = target["boxes"]
            matches = match_anchors(of_image, boxes, inside(of_image, target["size"]), self.proposal_matcher)
            # The matcher's codes of background and neither are -1 and -2.
            labels.append(matches.clamp(max=0) + 1)
            matched.append(boxes[matches.clamp(min=0)] if len(boxes) else torch.zeros_like(of_image))
        return [of_image.to(torch.float32) for of_image in labels], matched


def inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which anchors (A, 4) lie inside an image of `size` (height, width): (A,) bool; all where none does."""
    height, width = size
    within = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
    return within | ~within.any()


def build_rpn(
    *,
    channels: int,
    anchor_sizes: Sequence[int],
    aspect_ratios: Sequence[float],
    fg_iou: float,
    bg_iou: float,
    batch_size_per_image: int,
    positive_fraction: float,
    pre_nms_train: int,
    pre_nms_test: int,
    post_nms_train: int,
    post_nms_test: int,
    nms_iou: float,
    inside_only: bool,
    exact_anchors: bool,
) -> RegionProposalNetwork:
    """Return a region proposal network with one anchor size per pyramid level."""
    strides = (*STRIDES, 2 * STRIDES[-1])
    network = InsideRPN if inside_only else RegionProposalNetwork
    return network(
        build_anchors([[size] for size in anchor_sizes], aspect_ratios, strides, exact=exact_anchors),
        Float32RPNHead(channels, len(aspect_ratios)),
        fg_iou,
        bg_iou,
        batch_size_per_image,
        positive_fraction,
        {"training": pre_nms_train, "testing": pre_nms_test},
        {"training": post_nms_train, "testing": post_nms_test},
        nms_iou,
    )
