"""Mona: an adapter with multi-scale depthwise convolutions after each residual addition."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from e3va_cli.models.adapters.base import METHODS
from e3va_cli.models.adapters.bottleneck import BottleneckOptions, init_linears
from e3va_cli.models.adapters.insertion import InsertedAdapters, after_addition
from e3va_cli.models.backbones.base import ResidualBackbone

KERNELS = (3, 5, 7)
NORM_SCALE_INIT = 1e-6  # as in the authors' code


class MultiCognitiveAdapter(nn.Module):
    """`M(x) = x + Up(Dropout(GELU(Mix(Filters(Down(s1 * LayerNorm(x) + s2 * x))))))`, the module of Mona.

    Filters(y) = y + mean of depthwise 3x3, 5x5, 7x7 convolutions of y; Mix(y) = y + 1x1 convolution of y;
    Down: width -> hidden, Up: hidden -> width; s1 and s2: one number per channel.
    """

    def __init__(self, width: int, *, hidden: int, dropout: float, init_std: float | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm_scale = nn.Parameter(torch.full((width,), NORM_SCALE_INIT))
        self.input_scale = nn.Parameter(torch.ones(width))
        self.down = nn.Linear(width, hidden)
        self.filters = nn.ModuleList(nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in KERNELS)
        self.mix = nn.Conv2d(hidden, hidden, 1)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(hidden, width)
        if init_std is not None:
            init_linears((self.down, self.up), init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (B, H, W, C) to a stream of the same shape."""
        y = self.down(self.norm(x) * self.norm_scale + x * self.input_scale)
        y = y.permute(0, 3, 1, 2)  # B, hidden, H, W
        y = y + sum(convolve(y) for convolve in self.filters) / len(KERNELS)
        y = y + self.mix(y)
        y = y.permute(0, 2, 3, 1)  # B, H, W, hidden
        return x + self.up(self.dropout(self.activation(y)))


@METHODS.register("mona", BottleneckOptions)
class Mona(InsertedAdapters):
    """Mona: multi-cognitive visual adapters in series with the stream, after each residual addition.

    Paper: D. Yin et al., "5%>100%: Breaking Performance Shackles of Full Fine-Tuning on Visual Recognition Tasks",
    arXiv 2408.08345 (CVPR 2025).

        x = M(x + drop_path(branch(x)))     M: see `MultiCognitiveAdapter`

    The authors initialize Up as Swin's linear layers, so training does not start at the pre-trained features.

    Args:
        backbone: any residual backbone; it is frozen, and the backward pass runs through it.
        options: see `BottleneckOptions`; with `init_std` null, Down and Up are initialized as PyTorch's linear layers.
    """

    def __init__(self, backbone: ResidualBackbone, options: BottleneckOptions) -> None:
        build = partial(
            MultiCognitiveAdapter, hidden=options.hidden, dropout=options.dropout, init_std=options.init_std
        )
        super().__init__(backbone, build, partial(after_addition, patches=backbone.patches))
