"""RetinaNet (arXiv 1708.02002) on an FPN with levels P3 to P7: torchvision's parts, trained as mmdetection does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection import retinanet
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from e3va_cli.heads.anchor_matching import MaxIoUMatcher, match_anchors
from e3va_cli.heads.anchors import build_anchors
from e3va_cli.heads.backward_at_once import losses_in_parts
from e3va_cli.heads.detections import Detections
from e3va_cli.heads.head import Extract, Head, Target, register
from e3va_cli.heads.pyramid import STRIDES, pyramid_of

COARSEST_STRIDE = STRIDES[-1]  # of the backbone, whose multiples images are padded to
ANCHOR_STRIDES = (*STRIDES[1:], 2 * COARSEST_STRIDE, 4 * COARSEST_STRIDE)


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


class P6P7OfC5(ExtraFPNBlock):
    """P6 as a convolution of the backbone's last feature map, P7 as one of P6 (mmdetection's `on_input`)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        for layer in (self.p6, self.p7):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """Return the levels and their names with the two new ones."""
        p6 = self.p6(x[-1])
        return [*results, p6, self.p7(p6)], [*names, "p6", "p7"]


@register("retinanet")
class RetinaNet(Head):
    """Boxes in one stage, trained with the focal loss.

    Args:
        channels: of the three feature maps, strides 8 to 32.
        num_classes: kinds of objects.
        fpn_channels: width of every pyramid level.
        anchor_sizes: smallest side of the anchors of each of the five levels, in pixels.
        anchors_per_octave: sizes from one level's up to its double.
        exact_anchors: see `build_anchors`.
        p6_from: c5, the backbone's last feature map, or p5, the pyramid's, with a ReLU before P7 (torchvision's).
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
        exact_anchors: bool,
        p6_from: str,
        fg_iou: float,
        bg_iou: float,
        score_threshold: float,
        candidates_per_level: int,
        nms_iou: float,
        detections_per_image: int,
    ) -> None:
        super().__init__()
        extra_levels = (
            P6P7OfC5(channels[-1], fpn_channels) if p6_from == "c5" else LastLevelP6P7(fpn_channels, fpn_channels)
        )
        self.neck = FeaturePyramidNetwork(list(channels), fpn_channels, extra_levels)
        octaves = [2 ** (step / anchors_per_octave) for step in range(anchors_per_octave)]
        sizes = [[size * octave for octave in octaves] for size in anchor_sizes]
        anchors = build_anchors(sizes, aspect_ratios, ANCHOR_STRIDES, exact=exact_anchors)
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
        self.matcher = MaxIoUMatcher(fg_iou, bg_iou, least_iou=0)

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Return the two losses, class (focal) and box (L1), both over the objects' anchors of the whole batch."""

        def parts(pyramid: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
            return self.branch_losses(list(pyramid.values()), images, targets)

        return losses_in_parts(parts, pyramid_of(self.neck, features), (self.detector.head,))

    def branch_losses(
        self, pyramid: list[Tensor], images: ImageList, targets: list[Target]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield that of the classes, then that of the boxes."""
        anchors = self.detector.anchor_generator(images, pyramid)
        matches = [
            match_anchors(of_image, t["boxes"], on_image(of_image, size), self.matcher)
            for of_image, t, size in zip(anchors, targets, images.image_sizes, strict=True)
        ]
        from_zero = [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets]  # torchvision counts so
        classes, boxes = self.detector.head.classification_head, self.detector.head.regression_head
        class_losses = (
            classes.compute_loss([t], {"cls_logits": logits}, [m])
            for t, logits, m in zip(from_zero, classes(pyramid).float().split(1), matches, strict=True)
        )
        yield {"classification": over_batch(class_losses, matches)}
        box_losses = (
            boxes.compute_loss([t], {"bbox_regression": deltas}, [a], [m])
            for t, deltas, a, m in zip(from_zero, boxes(pyramid).float().split(1), anchors, matches, strict=True)
        )
        yield {"bbox_regression": over_batch(box_losses, matches)}

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


def on_image(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which anchors (A, 4) have their center on an image of `size` (height, width), as padded alone: (A,) bool.

    The other ones lie in the padding that a larger image of the batch brings.
    """
    height, width = (-(-side // COARSEST_STRIDE) * COARSEST_STRIDE for side in size)
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
    return (x < width - 0.5) & (y < height - 0.5)  # cells are 8 pixels apart at least; halves are rounded


def over_batch(losses: Iterable[Tensor], matches: list[Tensor]) -> Tensor:
    """Return a batch's loss from those of its images, each divided by its matched anchors P_i (1 where there is none).

        L = (sum_i P_i L_i) / (sum_i P_i)

    So a matched anchor counts the same in every image (mmdetection); in torchvision's mean, images count the same.
    """
    counts = torch.stack([(of_image >= 0).sum() for of_image in matches]).clamp(min=1)
    return (torch.stack(list(losses)) * counts / counts.sum()).sum()
