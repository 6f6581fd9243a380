"""Images of several sizes in one padded tensor."""

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
    """What one step works on.

    Attributes:
        images: uint8 (B, 3, H, W), each image in the upper left corner; H and W are multiples of 32.
        image_sizes: (height, width) of each image without its padding.
        targets: one for each image.
    """

    images: Tensor
    image_sizes: list[tuple[int, int]]
    targets: list[Target]

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str, **options: Any) -> Batch:
        """The batch with all tensors on `device`."""
        targets = [
            {k: v.to(device, **options) if isinstance(v, Tensor) else v for k, v in target.items()}
            for target in self.targets
        ]
        return Batch(self.images.to(device, **options), self.image_sizes, targets)

    def share_memory(self) -> None:
        """Move all tensors to shared memory, in which another process finds them.

        Raises:
            RuntimeError: it does not suffice.
        """
        for tensor in (self.images, *(v for target in self.targets for v in target.values() if isinstance(v, Tensor))):
            if tensor.numel():
                tensor.share_memory_()

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a copy to the GPU does not block."""
        targets = [
            {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in target.items()} for target in self.targets
        ]
        return Batch(self.images.pin_memory(), self.image_sizes, targets)


def collate(samples: Sequence[tuple[Tensor, Target]]) -> Batch:
    """Pad images (3, h, w) with zeros to the largest of them, rounded up to a multiple of 32."""
    sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image, _ in samples]
    height, width = (-(-max(side) // SIZE_DIVISOR) * SIZE_DIVISOR for side in zip(*sizes, strict=True))
    images = torch.zeros((len(samples), 3, height, width), dtype=torch.uint8)
    for padded, (image, _), (h, w) in zip(images, samples, sizes, strict=True):
        padded[:, :h, :w] = image
    return Batch(images, sizes, [target for _, target in samples])
