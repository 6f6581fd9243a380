"""Cascade Mask R-CNN (arXiv 1712.00726, with masks arXiv 1906.09756) on an FPN, of torchvision's parts.

Box stages follow one another: each is trained on what the one before made of the proposals, against a higher overlap
with the annotated boxes, and refines them further. Scores are averaged over the stages; boxes are the last one's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork, clip_boxes_to_image, generalized_box_iou_loss
from torchvision.ops import boxes as box_ops
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from e3va_cli.components.options import option
from e3va_cli.models.heads.base import HEADS, Extract, Head, HeadOptions, Target
from e3va_cli.models.heads.eager_backward import eager_backward
from e3va_cli.models.heads.layers import CascadeBoxPredictor, group_norm
from e3va_cli.models.heads.mask_branch import MaskBranch, MaskBranchOptions
from e3va_cli.models.heads.predictions import Detections
from e3va_cli.models.heads.roi_align import PyramidRoIAlign
from e3va_cli.models.heads.roi_sampling import SampledRoIs, sample_rois
from e3va_cli.models.heads.rpn import RPNOptions, build_rpn
from e3va_cli.models.heads.torchvision_private import BalancedPositiveNegativeSampler, BoxCoder, Matcher
from e3va_cli.models.heads.two_stage import BoxOptions, is_box_weights
from e3va_cli.models.necks.fpn import build_pyramid

SMOOTH_L1_BETA = 1 / 9  # as torchvision has it in its two-stage detectors
MIN_BOX_SIZE = 1e-2  # pixels of a box that is kept

Sizes = list[tuple[int, int]]


@dataclass
class CascadeBoxOptions(BoxOptions):
    """Options of the box stages; of what is a list, one entry for each stage."""

    aligned: bool = option(
        help="false, as torchvision has it: regions are half a cell of the feature map off", before=False
    )
    class_agnostic: bool = option(help="true: one box for all classes of a region, not one for each", before=True)
    score_averaging: str = option(
        help="over the stages", choices=("logits", "probabilities"), free=True, before="probabilities"
    )
    conv_channels: list[int] = option(help="of the convolutions before the linear layer; fewer reduces memory")
    fg_iou: list[float] = option(help="overlap from which on a region holds an object, one for each stage")
    regression_weights: list[Any] = option(help="factors of (x, y, width, height) deltas, four for each stage")
    stage_loss_weights: list[float] = option(help="of each stage's losses")
    loss: str = option(help="giou (arXiv 1902.09630), or smooth_l1, with loss_weight 1", choices=("giou", "smooth_l1"))
    loss_weight: float = option(help="of the boxes against the classes", least=0)

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the lists."""
        lists = {name: getattr(self, name) for name in ("fg_iou", "regression_weights", "stage_loss_weights")}
        if any(one is None for one in lists.values()):
            return
        for one in self.regression_weights:
            if not is_box_weights(one):
                yield f"{at}.regression_weights: {one} is no list of four numbers above 0"
        if len({len(one) for one in lists.values()}) > 1:
            counts = ", ".join(f"{at}.{key} has {len(one)}" for key, one in lists.items())
            yield f"{counts}: each needs one entry for each stage"


@dataclass
class CascadeMaskOptions(MaskBranchOptions):
    """Options of the mask branches."""

    every_stage: bool = option(help="false trains masks on the last stage only and reduces memory")


@dataclass
class CascadeMaskRCNNOptions(HeadOptions):
    """Options of Cascade Mask R-CNN."""

    fpn_channels: int = option(help="width of every pyramid level", above=0)
    rpn: RPNOptions = option(RPNOptions)
    box: CascadeBoxOptions = option(CascadeBoxOptions)
    mask: CascadeMaskOptions = option(CascadeMaskOptions)


