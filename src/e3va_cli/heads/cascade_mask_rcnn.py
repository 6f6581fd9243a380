"""Cascade Mask R-CNN (arXiv 1712.00726, with masks arXiv 1906.09756) on an FPN, of torchvision's parts.

Box stages follow one another: each is trained on what the one before made of the proposals, against a higher overlap
with the annotated boxes, and refines them further. Regression is class-agnostic; scores are averaged over the stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, clip_boxes_to_image, generalized_box_iou_loss
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from e3va_cli.heads.backward_at_once import losses_in_parts
from e3va_cli.heads.detections import Detections
from e3va_cli.heads.head import Extract, Head, Target, register
from e3va_cli.heads.mask_branch import MaskBranch
from e3va_cli.heads.norms import group_norm
from e3va_cli.heads.predictors import ClassAgnosticBoxPredictor
from e3va_cli.heads.pyramid import LEVELS, pyramid_of
from e3va_cli.heads.region_sampling import Regions, sample_regions
from e3va_cli.heads.rpn import build_rpn

SMOOTH_L1_BETA = 1 / 9  # as torchvision has it in its two-stage detectors
LEAST_SIDE = 1e-2  # pixels of a box that is kept

Sizes = list[tuple[int, int]]


class BoxStage(nn.Module):
    """One stage: cuts regions out, classifies them, and refines their boxes.

    Args:
        in_channels: of every pyramid level.
        num_classes: background counted.
        fg_iou: overlap with an annotated box from which on a region holds the object.
        regression_weights: factors of (x, y, width, height) deltas; larger ones for finer corrections.
        loss: giou (arXiv 1902.09630) or smooth_l1, of the boxes.
        loss_weight: of the boxes against the classes.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        fg_iou: float,
        regression_weights: Sequence[float],
        roi_size: int,
        sampling_ratio: int,
        conv_channels: Sequence[int],
        hidden: int,
        batch_size_per_image: int,
        positive_fraction: float,
        loss: str,
        loss_weight: float,
    ) -> None:
        super().__init__()
        self.loss, self.loss_weight = loss, loss_weight
        self.coder = BoxCoder(tuple(regression_weights))
        self.matcher = Matcher(fg_iou, fg_iou, allow_low_quality_matches=False)
        self.sampler = BalancedPositiveNegativeSampler(batch_size_per_image, positive_fraction)
        self.pool = MultiScaleRoIAlign(LEVELS, roi_size, sampling_ratio)
        size = (in_channels, roi_size, roi_size)
        self.head = FastRCNNConvFCHead(size, list(conv_channels), [hidden], group_norm)
        self.predictor = ClassAgnosticBoxPredictor(hidden, num_classes)

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Class logits (N, K + 1) and box deltas (N, 4) of all regions."""
        return self.predictor(self.head(self.pool(pyramid, boxes, sizes)))

    def sample(self, proposals: list[Tensor], targets: list[Target]) -> Regions:
        """The regions that this stage is trained on."""
        return sample_regions(proposals, targets, self.matcher, self.sampler)

    def losses(self, logits: Tensor, deltas: Tensor, regions: Regions, targets: list[Target]) -> tuple[Tensor, Tensor]:
        """Cross entropy of the classes, and the loss of the boxes of regions that hold an object."""
        labels, boxes = torch.cat(regions.labels), torch.cat(regions.boxes)
        positives = torch.where(labels > 0)[0]
        wanted = torch.cat([annotated_of(t, m) for t, m in zip(targets, regions.matched, strict=True)])[positives]
        if self.loss == "giou":
            refined = self.coder.decode_single(deltas[positives], boxes[positives])
            box_loss = generalized_box_iou_loss(refined, wanted, reduction="sum")
        else:
            encoded = self.coder.encode_single(wanted, boxes[positives])
            box_loss = smooth_l1_loss(deltas[positives], encoded, reduction="sum", beta=SMOOTH_L1_BETA)
        return cross_entropy(logits, labels), self.loss_weight * box_loss / max(1, len(labels))

    def refine(self, deltas: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
        """The boxes moved by what this stage found, kept inside their images; no gradient goes through them."""
        refined = self.coder.decode_single(deltas.detach(), torch.cat(boxes))
        shares = refined.split([len(of_image) for of_image in boxes])
        return [clip_boxes_to_image(share, size) for share, size in zip(shares, sizes, strict=True)]


@register("cascade_mask_rcnn")
class CascadeMaskRCNN(Head):
    """Boxes in several stages, masks on each of them or on the last.

    Args:
        channels: of the four feature maps, strides 4 to 32.
        num_classes: kinds of objects, background not counted.
        fpn_channels: width of every pyramid level.
        rpn: options of `build_rpn`; one anchor size for each of the five levels (the last is pooled from the fourth).
        box: options of `BoxStage` and of the selection of what is found; `fg_iou`, `regression_weights` and
            `stage_loss_weights` have an entry for each stage.
        mask: options of `MaskBranch`; with `every_stage`, each stage is trained with masks, and their results averaged.
    """

    needs = frozenset({"boxes", "masks"})
    box_stages: Any  # BoxStage
    masks: Any  # MaskBranch, of the last stages

    def __init__(
        self,
        *,
        channels: Sequence[int],
        num_classes: int,
        fpn_channels: int,
        rpn: dict[str, Any],
        box: dict[str, Any],
        mask: dict[str, Any],
    ) -> None:
        super().__init__()
        box, mask = dict(box), dict(mask)
        self.score_threshold, self.nms_iou = box.pop("score_threshold"), box.pop("nms_iou")
        self.detections_per_image = box.pop("detections_per_image")
        self.loss_weights = box.pop("stage_loss_weights")
        per_stage = zip(box.pop("fg_iou"), box.pop("regression_weights"), strict=True)
        every_stage = mask.pop("every_stage")
        self.neck = FeaturePyramidNetwork(list(channels), fpn_channels, LastLevelMaxPool())
        self.rpn = build_rpn(channels=fpn_channels, **rpn)
        self.box_stages = nn.ModuleList(
            BoxStage(fpn_channels, num_classes + 1, fg_iou=iou, regression_weights=weights, **box)
            for iou, weights in per_stage
        )
        branches = len(self.box_stages) if every_stage else 1
        self.masks = nn.ModuleList(MaskBranch(fpn_channels, num_classes + 1, **mask) for _ in range(branches))

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Objectness and proposal box; class, box and mask of each stage, weighted."""

        def parts(pyramid: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
            proposals, losses = self.rpn(images, pyramid, targets)
            yield losses
            yield from self.stage_losses(pyramid, proposals, images.image_sizes, targets)

        return losses_in_parts(parts, pyramid_of(self.neck, features), (self.rpn, self.box_stages, self.masks))

    def stage_losses(
        self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes, targets: list[Target]
    ) -> Iterator[dict[str, Tensor]]:
        """The weighted losses of each stage, boxes and masks apart; none takes gradients into another."""
        first_masked = len(self.box_stages) - len(self.masks)
        for index, (stage, weight) in enumerate(zip(self.box_stages, self.loss_weights, strict=True)):
            regions = stage.sample(boxes, targets)
            logits, deltas = stage(pyramid, regions.boxes, sizes)
            class_loss, box_loss = stage.losses(logits, deltas, regions, targets)
            yield {f"stage{index + 1}_class": weight * class_loss, f"stage{index + 1}_box": weight * box_loss}
            refined = stage.refine(deltas, regions.boxes, sizes)
            boxes = [box[proposed] for box, proposed in zip(refined, regions.proposed, strict=True)]
            if index >= first_masked:
                mask_loss = self.masks[index - first_masked].loss(pyramid, sizes, regions, targets)
                yield {f"stage{index + 1}_mask": (weight if first_masked == 0 else 1.0) * mask_loss}

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        """Objects above the score threshold after NMS, with masks inside their boxes."""
        pyramid = pyramid_of(self.neck, extract(images.tensors))
        sizes = images.image_sizes
        boxes, _ = self.rpn(images, pyramid)
        scores = torch.zeros((), device=images.tensors.device)
        for stage in self.box_stages:
            logits, deltas = stage(pyramid, boxes, sizes)
            scores = scores + logits.softmax(1) / len(self.box_stages)
            boxes = stage.refine(deltas, boxes, sizes)
        shares = scores.split([len(of_image) for of_image in boxes])
        found = [self.select(b, s, size) for b, s, size in zip(boxes, shares, sizes, strict=True)]
        at, labels = [one.boxes for one in found], [one.labels for one in found]
        masks = [branch.probabilities(pyramid, at, sizes, labels) for branch in self.masks]
        for one, of_branches in zip(found, zip(*masks, strict=True), strict=True):
            one.masks = torch.stack(of_branches).mean(0)
        return found

    def select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Of boxes (N, 4) with scores (N, K + 1), the best that do not overlap others of their class."""
        regions, classes = torch.where(scores[:, 1:] > self.score_threshold)
        boxes, scores, labels = boxes[regions], scores[regions, classes + 1], classes + 1
        large = box_ops.remove_small_boxes(boxes, LEAST_SIDE)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        best = box_ops.batched_nms(boxes, scores, labels, self.nms_iou)[: self.detections_per_image]
        return Detections(boxes[best], scores[best], labels[best], None, size)


def annotated_of(target: Target, matched: Tensor) -> Tensor:
    """The annotated box (N, 4) of each of the regions `matched` to them; zeros in an image without any."""
    boxes = target["boxes"]
    return boxes[matched] if len(boxes) else boxes.new_zeros((len(matched), 4))
