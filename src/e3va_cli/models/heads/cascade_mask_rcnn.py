"""Cascade Mask R-CNN (arXiv 1712.00726, with masks arXiv 1906.09756) on an FPN, of torchvision's modules.

Each box stage refines the boxes of the stage before it and is trained at a higher IoU threshold. Scores are averaged
over the stages; boxes are those of the last.
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
from e3va_cli.models.heads.base import HEADS, ClassRows, Extract, Head, HeadOptions, Target
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

SMOOTH_L1_BETA = 1 / 9  # as in torchvision's two-stage detectors
MIN_BOX_SIZE = 1e-2  # pixels

Sizes = list[tuple[int, int]]


@dataclass
class CascadeBoxOptions(BoxOptions):
    """Options of the box stages; lists have one entry per stage."""

    aligned: bool = option(
        help="aligned RoIAlign; false: offset by half a feature cell, as in torchvision", legacy_value=False
    )
    class_agnostic: bool = option(help="true: one box per RoI for all classes; false: one per class", legacy_value=True)
    score_averaging: str = option(
        help="what is averaged over the stages",
        choices=("logits", "probabilities"),
        free=True,
        legacy_value="probabilities",
    )
    conv_channels: list[int] = option(
        help="output channels of the convolutions before the linear layer; fewer reduces memory"
    )
    fg_iou: list[float] = option(help="IoU from which a RoI is positive, one per stage")
    regression_weights: list[Any] = option(help="factors of (x, y, width, height) deltas, four per stage")
    stage_loss_weights: list[float] = option(help="weight of each stage's losses")
    loss: str = option(
        help="box loss: giou (arXiv 1902.09630), or smooth_l1 with loss_weight=1", choices=("giou", "smooth_l1")
    )
    loss_weight: float = option(help="weight of the box loss", ge=0)

    def errors(self, at: str) -> Iterator[str]:
        """Yield errors in the lists."""
        lists = {name: getattr(self, name) for name in ("fg_iou", "regression_weights", "stage_loss_weights")}
        if any(one is None for one in lists.values()):
            return
        for one in self.regression_weights:
            if not is_box_weights(one):
                yield f"{at}.regression_weights: {one} must be a list of four numbers above 0"
        if len({len(one) for one in lists.values()}) > 1:
            counts = ", ".join(f"{at}.{key} has {len(one)}" for key, one in lists.items())
            yield f"{counts}: each needs one entry per stage"


@dataclass
class CascadeMaskOptions(MaskBranchOptions):
    """Options of the mask branches."""

    every_stage: bool = option(help="false: a mask branch on the last stage only, which reduces memory")


@dataclass
class CascadeMaskRCNNOptions(HeadOptions):
    """Options of Cascade Mask R-CNN."""

    fpn_channels: int = option(help="width of every pyramid level", gt=0)
    rpn: RPNOptions = option(RPNOptions)
    box: CascadeBoxOptions = option(CascadeBoxOptions)
    mask: CascadeMaskOptions = option(CascadeMaskOptions)


class BoxStage(nn.Module):
    """One box stage: pools RoIs, classifies them and refines their boxes.

    Args:
        options: see `CascadeBoxOptions`.
        in_channels: channels of every pyramid level.
        num_classes: classes with background.
        fg_iou: IoU with a ground-truth box from which a RoI is positive.
        regression_weights: factors of (x, y, width, height) deltas.
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
                nn.init.xavier_uniform_(layer.weight)  # as in mmdetection
                nn.init.zeros_(layer.bias)
        self.predictor = CascadeBoxPredictor(options.hidden, num_classes, class_agnostic=options.class_agnostic)

    def forward(self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes) -> tuple[Tensor, Tensor]:
        """Return class logits (N, K + 1) and box deltas (N, 4 K), or (N, 4), of all RoIs."""
        return self.predictor(self.head(self.pool(pyramid, boxes, sizes)))

    def sample(self, proposals: list[Tensor], targets: list[Target]) -> SampledRoIs:
        """Sample the RoIs to train this stage on."""
        return sample_rois(proposals, targets, self.matcher, self.sampler)

    def losses(self, logits: Tensor, deltas: Tensor, rois: SampledRoIs, targets: list[Target]) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the classes, and the box loss of positive RoIs."""
        labels, boxes = torch.cat(rois.labels), torch.cat(rois.boxes)
        positives = torch.where(labels > 0)[0]
        gt_boxes = torch.cat([gather_gt_boxes(t, m) for t, m in zip(targets, rois.matched, strict=True)])[positives]
        deltas, boxes = select_class(deltas[positives], labels[positives]), boxes[positives]
        if self.loss == "giou":
            box_loss = generalized_box_iou_loss(self.coder.decode_single(deltas, boxes), gt_boxes, reduction="sum")
        else:
            encoded = self.coder.encode_single(gt_boxes, boxes)
            box_loss = smooth_l1_loss(deltas, encoded, reduction="sum", beta=SMOOTH_L1_BETA)
        return cross_entropy(logits, labels), self.loss_weight * box_loss / max(1, len(labels))

    def refine(
        self, logits: Tensor, deltas: Tensor, boxes: list[Tensor], sizes: Sizes, labels: Tensor | None = None
    ) -> list[Tensor]:
        """Return the boxes refined by this stage, clipped to their images, without gradients.

        Deltas are those of the object's class in training (`labels` (N,), 0 for background), else of the class with
        the highest score.
        """
        classes = logits[:, 1:].argmax(1) + 1
        if labels is not None:
            classes = torch.where(labels > 0, labels, classes)
        moved = self.coder.decode_single(select_class(deltas.detach(), classes), torch.cat(boxes))
        return clip_boxes(moved, boxes, sizes)

    def candidates(self, deltas: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
        """Return the refined boxes for every class in each image: [(N_i, K, 4)], or [(N_i, 1, 4)]."""
        moved = self.coder.decode_single(deltas, torch.cat(boxes))
        return clip_boxes(moved.unflatten(1, (-1, 4)), boxes, sizes)


@HEADS.register("cascade_mask_rcnn", CascadeMaskRCNNOptions)
class CascadeMaskRCNN(Head):
    """Cascade Mask R-CNN, with masks on every stage or on the last.

    Args:
        options: see `CascadeMaskRCNNOptions`.
        channels: of the feature maps with strides 4, 8, 16, 32.
        num_classes: classes without background.
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
        self.class_agnostic = box.class_agnostic

    def class_rows(self) -> dict[str, ClassRows]:
        """Return the last layers of the box stages and mask branches."""
        rows = {}
        for index in range(len(self.box_stages)):
            rows[f"box_stages.{index}.predictor.cls_score"] = ClassRows(background=True)
            if not self.class_agnostic:
                rows[f"box_stages.{index}.predictor.bbox_pred"] = ClassRows(rows=4)
        for index in range(len(self.masks)):
            rows[f"masks.{index}.predictor.mask_fcn_logits"] = ClassRows(background=True)
        return rows

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Return objectness and proposal box losses, and weighted class, box and mask losses of each stage."""

        def chunks(pyramid: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
            proposals, losses = self.rpn(images, pyramid, targets)
            yield losses
            yield from self.stage_losses(pyramid, proposals, images.image_sizes, targets)

        return eager_backward(chunks, build_pyramid(self.neck, features), (self.rpn, self.box_stages, self.masks))

    def stage_losses(
        self, pyramid: dict[str, Tensor], boxes: list[Tensor], sizes: Sizes, targets: list[Target]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the weighted losses of each stage, first of boxes, then of masks, without gradients between them."""
        first_masked = len(self.box_stages) - len(self.masks)
        for index, (stage, weight) in enumerate(zip(self.box_stages, self.loss_weights, strict=True)):
            rois = stage.sample(boxes, targets)
            logits, deltas = stage(pyramid, rois.boxes, sizes)
            class_loss, box_loss = stage.losses(logits, deltas, rois, targets)
            yield {f"stage{index + 1}_class": weight * class_loss, f"stage{index + 1}_box": weight * box_loss}
            refined = stage.refine(logits, deltas, rois.boxes, sizes, torch.cat(rois.labels))
            boxes = [box[proposed] for box, proposed in zip(refined, rois.proposed, strict=True)]
            if index >= first_masked:
                mask_loss = self.masks[index - first_masked].loss(pyramid, sizes, rois, targets)
                yield {f"stage{index + 1}_mask": (weight if first_masked == 0 else 1.0) * mask_loss}

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        """Return the detections above the score threshold after NMS, with masks inside their boxes."""
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
        scores = self.average_scores(torch.stack([*stage_logits, logits])).split([len(b) for b in boxes])
        candidates = last.candidates(deltas, boxes, sizes)
        detections = [self.select(b, s, size) for b, s, size in zip(candidates, scores, sizes, strict=True)]
        boxes, labels = [d.boxes for d in detections], [d.labels for d in detections]
        masks = [branch.probabilities(pyramid, boxes, sizes, labels) for branch in self.masks]
        for image_detections, image_masks in zip(detections, zip(*masks, strict=True), strict=True):
            image_detections.masks = torch.stack(image_masks).mean(0)
        return detections

    def average_scores(self, logits: Tensor) -> Tensor:
        """Return the scores (N, K + 1) of RoIs from the logits (S, N, K + 1) of the stages."""
        return logits.mean(0).softmax(1) if self.averages_logits else logits.softmax(2).mean(0)

    def select(self, boxes: Tensor, scores: Tensor, size: tuple[int, int]) -> Detections:
        """Filter boxes (N, K or 1, 4) with scores (N, K + 1) by score and size, then by NMS per class."""
        rois, classes = torch.where(scores[:, 1:] > self.score_threshold)
        boxes = boxes[rois, classes.clamp(max=boxes.shape[1] - 1)]
        scores, labels = scores[rois, classes + 1], classes + 1
        large = box_ops.remove_small_boxes(boxes, MIN_BOX_SIZE)
        boxes, scores, labels = boxes[large], scores[large], labels[large]
        best = box_ops.batched_nms(boxes, scores, labels, self.nms_iou)[: self.detections_per_image]
        return Detections(boxes[best], scores[best], labels[best], None, size)


def select_class(deltas: Tensor, labels: Tensor) -> Tensor:
    """Return the deltas (N, 4) of each RoI's class, 1..K, from those of all classes (N, 4 K), or from (N, 4)."""
    deltas = deltas.unflatten(1, (-1, 4))  # N, K or 1, 4
    return deltas[torch.arange(len(labels), device=labels.device), (labels - 1).clamp(max=deltas.shape[1] - 1)]


def clip_boxes(moved: Tensor, boxes: list[Tensor], sizes: Sizes) -> list[Tensor]:
    """Split `moved` (N, ..., 4) by image like `boxes`, and clip to the images."""
    split = moved.split([len(b) for b in boxes])
    return [clip_boxes_to_image(b, size) for b, size in zip(split, sizes, strict=True)]


def gather_gt_boxes(target: Target, matched: Tensor) -> Tensor:
    """Return the ground-truth box (N, 4) of each index in `matched`; zeros in an image without objects."""
    boxes = target["boxes"]
    return boxes[matched] if len(boxes) else boxes.new_zeros((len(matched), 4))