class BoxStage(nn.Module):
    """One stage: cuts regions out, classifies them, and refines their boxes.

    Args:
        options: of all stages.
        in_channels: of every pyramid level.
        num_classes: background counted.
        fg_iou: overlap with an annotated box from which on a region holds the object.
        regression_weights: factors of (x, y, width, height) deltas; larger ones for finer corrections.
    """

    def __init__(
        self,
        options: CascadeBoxOptions,
        in_channels: int,
        num_classes: int,
        *,
        fg_iou: float,
        regression_weights: Sequence[float],
    ) -> None:
        super().__init__()
        self.loss, self.loss_weight = options.loss, options.loss_weight
        self.coder = BoxCoder(tuple(regression_weights))
        self.matcher = Matcher(fg_iou, fg_iou, allow_low_quality_matches=False)
        self.sampler = BalancedPositiveNegativeSampler(options.batch_size_per_image, options.positive_fraction)
        self.pool = PyramidRoIAlign(options.roi_size, options.sampling_ratio, aligned=options.aligned)
        size = (in_channels, options.roi_size, options.roi_size)
        self.head = FastRCNNConvFCHead(size, list(options.conv_channels), [options.hidden], group_norm)
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)  # as mmdetection has it
                nn.init.zeros_(layer.bias)
        self.predictor = CascadeBoxPredictor(options.hidden, num_classes, class_agnostic=options.class_agnostic)

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Return class logits (N, K + 1) and box deltas (N, 4 K), or (N, 4), of all regions."""
        return self.predictor(self.head(self.pool(pyramid, boxes, sizes)))

    def sample(self, proposals: list[Tensor], targets: list[Target]) -> SampledRoIs:
        """The regions that this stage is trained on."""
        return sample_rois(proposals, targets, self.matcher, self.sampler)

    def losses(
        self, logits: Tensor, deltas: Tensor, regions: SampledRoIs, targets: list[Target]
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy of the classes, and the loss of the boxes of regions that hold an object."""
        labels, boxes = torch.cat(regions.labels), torch.cat(regions.boxes)
        positives = torch.where(labels > 0)[0]
        wanted = torch.cat([gather_gt_boxes(t, m) for t, m in zip(targets, regions.matched, strict=True)])[positives]
        own, boxes = select_class(deltas[positives], labels[positives]), boxes[positives]
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
        moved = self.coder.decode_single(select_class(deltas.detach(), classes), torch.cat(boxes))
        return clip_boxes(moved, boxes, sizes)

    def candidates(self, deltas: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
        """Return for each image the boxes that this stage gives to every class: [(N_i, K, 4)], or [(N_i, 1, 4)]."""
        moved = self.coder.decode_single(deltas, torch.cat(boxes))
        return clip_boxes(moved.unflatten(1, (-1, 4)), boxes, sizes)


@HEADS.register("cascade_mask_rcnn", CascadeMaskRCNNOptions)
class CascadeMaskRCNN(Head):
    """Boxes in several stages, masks on each of them or on the last.

    Args:
        options: see `CascadeMaskRCNNOptions`.
        channels: of the four feature maps, strides 4 to 32.
        num_classes: kinds of objects, background not counted.
    """

    target_types = frozenset({"boxes", "masks"})
    box_stages: Any  # BoxStage
    masks: Any  # MaskBranch, of the last stages

    def __init__(self, options: CascadeMaskRCNNOptions, *, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(options, channels=channels, num_classes=num_classes)
        box, width = options.box, options.fpn_channels
        self.score_threshold, self.nms_iou = box.score_threshold, box.nms_iou
        self.detections_per_image = box.detections_per_image
        self.averages_logits = box.score_averaging == "logits"
        self.loss_weights = box.stage_loss_weights
        self.neck = FeaturePyramidNetwork(list(channels), width, LastLevelMaxPool())
        self.rpn = build_rpn(options.rpn, channels=width)
        self.box_stages = nn.ModuleList(
            BoxStage(box, width, num_classes + 1, fg_iou=iou, regression_weights=weights)
            for iou, weights in zip(box.fg_iou, box.regression_weights, strict=True)
        )
        branches = len(self.box_stages) if options.mask.every_stage else 1
        self.masks = nn.ModuleList(MaskBranch(options.mask, width, num_classes + 1) for _ in range(branches))

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Objectness and proposal box; class, box and mask of each stage, weighted."""

        def chunks(pyramid: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
            proposals, losses = self.rpn(images, pyramid, targets)
            yield losses
            yield from self.stage_losses(pyramid, proposals, images.image_sizes, targets)

        return eager_backward(chunks, build_pyramid(self.neck, features), (self.rpn, self.box_stages, self.masks))

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
        pyramid = build_pyramid(self.neck, extract(images.tensors))
        sizes = images.image_sizes
        boxes, _ = self.rpn(images, pyramid)
        *earlier, last = self.box_stages
        stage_logits = []
        for stage in earlier:
            logits, deltas = stage(pyramid, boxes, sizes)
            stage_logits.append(logits)
            boxes = stage.refine(logits, deltas, boxes, sizes)
        logits, deltas = last(pyramid, boxes, sizes)
        scores = self.average_scores(torch.stack([*stage_logits, logits])).split([len(of_image) for of_image in boxes])
        candidates = last.candidates(deltas, boxes, sizes)
        found = [self.select(b, s, size) for b, s, size in zip(candidates, scores, sizes, strict=True)]
        at, labels = [one.boxes for one in found], [one.labels for one in found]
        masks = [branch.probabilities(pyramid, at, sizes, labels) for branch in self.masks]
        for one, of_branches in zip(found, zip(*masks, strict=True), strict=True):
            one.masks = torch.stack(of_branches).mean(0)
        return found

    def average_scores(self, logits: Tensor) -> Tensor:
        """Return the scores (N, K + 1) of regions from the logits (S, N, K + 1) of the stages."""
        return logits.mean(0).softmax(1) if self.averages_logits else logits.softmax(2).mean(0)

    def select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Return the best of boxes (N, K or 1, 4) with scores (N, K + 1) that do not overlap others of their class."""
        regions, classes = torch.where(scores[:, 1:] > self.score_threshold)
        boxes = boxes[regions, classes.clamp(max=boxes.shape[1] - 1)]
        scores, labels = scores[regions, classes + 1], classes + 1
        large = box_ops.remove_small_boxes(boxes, MIN_BOX_SIZE)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        best = box_ops.batched_nms(boxes, scores, labels, self.nms_iou)[: self.detections_per_image]
        return Detections(boxes[best], scores[best], labels[best], None, size)


def select_class(deltas: Tensor, labels: Tensor) -> Tensor:
    """Return the deltas (N, 4) of each region's class, 1..K, from those of all classes (N, 4 K), or from (N, 4)."""
    deltas = deltas.unflatten(1, (-1, 4))  # N, K or 1, 4
    return deltas[torch.arange(len(labels), device=labels.device), (labels - 1).clamp(max=deltas.shape[1] - 1)]


def clip_boxes(moved: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Return the boxes (N, ..., 4) of all images as lists like `boxes`, each cut at the borders of its image."""
    per_image = moved.split([len(of_image) for of_image in boxes])
    return [clip_boxes_to_image(boxes_of_image, size) for boxes_of_image, size in zip(per_image, sizes, strict=True)]


def gather_gt_boxes(target: Target, matched: Tensor) -> Tensor:
    """The annotated box (N, 4) of each of the regions `matched` to them; zeros in an image without any."""
    boxes = target["boxes"]
    return boxes[matched] if len(boxes) else boxes.new_zeros((len(matched), 4))
