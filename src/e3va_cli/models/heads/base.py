"""The one interface of heads, and the registry that the `head=` option chooses from.

A head gets one feature map for each backbone stage that it reads, whatever the backbone and the tuning method.
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
Extract = Callable[[Tensor], list[Tensor]]  # images (B, 3, H, W) to one feature map per stage that the head reads


@dataclass
class HeadOptions(Options):
    """Options of every head; each has further ones."""

    name: str = option()
    recompute_neck: bool = option(
        False, help="true: the neck once more in the backward pass, which reduces memory", free=True
    )


class Head(nn.Module):
    """From feature maps [(B, C_s, H_s, W_s)] and the padded images they come from to losses or findings.

    Attributes:
        neck: what the head makes of the feature maps first, such as a pyramid.
        target_types: what training targets must hold, of boxes, masks and semantic; it is also what the findings are.
        out_indices: stages of the backbone whose feature maps the head reads.
    """

    neck: nn.Module
    target_types: frozenset[str]
    out_indices: tuple[int, ...] = (0, 1, 2, 3)

    def __init__(self, options: Any, *, channels: Sequence[int], num_classes: int) -> None:
        super().__init__()

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Target]) -> dict[str, Tensor]:
        """Named scalar losses; their sum is minimised."""
        raise NotImplementedError

    def predict(self, extract: Extract, images: ImageList) -> list[Detections] | list[Segmentation]:
        """What is found in each image, in pixels of the images as the network saw them."""
        raise NotImplementedError


HEADS: Registry[type[Head]] = Registry("head")


def build_head(options: HeadOptions, *, channels: Sequence[int], num_classes: int) -> Head:
    """Return a new head for feature maps of `channels`, finding `num_classes` kinds of things (background not counted).

    With `recompute_neck`, training keeps nothing within the neck: it runs again in the backward pass.

    Raises:
        UserError: an option is out of its range.
    """
    require_valid(options, "head")
    kind = HEADS[options.name]
    head = kind(options, channels=[channels[stage] for stage in kind.out_indices], num_classes=num_classes)
    if options.recompute_neck:
        head.neck.forward = partial(checkpoint, head.neck.forward, use_reentrant=False, determinism_check="none")
    return head
