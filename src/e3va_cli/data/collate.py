"""Batches: images of several sizes in one padded tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from e3va_cli.data.dataset import Target

SIZE_DIVISOR = 32  # the coarsest feature map's stride


@dataclass
class Batch:
    """A batch of padded images with their targets.

    Attributes:
        images: uint8 (B, 3, H, W), padded at the right and bottom; H and W are multiples of 32.
        image_sizes: (height, width) of each image without padding.
        targets: of each image; see `dataset.Target`.
    """

    images: Tensor
    image_sizes: list[tuple[int, int]]
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str, **options: Any) -> Batch:
        """Return the batch with all tensors on `device`."""
        targets = [
            {k: v.to(device, **options) if isinstance(v, Tensor) else v for k, v in target.items()}
            for target in self.targets
        ]
        return Batch(self.images.to(device, **options), self.image_sizes, targets)

    def share_memory(self) -> None:
        """Move all tensors to shared memory.

        Raises:
            RuntimeError: out of shared memory.
        """
        for tensor in (self.images, *(v for target in self.targets for v in target.values() if isinstance(v, Tensor))):
            if tensor.numel():
                tensor.share_memory_()

    def pin_memory(self) -> Batch:
        """Return the batch in pinned memory, for asynchronous copies to the GPU."""
        targets = [
            {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in target.items()} for target in self.targets
        ]
        return Batch(self.images.pin_memory(), self.image_sizes, targets)


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Pad images (3, h, w) with zeros to the largest height and width, rounded up to multiples of 32."""
    sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image, _ in samples]
    height, width = (-(-max(side) // SIZE_DIVISOR) * SIZE_DIVISOR for side in zip(*sizes, strict=True))
    images = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8)
    for padded, (image, _), (h, w) in zip(images, samples, sizes, strict=True):
        padded[:, :h, :w] = image
    return Batch(images, sizes, [target for _, target in samples])
