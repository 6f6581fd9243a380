"""The region proposal network of two-stage detectors (arXiv 1506.01497), of torchvision's parts."""

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

    anchor_sizes: list[int] = option(help="pixels, one per pyramid level")
    aspect_ratios: list[float] = option(help="height over width of the anchors at each place")
    fg_iou: float = option(help="overlap from which on an anchor holds an object", least=0, most=1)
    bg_iou: float = option(help="overlap below which it holds none", least=0, most=1)
    batch_size_per_image: int = option(help="anchors that training samples in an image", above=0)
    positive_fraction: float = option(help="most of them that hold an object", least=0, most=1)
    pre_nms_train: int = option(help="best proposals of a level that go into NMS, in training", above=0)
    pre_nms_test: int = option(help="the same in evaluation", above=0, free=True)
    post_nms_train: int = option(help="best proposals of an image after NMS, in training", above=0)
    post_nms_test: int = option(help="the same in evaluation", above=0, free=True)
    nms_iou: float = option(help="overlap above which NMS drops a proposal", least=0, most=1)
    inside_only: bool = option(help="train only anchors inside the image", before=False)
    exact_anchors: bool = option(
        help="false, as torchvision has it: whole sides, and image side // map side from one anchor to the next",
        before=False,
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the anchors."""
        return anchor_errors(f"{at}.anchor_sizes", self.anchor_sizes)


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
            matches = match_anchors(of_image, boxes, anchors_inside(of_image, target["size"]), self.proposal_matcher)
            # The matcher's codes of background and neither are -1 and -2.
            labels.append(matches.clamp(max=0) + 1)
            matched.append(boxes[matches.clamp(min=0)] if len(boxes) else torch.zeros_like(of_image))
        return [of_image.to(torch.float32) for of_image in labels], matched


def anchors_inside(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which anchors (A, 4) lie inside an image of `size` (height, width): (A,) bool; all where none does."""
    height, width = size
    within = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] < width) & (anchors[:, 3] < height)
    return within | ~within.any()


def build_rpn(options: RPNOptions, *, channels: int) -> RegionProposalNetwork:
    """Return a region proposal network with one anchor size per pyramid level."""
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
