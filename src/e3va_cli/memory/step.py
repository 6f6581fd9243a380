"""One training step as Lightning runs it, on random data of a given size; estimated, or run and measured."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from e3va_cli.data.collate import SIZE_DIVISOR, Batch
from e3va_cli.data.dataset import Target
from e3va_cli.models.model import DenseModel
from e3va_cli.models.train_step import clip_gradients, compute_losses, gradient_norm

DTYPES = {"32": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}  # of autocast, by trainer.precision


@dataclass(frozen=True)
class StepSize:
    """Sizes that the memory of a step depends on, besides the model's.

    Attributes:
        batch_size: images.
        image_size: height and width in pixels, before padding to multiples of 32.
        instances_per_image: ground-truth boxes of each image.
        precision: of `trainer.precision`.
        clip_norm: maximum gradient norm, None without clipping.
        accumulates: gradients exist before the step, as in gradient accumulation.
    """

    batch_size: int
    image_size: tuple[int, int]
    instances_per_image: int
    precision: str
    clip_norm: float | None
    accumulates: bool = False

    @property
    def padded_size(self) -> tuple[int, int]:
        """Return height and width after padding."""
        height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in self.image_size)
        return height, width


def random_batch(size: StepSize, *, num_classes: int, target_types: frozenset[str], device: str = "cpu") -> Batch:
    """Return random images and targets of the given size.

    Args:
        target_types: of boxes, masks and semantic. The sides of a box are a tenth to a half of the image's.
    """
    height, width = size.image_size
    images = torch.randint(0, 256, (size.batch_size, 3, *size.padded_size), dtype=torch.uint8, device=device)
    targets: list[Target] = []
    for _ in range(size.batch_size):
        if "semantic" in target_types:
            labels = torch.randint(1, num_classes + 1, size.image_size, dtype=torch.int16, device=device)
            targets.append({"semantic": labels})
            continue
        sides = torch.tensor([width, height], dtype=torch.float32, device=device)
        extent = (0.1 + 0.4 * torch.rand(size.instances_per_image, 2, device=device)) * sides
        corner = torch.rand_like(extent) * (sides - extent)
        target = {
            "boxes": torch.cat((corner, corner + extent), dim=1),
            "labels": torch.randint(1, num_classes + 1, (size.instances_per_image,), device=device),
        }
        if "masks" in target_types:
            target["masks"] = boxes_to_masks(target["boxes"], height, width)
        targets.append(target)
    return Batch(images, [size.image_size] * size.batch_size, targets)


def boxes_to_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the mask of each box (N, 4): (N, H, W), uint8."""
    x1, y1, x2, y2 = (edge[:, None] for edge in boxes.unbind(1))
    rows, columns = torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device)
    inside = ((rows >= y1) & (rows < y2))[:, :, None] & ((columns >= x1) & (columns < x2))[:, None, :]
    return inside.to(torch.uint8)


def batch_tensors(batch: Batch) -> list[Tensor]:
    """Return all tensors of a batch."""
    return [batch.images, *(v for target in batch.targets for v in target.values() if isinstance(v, Tensor))]


def init_optimizer_state(optimizer: Optimizer, *, accumulates: bool = False) -> None:
    """Create the optimizer's state with a step of zero gradients; keep the gradients if it `accumulates`."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if not accumulates:
        optimizer.zero_grad()


def optimizer_tensors(optimizer: Optimizer) -> list[Tensor]:
    """Return all tensors of an optimizer's state."""
    return [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]


def train_step(
    model: DenseModel,
    optimizer: Optimizer,
    batch: Batch,
    size: StepSize,
    *,
    device: str = "cpu",
    autocast_mode: AbstractContextManager[Any] | None = None,
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Run forward, backward, clipping and the optimizer, then set gradients to None.

    Args:
        autocast_mode: entered for the forward pass, inside autocast.
        phase: entered with the name of each phase: forward, backward, optimizer.
        scaler: of the loss, for 16-mixed on a GPU.
    """
    dtype = DTYPES[size.precision]
    autocast = nullcontext() if dtype is None else torch.autocast(device, dtype=dtype, cache_enabled=False)
    with phase("forward"), autocast, autocast_mode or nullcontext():
        losses = compute_losses(model, batch)
    with phase("backward"):
        (scaler.scale(losses["loss"]) if scaler else losses["loss"]).backward()
    with phase("optimizer"):
        if scaler:
            scaler.unscale_(optimizer)
        clip_gradients(optimizer, size.clip_norm, gradient_norm(optimizer))
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if not size.accumulates:
            optimizer.zero_grad()
