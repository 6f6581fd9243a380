"""RetinaNet (arXiv 1708.02002) on an FPN with levels P3 to P7: torchvision's parts, trained as mmdetection does it."""

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
from e3va_cli.models.heads.base import HEADS, Extract, Head, HeadOptions, Target
from e3va_cli.models.heads.eager_backward import eager_backward
from e3va_cli.models.heads.predictions import Detections
from e3va_cli.models.necks.fpn import STRIDES, build_pyramid

COARSEST_STRIDE = STRIDES[-1]  # of the backbone, whose multiples images are padded to
ANCHOR_STRIDES = (*STRIDES[1:], 2 * COARSEST_STRIDE, 4 * COARSEST_STRIDE)


class _Float32Head(retinanet.RetinaNetHead):
    """Torchvision's head, results in float32."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        """Class logits (B, anchors, K) and box deltas (B, anchors, 4)."""
        return {name: values.float() for name, values in super().forward(x).items()}


class _BackboneStub(nn.Module):
    """In place of a backbone, of which torchvision's detector needs no more than this."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels


class P6P7FromC5(ExtraFPNBlock):
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


@dataclass
class RetinaNetOptions(HeadOptions):
    """Options of RetinaNet."""

    fpn_channels: int = option(help="width of every pyramid level", above=0)
    p6_from: str = option(
        help="c5: the backbone's last feature map; p5, as torchvision has it: the pyramid's, with a ReLU before P7",
        choices=("c5", "p5"),
        before="p5",
    )
    anchor_sizes: list[int] = option(help="smallest side of the anchors, pixels, one per pyramid level")
    anchors_per_octave: int = option(help="sizes from each of the above up to its double", above=0)
    aspect_ratios: list[float] = option(help="height over width of the anchors at each place")
    exact_anchors: bool = option(
        help="false, as torchvision has it: whole sides, and image side // map side from one anchor to the next",
        before=False,
    )
    fg_iou: float = option(help="overlap from which on an anchor holds an object", least=0, most=1)
    bg_iou: float = option(help="overlap below which it holds none", least=0, most=1)
    score_threshold: float = option(help="least score of a detection", least=0, most=1, free=True)
    candidates_per_level: int = option(help="best-scored anchors that go into NMS", above=0, free=True)
    nms_iou: float = option(help="overlap above which NMS drops a detection", least=0, most=1, free=True)
    detections_per_image: int = option(help="most detections in an image", above=0, free=True)

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the anchors."""
        return anchor_errors(f"{at}.anchor_sizes", self.anchor_sizes)


@HEADS.register("retinanet", RetinaNetOptions)
class RetinaNet(Head):
    """Boxes in one stage, trained with the focal loss.

    Args:
        options: see `RetinaNetOptions`.
        channels: of the three feature maps, strides 8 to 32.
        num_classes: kinds of objects.
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
            topk_candidates=options.candidates_per_level,
        )
        self.matcher = MaxIoUMatcher(options.fg_iou, options.bg_iou, least_iou=0)

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Return the two losses, class (focal) and box (L1), both over the objects' anchors of the whole batch."""

        def chunks(pyramid: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
            return self.branch_losses(list(pyramid.values()), images, targets)

        return eager_backward(chunks, build_pyramid(self.neck, features), (self.detector.head,))

    def branch_losses(
        self, pyramid: list[Tensor], images: ImageList, targets: list[Target]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield that of the classes, then that of the boxes."""
        anchors = self.detector.anchor_generator(images, pyramid)
        matches = [
            match_anchors(of_image, t["boxes"], centers_on_image(of_image, size), self.matcher)
            for of_image, t, size in zip(anchors, targets, images.image_sizes, strict=True)
        ]
        from_zero = [{"boxes": t["boxes"], "labels": t["labels"] - 1} for t in targets]  # torchvision counts so
        classes, boxes = self.detector.head.classification_head, self.detector.head.regression_head
        class_losses = (
            classes.compute_loss([t], {"cls_logits": logits}, [m])
            for t, logits, m in zip(from_zero, classes(pyramid).float().split(1), matches, strict=True)
        )
        yield {"classification": batch_mean(class_losses, matches)}
        box_losses = (
            boxes.compute_loss([t], {"bbox_regression": deltas}, [a], [m])
            for t, deltas, a, m in zip(from_zero, boxes(pyramid).float().split(1), anchors, matches, strict=True)
        )
        yield {"bbox_regression": batch_mean(box_losses, matches)}

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        """Objects above the score threshold after NMS."""
        pyramid = list(build_pyramid(self.neck, extract(images.tensors)).values())
        anchors_per_cell = self.detector.anchor_generator.num_anchors_per_location()[0]
        per_level = [level.shape[2] * level.shape[3] * anchors_per_cell for level in pyramid]
        outputs = {name: list(values.split(per_level, 1)) for name, values in self.detector.head(pyramid).items()}
        anchors = [list(a.split(per_level)) for a in self.detector.anchor_generator(images, pyramid)]
        found = self.detector.postprocess_detections(outputs, anchors, images.image_sizes)
        return [
            Detections(one["boxes"], one["scores"], one["labels"] + 1, None, size)
            for one, size in zip(found, images.image_sizes, strict=True)
        ]


def centers_on_image(anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which anchors (A, 4) have their center on an image of `size` (height, width), as padded alone: (A,) bool.

    The other ones lie in the padding that a larger image of the batch brings.
    """
    height, width = (-(-side // COARSEST_STRIDE) * COARSEST_STRIDE for side in size)
    x, y = ((anchors[:, :2] + anchors[:, 2:]) / 2).unbind(1)
    return (x < width - 0.5) & (y < height - 0.5)  # cells are 8 pixels apart at least; halves are rounded


def batch_mean(losses: Iterable[Tensor], matches: list[Tensor]) -> Tensor:
    """Return a batch's loss from those of its images, each divided by its matched anchors P_i (1 where there is none).

        L = (sum_i P_i L_i) / (sum_i P_i)

    So a matched anchor counts the same in every image (mmdetection); in torchvision's mean, images count the same.
    """
    counts = torch.stack([(of_image >= 0).sum() for of_image in matches]).clamp(min=1)
    return (torch.stack(list(losses)) * counts / counts.sum()).sum()
