"""AdaptFormer: a scaled bottleneck beside each MLP."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from e3va_cli.components.options import option
from e3va_cli.models.adapters.base import METHODS
from e3va_cli.models.adapters.bottleneck import Bottleneck, BottleneckOptions, init_linears
from e3va_cli.models.adapters.insertion import InsertedAdapters, beside_branch
from e3va_cli.models.backbones.base import ResidualBackbone


class ScaledBottleneck(Bottleneck):
    """`M(x) = scale * B(x)` with a bottleneck B whose up projection is zero-initialized unless `init_std` is set."""

    def __init__(self, width: int, *, hidden: int, dropout: float, scale: float, init_std: float | None = None) -> None:
        super().__init__(width, hidden=hidden, dropout=dropout)
        self.scale = scale
        if init_std is not None:
            init_linears((self.down, self.up), init_std)
            return
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (..., width) to the tensor (..., width) to be added."""
        return self.scale * super().forward(x)


@dataclass
class AdaptFormerOptions(BottleneckOptions):
    """Options of AdaptFormer."""

    scale: float = option(help="scale of the bottleneck's output", gt=0)


@METHODS.register("adaptformer", AdaptFormerOptions)
class AdaptFormer(InsertedAdapters):
    """AdaptFormer: a bottleneck parallel to the MLP of each block.

    Paper: S. Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition",
    arXiv 2205.13535 (NeurIPS 2022).

        x = x + drop_path(mlp(x)) + scale * Up(Dropout(GELU(Down(x))))     Down: C -> hidden, Up: hidden -> C

    The paper initializes Up to zero, so that training starts at the pre-trained features. The activation is that of
    the published comparison on Swin; the paper uses ReLU.

    Args:
        backbone: any residual backbone; it is frozen, and the backward pass runs through it.
        options: see `AdaptFormerOptions`; with `init_std` null, Up is zero-initialized, as in the paper.
    """

    def __init__(self, backbone: ResidualBackbone, options: AdaptFormerOptions) -> None:
        build = partial(
            ScaledBottleneck,
            hidden=options.hidden,
            dropout=options.dropout,
            scale=options.scale,
            init_std=options.init_std,
        )
        super().__init__(backbone, build, beside_branch, branch_types=("mlp",))
