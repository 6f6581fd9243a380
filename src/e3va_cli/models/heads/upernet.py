"""UPerNet (arXiv 1807.10221): an FPN with pyramid pooling (arXiv 1612.01105) on top, and all levels fused.

Sizes are those of mmsegmentation's UPerHead and FCNHead, but with group norms (arXiv 1803.08494): batch norms are
unreliable at one or two images per GPU, and fail on the 1x1 pooled map of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import Conv2dNormActivation

from e3va_cli.components.options import Condition, option
from e3va_cli.models.heads.base import HEADS, ClassRows, Extract, Head, HeadOptions, Target
from e3va_cli.models.heads.chunked_cross_entropy import chunked_cross_entropy
from e3va_cli.models.heads.layers import group_norm
from e3va_cli.models.heads.predictions import Segmentation
from e3va_cli.models.heads.sliding_window import sliding_scores

COARSEST_STRIDE = 32


def conv_norm_relu(in_channels: int, out_channels: int, kernel_size: int) -> Conv2dNormActivation:
    """Build a convolution without bias, group norm and ReLU, which keep height and width."""
    return Conv2dNormActivation(in_channels, out_channels, kernel_size, norm_layer=group_norm)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize bilinearly: (B, C, h, w) to (B, C, *size)."""
    return interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def adaptive_avg_pool2d(x: Tensor, cells: int) -> Tensor:
    """Pool (B, C, H, W) to (B, C, cells, cells) as PyTorch's function, but with a deterministic backward pass."""
    for axis in (2, 3):
        side = x.shape[axis]
        edges = [(i * side // cells, -(-(i + 1) * side // cells)) for i in range(cells)]
        x = torch.cat([x.narrow(axis, a, b - a).mean(axis, keepdim=True) for a, b in edges], axis)
    return x


class PyramidPooling(nn.Module):
    """Fuse a feature map with its averages over coarse grids: (B, C, H, W) to (B, width, H, W)."""

    def __init__(self, channels: int, width: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales = list(scales)
        self.project = nn.ModuleList(conv_norm_relu(channels, width, 1) for _ in scales)
        self.fuse = conv_norm_relu(channels + len(self.scales) * width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pool to every grid, project, upsample and fuse with the map."""
        maps = [
            project(adaptive_avg_pool2d(x, cells)) for cells, project in zip(self.scales, self.project, strict=True)
        ]
        return self.fuse(torch.cat([x, *(resize(m, x.shape[-2:]) for m in maps)], 1))


class FusedPyramid(nn.Module):
    """Fuse feature maps [(B, C_s, H_s, W_s)], finest first, at the finest resolution: (B, width, H_0, W_0)."""

    def __init__(self, channels: Sequence[int], width: int, pool_scales: Sequence[int]) -> None:
        super().__init__()
        self.pooling = PyramidPooling(channels[-1], width, pool_scales)
        self.laterals = nn.ModuleList(conv_norm_relu(c, width, 1) for c in channels[:-1])
        self.smooth = nn.ModuleList(conv_norm_relu(width, width, 3) for _ in channels[:-1])
        self.fuse = conv_norm_relu(len(channels) * width, width, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Add levels top-down, smooth each, and fuse all at the finest resolution."""
        *lower, top = features
        levels = [self.pooling(top)]
        for lateral, feature in zip(reversed(self.laterals), reversed(lower), strict=True):
            levels.insert(0, lateral(feature) + resize(levels[0], feature.shape[-2:]))
        outputs = [smooth(level) for smooth, level in zip(self.smooth, levels[:-1], strict=True)]
        size = features[0].shape[-2:]
        return self.fuse(torch.cat([resize(level, size) for level in (*outputs, levels[-1])], 1))


def classifier(channels: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Build dropout of whole channels and a 1x1 convolution to class scores."""
    return nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(channels, num_classes, 1))


@dataclass
class UPerNetOptions(HeadOptions):
    """Options of UPerNet."""

    fpn_channels: int = option(help="width of every pyramid level; fewer reduces memory", gt=0)
    pool_scales: list[int] = option(help="cells per side of each pooling grid")
    dropout: float = option(help="dropout of channels before classification", ge=0, le=1)
    auxiliary_stage: int = option(
        help="backbone stage, from 0, of the auxiliary classifier, used in training only",
        conditions=(Condition("auxiliary_weight", bool, "set it above 0"),),
    )
    auxiliary_channels: int = option(
        help="width of the auxiliary classifier",
        gt=0,
        conditions=(Condition("auxiliary_weight", bool, "set it above 0"),),
    )
    auxiliary_weight: float = option(help="weight of the auxiliary loss; 0 disables it, which reduces memory", ge=0)
    slide_window: int | None = option(
        None,
        former_name="window",
        help="sliding-window size in pixels, a multiple of 32, such as the training crop size; null: whole images",
        gt=0,
        free=True,
    )
    slide_stride: int = option(
        former_name="stride",
        help="sliding-window stride in pixels",
        gt=0,
        free=True,
        conditions=(Condition("slide_window", lambda value: value is not None, "set head.slide_window, such as 512"),),
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield errors in stages and windows."""
        if any(cells < 1 for cells in self.pool_scales or ()):
            yield f"{at}.pool_scales={self.pool_scales}: grids need at least 1 cell per side"
        if self.auxiliary_stage is not None and self.auxiliary_stage not in Head.out_indices:
            yield f"{at}.auxiliary_stage={self.auxiliary_stage}: must be one of {', '.join(map(str, Head.out_indices))}"
        window, stride = self.slide_window, self.slide_stride
        if window is not None and window % COARSEST_STRIDE:
            yield f"{at}.slide_window={window}: must be a multiple of {COARSEST_STRIDE}, or null for whole images"
        if window is not None and stride is not None and stride > window:
            yield f"{at}.slide_stride={stride}: must be at most {at}.slide_window={window}"


@HEADS.register("upernet", UPerNetOptions)
class UPerNet(Head):
    """UPerNet for semantic segmentation.

    Args:
        options: see `UPerNetOptions`.
        channels: of the feature maps with strides 4, 8, 16, 32.
        num_classes: classes; unlabeled pixels have none.
    """

    target_types = frozenset({"semantic"})

    def __init__(self, options: UPerNetOptions, *, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(options, channels=channels, num_classes=num_classes)
        self.neck = FusedPyramid(channels, options.fpn_channels, options.pool_scales)
        self.classifier = classifier(options.fpn_channels, num_classes, options.dropout)
        self.auxiliary: nn.Sequential | None = None
        if options.auxiliary_weight > 0:
            self.auxiliary = nn.Sequential(
                conv_norm_relu(channels[options.auxiliary_stage], options.auxiliary_channels, 3),
                classifier(options.auxiliary_channels, num_classes, options.dropout),
            )
        self.auxiliary_stage, self.auxiliary_weight = options.auxiliary_stage, options.auxiliary_weight
        self.slide_window, self.slide_stride = options.slide_window, options.slide_stride

    def class_rows(self) -> dict[str, ClassRows]:
        """Return the convolutions to class scores."""
        layers = ["classifier.1"] if self.auxiliary is None else ["classifier.1", "auxiliary.1.1"]
        return dict.fromkeys(layers, ClassRows())

    def scores(self, features: list[Tensor]) -> Tensor:
        """Return class logits, float32 (B, K, H / 4, W / 4)."""
        return self.classifier(self.neck(features)).float()

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Return the cross entropy over labeled pixels, and the weighted one of the auxiliary classifier."""
        height, width = images.tensors.shape[-2:]
        maps = [target["semantic"] for target in targets]
        labels = torch.stack([pad(m, (0, width - m.shape[1], 0, height - m.shape[0])) for m in maps])  # B, H, W
        losses = {"segmentation": chunked_cross_entropy(self.scores(features), labels)}
        if self.auxiliary is not None:
            scores = self.auxiliary(features[self.auxiliary_stage]).float()
            losses["auxiliary"] = self.auxiliary_weight * chunked_cross_entropy(scores, labels)
        return losses

    def predict(self, extract: Extract, images: ImageList) -> list[Segmentation]:
        """Return the scores of the padded images at stride 4, or of every pixel with sliding windows."""
        if self.slide_window is None:
            scores = self.scores(extract(images.tensors))
        else:
            scores = sliding_scores(
                lambda part: self.scores(extract(part)),
                images.tensors,
                window=self.slide_window,
                stride=self.slide_stride,
            )
        height, width = images.tensors.shape[-2:]
        return [Segmentation(one, (height, width), size) for one, size in zip(scores, images.image_sizes, strict=True)]
