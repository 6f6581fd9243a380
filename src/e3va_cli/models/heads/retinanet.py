"""RetinaNet (arXiv 1708.02002) on an FPN with levels P3 to P7: torchvision's modules, mmdetection's training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from e3va_cli.components.options import option
from e3va_cli.models.heads.anchors import MaxIoUMatcher, anchor_errors, build_anchors, match_anchors
from e3va_cli.models.heads.base import HEADS, ClassRows, Extract, Head, HeadOptions, Target
from e3va_cli.models.heads.eager_backward import eager_backward
from e3va_cli.models.heads.predictions import Detections
from e3va_cli.models.necks.fpn import STRIDES, build_pyramid

COARSEST_STRIDE = STRIDES[-1]  # of the backbone; images are padded to multiples of it
ANCHOR_STRIDES = (*STRIDES[1:], 2 * COARSEST_STRIDE, 4 * COARSEST_STRIDE)


class _Float32Head(retinanet.RetinaNetHead):
    """Torchvision's head with outputs in float32."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Return class logits (B, anchors, K) and box deltas (B, anchors, 4)."""
        return {name: values.float() for name, values in super().forward(x).items()}


class _BackboneStub(nn.Module):
    """The only attribute of a backbone that torchvision's detector reads."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


class P6P7FromC5(ExtraFPNBlock):
    """P6 as a convolution of the backbone's last feature map, P7 of P6 (mmdetection's `on_input`)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Append P6 and P7 to the levels and their names."""
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


@dataclass
class RetinaNetOptions(HeadOptions):
    """Options of RetinaNet."""

    fpn_channels: int = option(help="width of every pyramid level", gt=0)
    p6_from: str = option(
        help="input of P6: c5, the backbone's last map, or p5, the pyramid's (torchvision, with a ReLU before P7)",
        choices=("c5", "p5"),
        legacy_value="p5",
    )
    anchor_sizes: list[int] = option(help="smallest anchor sizes in pixels, one per pyramid level")
    anchors_per_octave: int = option(help="anchor sizes per octave, from each of anchor_sizes to its double", gt=0)
    aspect_ratios: list[float] = option(help="height over width of the anchors in each cell")
    exact_anchors: bool = option(
        help="true: unrounded sizes and exact strides; false: torchvision's, rounded",
        legacy_value=False,
    )
    fg_iou: float = option(help="IoU from which an anchor is positive", ge=0, le=1)
    bg_iou: float = option(help="IoU below which an anchor is negative", ge=0, le=1)
    score_threshold: float = option(help="minimum score of detections", ge=0, le=1, free=True)
    topk_candidates: int = option(
        former_name="candidates_per_level", help="top-scoring anchors per level before NMS", gt=0, free=True
    )
    nms_iou: float = option(help="IoU above which NMS drops a detection", ge=0, le=1, free=True)
    detections_per_image: int = option(help="maximum detections per image", gt=0, free=True)

    def errors(self, at: str) -> Iterator[str]:
        """Yield errors in the anchor sizes."""
        return anchor_errors(f"{at}.anchor_sizes", self.anchor_sizes)


@HEADS.register("retinanet", RetinaNetOptions)
class RetinaNet(Head):
    """One-stage detector trained with the focal loss.

    Args:
        options: see `RetinaNetOptions`.
        channels: of the feature maps with strides 8, 16, 32.
        num_classes: classes without background.
    """

    target_types = frozenset({"boxes"})
    out_indices = (1, 2, 3)

    def __init__(self, options: RetinaNetOptions, *, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(options, channels=channels, num_classes=num_classes)
        width = options.fpn_channels
        extra_levels = P6P7FromC5(channels[-1], width) if options.p6_from == "c5" else LastLevelP6P7(width, width)
        self.neck = FeaturePyramidNetwork(list(channels), width, extra_levels)
        octaves = [2 ** (step / options.anchors_per_octave) for step in range(options.anchors_per_octave)]
        sizes = [[size * octave for octave in octaves] for size in options.anchor_sizes]
        anchors = build_anchors(sizes, options.aspect_ratios, ANCHOR_STRIDES, exact=options.exact_anchors)
        self.detector = retinanet.RetinaNet(
            _BackboneStub(width),
            num_classes,
            anchor_generator=anchors,
            head=_Float32Head(width, anchors.num_anchors_per_location()[0], num_classes),
            score_thresh=options.score_threshold,
            nms_thresh=options.nms_iou,
            detections_per_img=options.detections_per_image,
            fg_iou_thresh=options.fg_iou,
            bg_iou_thresh=options.bg_iou,
            topk_candidates=options.topk_candidates,
        )
        self.matcher = MaxIoUMatcher(options.fg_iou, options.bg_iou, min_pos_iou=0)

    def class_rows(self) -> dict[str, ClassRows]:
        """Return the last layer of the class branch, with all classes for each anchor of a cell."""
        anchors_per_cell = self.detector.anchor_generator.num_anchors_per_location()[0]
        return {"detector.head.classification_head.cls_logits": ClassRows(groups=anchors_per_cell)}

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Return the focal loss of the classes and the L1 loss of the boxes, over the positive anchors of the batch."""

        def chunks(pyramid: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
            return self.branch_losses(list(pyramid.values()), images, targets)

        return eager_backward(chunks, build_pyramid(self.neck, features), (self.detector.head,))

    def branch_losses(
        self, pyramid: list[Tensor], images: ImageList, targets: list[Target]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the class loss, then the box loss."""
        anchors = self.detector.anchor_generator(images, pyramid)
        matches = [
            match_anchors(a, t["boxes"], centers_on_image(a, size), self.matcher)
            for a, t, size in zip(anchors, targets, images.image_sizes, strict=True)
        ]
        zero_based = [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets]  # as torchvision's
        classes, boxes = self.detector.head.classification_head, self.detector.head.regression_head
        class_losses = (
            classes.compute_loss([t], {"cls_logits": logits}, [m])
            for t, logits, m in zip(zero_based, classes(pyramid).float().split(1), matches, strict=True)
        )
        yield {"classification": batch_mean(class_losses, matches)}
        box_losses = (
            boxes.compute_loss([t], {"bbox_regression": deltas}, [a], [m])
            for t, deltas, a, m in zip(zero_based, boxes(pyramid).float().split(1), anchors, matches, strict=True)
        )
        yield {"bbox_regression": batch_mean(box_losses, matches)}

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        """Return the detections above the score threshold after NMS."""
        pyramid = list(build_pyramid(self.neck, extract(images.tensors)).values())
        anchors_per_cell = self.detector.anchor_generator.num_anchors_per_location()[0]
        per_level = [level.shape[2] * level.shape[3] * anchors_per_cell for level in pyramid]
        outputs = {name: list(values.split(per_level, 1)) for name, values in self.detector.head(pyramid).items()}
        anchors = [list(a.split(per_level)) for a in self.detector.anchor_generator(images, pyramid)]
        results = self.detector.postprocess_detections(outputs, anchors, images.image_sizes)
        return [
            Detections(result["boxes"], result["scores"], result["labels"] + 1, None, size)
            for result, size in zip(results, images.image_sizes, strict=True)
        ]


def centers_on_image(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which anchors (A, 4) are centered on an image of `size` (height, width), padded by itself: (A,) bool.

    The others are in the padding to the largest image of the batch.
    """
    height, width = (-(-side // COARSEST_STRIDE) * COARSEST_STRIDE for side in size)
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
    return (x < width - 0.5) & (y < height - 0.5)  # rounding margin; strides are 8 pixels or more


def batch_mean(losses: Iterable[Tensor], matches: list[Tensor]) -> Tensor:
    """Average losses L_i of images, each normalized by its number of positive anchors P_i (at least 1), over the batch.

        L = (sum_i P_i L_i) / (sum_i P_i)

    Positive anchors have equal weights (mmdetection); torchvision gives equal weights to images.
    """
    counts = torch.stack([(m >= 0).sum() for m in matches]).clamp(min=1)
    return (torch.stack(list(losses)) * counts / counts.sum()).sum()
