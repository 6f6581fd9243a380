"""The interface of heads, and the registry behind the `head=` option.

A head reads one feature map per stage in its `out_indices`, whatever the backbone and tuning method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection.image_list import ImageList

from e3va_cli.components.options import Options, option, require_valid
from e3va_cli.components.registry import Registry
from e3va_cli.models.heads.predictions import Detections, Segmentation

Target = dict[str, Any]
Extract = Callable[[Tensor], list[Tensor]]  # images (B, 3, H, W) to the head's feature maps


@dataclass
class HeadOptions(Options):
    """Options common to all heads."""

    name: str = option()
    recompute_neck: bool = option(
        False, help="true: recompute the neck in the backward pass, which reduces memory", free=True
    )


@dataclass(frozen=True)
class ClassRows:
    """How classes divide the rows of a layer, the first dimension of its weight and bias: (groups, classes, rows).

    Attributes:
        groups: number of times that all classes are repeated, such as once per anchor.
        rows: consecutive rows of each class, such as the 4 deltas of a box.
        background: whether background has rows too, before those of the classes.
    """

    groups: int = 1
    rows: int = 1
    background: bool = False

    def split(self, value: Tensor) -> Tensor:
        """Return a view (groups, classes, rows, ...) of a weight or bias (groups * classes * rows, ...)."""
        return value.unflatten(0, (self.groups, -1, self.rows))


class Head(nn.Module):
    """Compute losses or predictions from feature maps [(B, C_s, H_s, W_s)] of padded images.

    Attributes:
        neck: the first module applied to the feature maps, such as an FPN.
        target_types: keys of training targets, and types of predictions: boxes, masks, semantic.
        out_indices: stages of the backbone whose feature maps the head reads.
    """

    neck: nn.Module
    target_types: frozenset[str]
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    def __init__(self, options: Any, *, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()

    def class_rows(self) -> dict[str, ClassRows]:
        """Return the layers with rows for each class, by their names in the head; by default there are none."""
        return {}

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Return named scalar losses, to be minimized as their sum."""
        raise NotImplementedError

    def predict(self, extract: Extract, images: ImageList) -> list[Detections] | list[Segmentation]:
        """Return the predictions for each image, in pixels of the network's input."""
        raise NotImplementedError


HEADS: Registry[type[Head]] = Registry("head")


def build_head(options: HeadOptions, *, channels: Sequence[int], num_classes: int) -> Head:
    """Build a head for feature maps of `channels` and `num_classes` classes without background.

    With `recompute_neck`, the neck's activations are recomputed in the backward pass.

    Raises:
        UserError: an option is out of range.
    """
    require_valid(options, "head")
    head_type = HEADS[options.name]
    head = head_type(options, channels=[channels[i] for i in head_type.out_indices], num_classes=num_classes)
    if options.recompute_neck:
        head.neck.forward = partial(checkpoint, head.neck.forward, use_reentrant=False, determinism_check="none")
    return head
