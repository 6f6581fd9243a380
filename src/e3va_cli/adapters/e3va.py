"""E3VA: efficient parallel adapters on a gradient highway beside a frozen backbone.

Paper: D. Yin, X. Han, B. Li, H. Feng, J. Bai, "Parameter-efficient is not sufficient: Exploring Parameter, Memory,
and Time Efficient Adapter Tuning for Dense Predictions", arXiv 2306.09729, section 3 and figure 2.

Per stage s the frozen backbone yields, without gradients, what each residual branch adds to its stream:
a_l (attention) and m_l (MLP). The highway h adds the adapted branches instead,

    h_{1,0} = stem(images)                      no gradient
    h_{s,0} = Down_s(h_{s-1,L})                 the backbone's own downsampling, frozen but differentiable
    h_{s,l} = h_{s,l-1} + E(a_l) + E'(m_l)
    F_s     = LayerNorm_s(h_{s,L})              trainable

so the backward pass meets adapters, downsampling and norms, and never attention or MLP. As E(z) = z at the start,
the features start as the backbone's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from e3va_cli.adapters.dual_low_rank import DualLowRankAdapter
from e3va_cli.adapters.method import FrozenBackbone, register
from e3va_cli.backbones.residual import ResidualBackbone


@register("e3va")
class E3VA(FrozenBackbone):
    """The highway: one adapter per residual branch of the frozen backbone.

    Args:
        backbone: any residual backbone; it is frozen and put into eval mode.
        rank: rank of each adapter's two projections (paper: 16).
        hidden_ratio: width of an adapter's bottleneck as a part of the stage's width (paper: 1/2).
    """

    adapters: Any  # [stage][branch], the order of the backbone's stages and their branches

    def __init__(self, backbone: ResidualBackbone, *, rank: int, hidden_ratio: float) -> None:
        super().__init__(backbone)
        self.adapters = nn.ModuleList(
            nn.ModuleList(
                DualLowRankAdapter(stage.width, hidden=max(1, round(stage.width * hidden_ratio)), rank=rank)
                for _ in stage.branches
            )
            for stage in backbone.stages
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """One feature map per stage, (B, C_s, H_s, W_s)."""
        return run_together([self], images)[0]


def run_together(extractors: Sequence[E3VA], images: Tensor) -> list[list[Tensor]]:
    """The feature maps of several extractors on one and the same backbone, which runs once: it never sees adapters."""
    backbone = extractors[0].backbone
    with torch.no_grad():
        x = backbone.stem(images)
    # The first highway takes over the storage of x, which moves on to others.
    highways = [x, *(x.clone() for _ in extractors[1:])]
    outputs: list[list[Tensor]] = [[] for _ in extractors]
    for index, stage in enumerate(backbone.stages):
        with torch.no_grad():
            x = stage.downsample(x)
        highways = [stage.downsample(highway) for highway in highways]
        for position, branch in enumerate(stage.branches):
            with torch.no_grad():
                z = branch(x)
                x = x + z
            adapters = [extractor.adapters[index][position] for extractor in extractors]
            highways = [adapter(highway, z) for adapter, highway in zip(adapters, highways, strict=True)]
        for extractor, highway, found in zip(extractors, highways, outputs, strict=True):
            if index in extractor.stages:
                found.append(extractor.output(index, highway))
    return outputs
