"""RetinaNet (arXiv 1708.02002), torchvision's, on an FPN with levels P3 to P7."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from e3va_cli.heads.backward_at_once import losses_in_parts
from e3va_cli.heads.detections import Detections
from e3va_cli.heads.head import Extract, Head, Target, register
from e3va_cli.heads.pyramid import pyramid_of


class _Float32Head(retinanet.RetinaNetHead):
    """Torchvision's head, results in float32."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Class logits (B, anchors, K) and box deltas (B, anchors, 4)."""
        return {name: values.float() for name, values in super().forward(x).items()}


class _NoBackbone(nn.Module):
    """In place of a backbone, of which torchvision's detector needs no more than this."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


@register("retinanet")
class RetinaNet(Head):
    """Boxes in one stage, trained with the focal loss.

    Args:
        channels: of the three feature maps, strides 8 to 32.
        num_classes: kinds of objects.
        fpn_channels: width of every pyramid level.
        anchor_sizes: smallest side of the anchors of each of the five levels, in pixels.
        anchors_per_octave: sizes from one level's up to its double.
        fg_iou, bg_iou: overlap from which on an anchor holds an object, and below which it holds none.
        candidates_per_level: best-scored anchors that go into NMS.
    """

    needs = frozenset({"boxes"})
    stages = (1, 2, 3)

    def __init__(
        self,
        *,
        channels: Sequence[int],
        num_classes: int,
        fpn_channels: int,
        anchor_sizes: Sequence[int],
        anchors_per_octave: int,
        aspect_ratios: Sequence[float],
        fg_iou: float,
        bg_iou: float,
        score_threshold: float,
        candidates_per_level: int,
        nms_iou: float,
        detections_per_image: int,
    ) -> None:
        super().__init__()
        self.neck = FeaturePyramidNetwork(list(channels), fpn_channels, LastLevelP6P7(fpn_channels, fpn_channels))
        octaves = [2 ** (step / anchors_per_octave) for step in range(anchors_per_octave)]
        anchors = AnchorGenerator(
            tuple(tuple(int(size * octave) for octave in octaves) for size in anchor_sizes),
            (tuple(aspect_ratios),) * len(anchor_sizes),
        )
        self.detector = retinanet.RetinaNet(
            _NoBackbone(fpn_channels),
            num_classes,
            anchor_generator=anchors,
            head=_Float32Head(fpn_channels, anchors.num_anchors_per_location()[0], num_classes),
            score_thresh=score_threshold,
            nms_thresh=nms_iou,
            detections_per_img=detections_per_image,
            fg_iou_thresh=fg_iou,
            bg_iou_thresh=bg_iou,
            topk_candidates=candidates_per_level,
        )

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Torchvision's two losses: class (focal) and box (L1). It counts classes from 0."""

        def parts(pyramid: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
            return self.branch_losses(list(pyramid.values()), images, targets)

        return losses_in_parts(parts, pyramid_of(self.neck, features), (self.detector.head,))

    def branch_losses(
        self, pyramid: list[Tensor], images: ImageList, targets: list[Target]
    ) -> Iterator[dict[str, Tensor]]:
        """That of the classes, then that of the boxes, as torchvision's `RetinaNet` computes them."""
        from_zero = [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets]
        anchors = self.detector.anchor_generator(images, pyramid)
        matched = [self.matched(t["boxes"], of_image) for t, of_image in zip(from_zero, anchors, strict=True)]
        classes, boxes = self.detector.head.classification_head, self.detector.head.regression_head
        yield {"classification": classes.compute_loss(from_zero, {"cls_logits": classes(pyramid).float()}, matched)}
        found = {"bbox_regression": boxes(pyramid).float()}
        yield {"bbox_regression": boxes.compute_loss(from_zero, found, anchors, matched)}

    def matched(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        """The annotated box of each anchor (A,), or the matcher's negative codes."""
        if not len(boxes):
            return anchors.new_full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64)
        return self.detector.proposal_matcher(box_ops.box_iou(boxes, anchors))

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        """Objects above the score threshold after NMS."""
        pyramid = list(pyramid_of(self.neck, extract(images.tensors)).values())
        anchors_per_cell = self.detector.anchor_generator.num_anchors_per_location()[0]
        per_level = [level.shape[2] * level.shape[3] * anchors_per_cell for level in pyramid]
        outputs = {name: list(values.split(per_level, 1)) for name, values in self.detector.head(pyramid).items()}
        anchors = [list(a.split(per_level)) for a in self.detector.anchor_generator(images, pyramid)]
        found = self.detector.postprocess_detections(outputs, anchors, images.image_sizes)
        return [
            Detections(one["boxes"], one["scores"], one["labels"] + 1, None, size)
            for one, size in zip(found, images.image_sizes, strict=True)
        ]
