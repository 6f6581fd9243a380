"""The region proposal network (arXiv 1506.01497) of two-stage detectors, on torchvision's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork

from e3va_cli.components.options import Options, option
from e3va_cli.models.heads.anchors import MaxIoUMatcher, anchor_errors, build_anchors, match_anchors
from e3va_cli.models.heads.base import Target
from e3va_cli.models.heads.layers import Float32RPNHead
from e3va_cli.models.heads.torchvision_private import Matcher
from e3va_cli.models.necks.fpn import STRIDES


@dataclass
class RPNOptions(Options):
    """Options of a region proposal network."""

    anchor_sizes: list[int] = option(help="anchor sizes in pixels, one per pyramid level")
    aspect_ratios: list[float] = option(help="height over width of the anchors in each cell")
    fg_iou: float = option(help="IoU from which an anchor is positive", ge=0, le=1)
    bg_iou: float = option(help="IoU below which an anchor is negative", ge=0, le=1)
    batch_size_per_image: int = option(help="anchors sampled per image in training", gt=0)
    positive_fraction: float = option(help="maximum fraction of positive anchors among them", ge=0, le=1)
    pre_nms_train: int = option(help="proposals per level before NMS, in training", gt=0)
    pre_nms_test: int = option(help="proposals per level before NMS, in evaluation", gt=0, free=True)
    post_nms_train: int = option(help="proposals per image after NMS, in training", gt=0)
    post_nms_test: int = option(help="proposals per image after NMS, in evaluation", gt=0, free=True)
    nms_iou: float = option(help="IoU above which NMS drops a proposal", ge=0, le=1)
    inside_only: bool = option(help="train only on anchors inside the image", legacy_value=False)
    exact_anchors: bool = option(
        help="true: unrounded sizes and exact strides; false: torchvision's, rounded",
        legacy_value=False,
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield errors in the anchor sizes."""
        return anchor_errors(f"{at}.anchor_sizes", self.anchor_sizes)


class InsideRPN(RegionProposalNetwork):
    """An RPN trained only on anchors inside their image, as mmdetection with `allowed_border=0`.

    An object's best anchors need the negative threshold's IoU (`min_pos_iou`), as objects at the border may have none
    inside.
    """

    proposal_matcher: Matcher

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        high, low = self.proposal_matcher.high_threshold, self.proposal_matcher.low_threshold
        self.proposal_matcher = MaxIoUMatcher(high, low, min_pos_iou=low)

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
        """Return labels (A,), 1 positive, 0 negative, -1 ignored, and matched boxes (A, 4) of each image."""
        labels, matched = [], []
        for image_anchors, target in zip(anchors, targets, strict=True):
            boxes = target["boxes"]
            matches = match_anchors(
                image_anchors, boxes, anchors_inside(image_anchors, target["size"]), self.proposal_matcher
            )
            # The matcher's codes of negative and ignored anchors are -1 and -2.
            labels.append(matches.clamp(max=0) + 1)
            matched.append(boxes[matches.clamp(min=0)] if len(boxes) else torch.zeros_like(image_anchors))
        return [image_labels.to(torch.float32) for image_labels in labels], matched


def anchors_inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which anchors (A, 4) are inside an image of `size` (height, width): (A,) bool; all if none is."""
    height, width = size
    within = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
    return within | ~within.any()


def build_rpn(options: RPNOptions, *, channels: int) -> RegionProposalNetwork:
    """Build a region proposal network with one anchor size per pyramid level."""
    strides = (*STRIDES, 2 * STRIDES[-1])
    sizes = [[size] for size in options.anchor_sizes]
    network = InsideRPN if options.inside_only else RegionProposalNetwork
    return network(
        build_anchors(sizes, options.aspect_ratios, strides, exact=options.exact_anchors),
        Float32RPNHead(channels, len(options.aspect_ratios)),
        options.fg_iou,
        options.bg_iou,
        options.batch_size_per_image,
        options.positive_fraction,
        {"training": options.pre_nms_train, "testing": options.pre_nms_test},
        {"training": options.post_nms_train, "testing": options.post_nms_test},
        options.nms_iou,
    )
