"""What happens to an image and its target between the file and the batch, with torchvision's transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F  # noqa: N812 (torchvision's own alias)

from e3va_cli.data.targets import Target

Transforms = Callable[..., tuple[Any, Target]]


class ShortestSide(torch.nn.Module):
    """Resize an image, not its target, to a short side of `size` and a long side of at most `max_size` pixels."""

    def __init__(self, size: int, max_size: int) -> None:
        super().__init__()
        self.size, self.max_size = size, max_size

    def forward(self, image: tv_tensors.Image, target: Target) -> tuple[tv_tensors.Image, Target]:
        """Evaluation compares at the original size, so the target stays as it is."""
        height, width = image.shape[-2:]
        scale = min(self.size / min(height, width), self.max_size / max(height, width))
        size = [max(1, int(height * scale)), max(1, int(width * scale))]
        return F.resize(image, size, antialias=True), target


def train_transforms(*, short_sides: Sequence[int], max_size: int, flip: float) -> Transforms:
    """Multi-scale resize (one of `short_sides` for each image) and horizontal flip; drops boxes that vanish."""
    return v2.Compose(
        [
            v2.RandomShortestSize(list(short_sides), max_size=max_size, antialias=True),
            v2.RandomHorizontalFlip(flip),
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1),
            v2.ToPureTensor(),
        ]
    )


def val_transforms(*, short_side: int, max_size: int) -> Transforms:
    """Resize to one size."""
    return v2.Compose([ShortestSide(short_side, max_size), v2.ToPureTensor()])
