"""Cascade Mask R-CNN (arXiv 1712.00726, with masks arXiv 1906.09756) on an FPN, of torchvision's parts.

Box stages follow one another: each is trained on what the one before made of the proposals, against a higher overlap
with the annotated boxes, and refines them further. Scores are averaged over the stages; boxes are the last one's.
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
from torchvision.ops import FeaturePyramidNetwork, clip_boxes_to_image, generalized_box_iou_loss
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from e3va_cli.heads.backward_at_once import losses_in_parts
from e3va_cli.heads.detections import Detections
from e3va_cli.heads.head import Extract, Head, Target, register
from e3va_cli.heads.mask_branch import MaskBranch
from e3va_cli.heads.norms import group_norm
from e3va_cli.heads.predictors import CascadeBoxPredictor
from e3va_cli.heads.pyramid import pyramid_of
from e3va_cli.heads.region_sampling import Regions, sample_regions
from e3va_cli.heads.roi_align import PyramidRoIAlign
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
        class_agnostic: one box for all classes of a region, not one for each.
        sampling_ratio, aligned: of `PyramidRoIAlign`.
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
        aligned: bool,
        class_agnostic: bool,
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
        self.pool = PyramidRoIAlign(roi_size, sampling_ratio, aligned=aligned)
        size = (in_channels, roi_size, roi_size)
        self.head = FastRCNNConvFCHead(size, list(conv_channels), [hidden], group_norm)
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)  # as mmdetection has it
                nn.init.zeros_(layer.bias)
        self.predictor = CascadeBoxPredictor(hidden, num_classes, class_agnostic=class_agnostic)

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Return class logits (N, K + 1) and box deltas (N, 4 K), or (N, 4), of all regions."""
        return self.predictor(self.head(self.pool(pyramid, boxes, sizes)))

    def sample(self, proposals: list[Tensor], targets: list[Target]) -> Regions:
        """The regions that this stage is trained on."""
        return sample_regions(proposals, targets, self.matcher, self.sampler)

    def losses(self, logits: Tensor, deltas: Tensor, regions: Regions, targets: list[Target]) -> tuple[Tensor, Tensor]:
        """Cross entropy of the classes, and the loss of the boxes of regions that hold an object."""
        labels, boxes = torch.cat(regions.labels), torch.cat(regions.boxes)
        positives = torch.where(labels > 0)[0]
        wanted = torch.cat([annotated_of(t, m) for t, m in zip(targets, regions.matched, strict=True)])[positives]
        own, boxes = of_class(deltas[positives], labels[positives]), boxes[positives]
        if self.loss == "giou":
            box_loss = generalized_box_iou_loss(self.coder.decode_single(own, boxes), wanted, reduction="sum")
        else:
            encoded = self.coder.encode_single(wanted, boxes)
            box_loss = smooth_l1_loss(own, encoded, reduction="sum", beta=SMOOTH_L1_BETA)
        return cross_entropy(logits, labels), self.loss_weight * box_loss / max(1, len(labels))

    def refine(
        self, logits: Tensor, deltas: Tensor, boxes: list[Tensor], sizes: Sizes, labels: Tensor | None = None
    ) -> list[Tensor]:
        """Return the boxes as this stage moves them, kept inside their images; no gradient goes through them.

        A region moves as its class does: that of its object in training (`labels` (N,), 0 for background), else the
        one with the best score.
        """
        classes = logits[:, 1:].argmax(1) + 1
        if labels is not None:
            classes = torch.where(labels > 0, labels, classes)
        moved = self.coder.decode_single(of_class(deltas.detach(), classes), torch.cat(boxes))
        return clip_each(moved, boxes, sizes)

    def candidates(self, deltas: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
        """Return for each image the boxes that this stage gives to every class: [(N_i, K, 4)], or [(N_i, 1, 4)]."""
        moved = self.coder.decode_single(deltas, torch.cat(boxes))
        return clip_each(moved.unflatten(1, (-1, 4)), boxes, sizes)


@register("cascade_mask_rcnn")
class CascadeMaskRCNN(Head):
    """Boxes in several stages, masks on each of them or on the last.

    Args:
        channels: of the four feature maps, strides 4 to 32.
        num_classes: kinds of objects, background not counted.
        fpn_channels: width of every pyramid level.
        rpn: options of `build_rpn`; one anchor size for each of the five levels (the last is pooled from the fourth).
        box: options of `BoxStage` and of the selection of what is found; `fg_iou`, `regression_weights` and
            `stage_loss_weights` have an entry for each stage. `score_averaging`: of the stages' logits, or of their
            probabilities.
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
        self.averages_logits = box.pop("score_averaging") == "logits"
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
            refined = stage.refine(logits, deltas, regions.boxes, sizes, torch.cat(regions.labels))
            boxes = [box[proposed] for box, proposed in zip(refined, regions.proposed, strict=True)]
            if index >= first_masked:
                mask_loss = self.masks[index - first_masked].loss(pyramid, sizes, regions, targets)
                yield {f"stage{index + 1}_mask": (weight if first_masked == 0 else 1.0) * mask_loss}

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        """Objects above the score threshold after NMS, with masks inside their boxes."""
        pyramid = pyramid_of(self.neck, extract(images.tensors))
        sizes = images.image_sizes
        boxes, _ = self.rpn(images, pyramid)
        *earlier, last = self.box_stages
        of_stages = []
        for stage in earlier:
            logits, deltas = stage(pyramid, boxes, sizes)
            of_stages.append(logits)
            boxes = stage.refine(logits, deltas, boxes, sizes)
        logits, deltas = last(pyramid, boxes, sizes)
        scores = self.averaged(torch.stack([*of_stages, logits])).split([len(of_image) for of_image in boxes])
        candidates = last.candidates(deltas, boxes, sizes)
        found = [self.select(b, s, size) for b, s, size in zip(candidates, scores, sizes, strict=True)]
        at, labels = [one.boxes for one in found], [one.labels for one in found]
        masks = [branch.probabilities(pyramid, at, sizes, labels) for branch in self.masks]
        for one, of_branches in zip(found, zip(*masks, strict=True), strict=True):
            one.masks = torch.stack(of_branches).mean(0)
        return found

    def averaged(self, logits: Tensor) -> Tensor:
        """Return the scores (N, K + 1) of regions from the logits (S, N, K + 1) of the stages."""
        return logits.mean(0).softmax(1) if self.averages_logits else logits.softmax(2).mean(0)

    def select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Return the best of boxes (N, K or 1, 4) with scores (N, K + 1) that do not overlap others of their class."""
        regions, classes = torch.where(scores[:, 1:] > self.score_threshold)
        boxes = boxes[regions, classes.clamp(max=boxes.shape[1] - 1)]
        scores, labels = scores[regions, classes + 1], classes + 1
        large = box_ops.remove_small_boxes(boxes, LEAST_SIDE)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        best = box_ops.batched_nms(boxes, scores, labels, self.nms_iou)[: self.detections_per_image]
        return Detections(boxes[best], scores[best], labels[best], None, size)


def of_class(deltas: Tensor, labels: Tensor) -> Tensor:
    """Return the deltas (N, 4) of each region's class, 1..K, from those of all classes (N, 4 K), or from (N, 4)."""
    deltas = deltas.unflatten(1, (-1, 4))  # N, K or 1, 4
    return deltas[torch.arange(len(labels), device=labels.device), (labels - 1).clamp(max=deltas.shape[1] - 1)]


def clip_each(moved: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Return the boxes (N, ..., 4) of all images as lists like `boxes`, each cut at the borders of its image."""
    shares = moved.split([len(of_image) for of_image in boxes])
    return [clip_boxes_to_image(share, size) for share, size in zip(shares, sizes, strict=True)]


def annotated_of(target: Target, matched: Tensor) -> Tensor:
    """The annotated box (N, 4) of each of the regions `matched` to them; zeros in an image without any."""
    boxes = target["boxes"]
    return boxes[matched] if len(boxes) else boxes.new_zeros((len(matched), 4))
