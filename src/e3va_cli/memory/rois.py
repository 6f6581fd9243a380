"""Count the RoIs of a two-stage detector, and raise them to a trained detector's number.

An untrained RPN's proposals match hardly any ground truth, so its step needs less memory than a trained one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign

JITTER = 0.02  # of a box's sides: the IoU stays above 0.9


@contextmanager
def count_rois(model: nn.Module) -> Iterator[dict[str, int]]:
    """Yield a dict that receives, within the block, the number of RoIs of each pooling layer, by the layer's name."""
    counts: dict[str, int] = {}
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, MultiScaleRoIAlign):

                def count(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                    counts[name] = sum(len(boxes) for boxes in inputs[1])

                hooks.callback(module.register_forward_pre_hook(count).remove)
        yield counts


@contextmanager
def add_matching_proposals(model: nn.Module) -> Iterator[None]:
    """Within the block, replace half of the RPN's proposals by jittered ground-truth boxes."""
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, RegionProposalNetwork):
                hooks.callback(module.register_forward_hook(_mix_in_gt_boxes).remove)
        yield


def _mix_in_gt_boxes(_: nn.Module, inputs: tuple[Any, ...], output: tuple[list[Tensor], Any]) -> Any:
    proposals, losses = output
    mixed = []
    for boxes, target in zip(proposals, inputs[2], strict=True):
        gt_boxes = target["boxes"].to(boxes)
        if not len(gt_boxes):
            mixed.append(boxes)
            continue
        count = len(boxes) // 2
        near = gt_boxes[torch.arange(count, device=boxes.device) % len(gt_boxes)]
        sides = (near[:, 2:] - near[:, :2]).repeat(1, 2)
        near = near + JITTER * sides * (torch.rand_like(near) - 0.5)
        mixed.append(torch.cat((near, boxes[count:])))
    return mixed, losses
