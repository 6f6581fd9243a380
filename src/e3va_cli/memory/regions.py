"""How many regions a two-stage detector works on: counted in any step, brought to the configured limit where measured.

An untrained network proposes boxes that match hardly anything, so that its step is smaller than a trained one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

JITTER = 0.02  # of a box's sides: overlaps stay above 0.9


@contextmanager
def counted_regions(model: nn.Module) -> Iterator[dict[str, int]]:
    """Within the block, the number of regions that each pooling layer cuts out in a step, by the layer's name."""
    counts: dict[str, int] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, MultiScaleRoIAlign):

                def count(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                    counts[name] = sum(len(boxes) for boxes in inputs[1])

                hooks.callback(module.register_forward_pre_hook(count).remove)
        yield counts


@contextmanager
def matching_proposals(model: nn.Module) -> Iterator[None]:
    """Within the block, half of what region proposal networks propose lies close to the annotated boxes."""
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, RegionProposalNetwork):
                hooks.callback(module.register_forward_hook(_mix_in_annotated).remove)
        yield


def _mix_in_annotated(_: nn.Module, inputs: tuple[Any, ...], output: tuple[list[Tensor], Any]) -> Any:
    proposals, losses = output
    mixed = []
    for boxes, target in zip(proposals, inputs[2], strict=True):
        annotated = target["boxes"].to(boxes)
        if not len(annotated):
            mixed.append(boxes)
            continue
        count = len(boxes) // 2
        near = annotated[torch.arange(count, device=boxes.device) % len(annotated)]
        sides = (near[:, 2:] - near[:, :2]).repeat(1, 2)
        near = near + JITTER * sides * (torch.rand_like(near) - 0.5)
        mixed.append(torch.cat((near, boxes[count:])))
    return mixed, losses
