"""The one interface of heads, and the registry that the `head=` option chooses from.

A head gets one feature map per backbone stage, whatever the backbone and the tuning method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

from e3va_cli.heads.detections import Detections

Target = dict[str, Any]


class Head(nn.Module):
    """From feature maps [(B, C_s, H_s, W_s)] and the padded images they come from to losses or findings.

    Attributes:
        needs_masks: whether training targets must have masks.
        metrics: the kinds of average precision that its findings are measured by.
    """

    needs_masks: bool
    metrics: tuple[str, ...]

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Named scalar losses; their sum is minimised."""
        raise NotImplementedError

    def predict(self, features: list[Tensor], images: ImageList) -> list[Detections]:
        """What is found in each image, in pixels of the images as the network saw them."""
        raise NotImplementedError


HeadClass = TypeVar("HeadClass", bound=type[Head])
HEADS: dict[str, type[Head]] = {}


def register(name: str) -> Callable[[HeadClass], HeadClass]:
    """Make a head choosable by `head.name`; its keyword arguments are the other keys of its YAML."""

    def add(head: HeadClass) -> HeadClass:
        HEADS[name] = head
        return head

    return add


def build_head(name: str, *, channels: Sequence[int], num_classes: int, **options: Any) -> Head:
    """A new head for feature maps of `channels`, finding `num_classes` kinds of things (background not counted)."""
    return HEADS[name](channels=channels, num_classes=num_classes, **options)
