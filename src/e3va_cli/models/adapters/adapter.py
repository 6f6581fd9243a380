"""Adapter: a bottleneck with a skip after each residual branch."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from e3va_cli.models.adapters.base import METHODS
from e3va_cli.models.adapters.bottleneck import Bottleneck, BottleneckOptions, init_linears
from e3va_cli.models.adapters.insertion import InsertedAdapters, after_branch
from e3va_cli.models.backbones.base import ResidualBackbone

INIT_STD = 0.01  # as in the paper


class ResidualBottleneck(Bottleneck):
    """`M(z) = z + B(z)` with a bottleneck B initialized near zero, so that M starts near the identity."""

    def __init__(self, width: int, *, hidden: int, dropout: float, init_std: float | None = None) -> None:
        super().__init__(width, hidden=hidden, dropout=dropout)
        if init_std is not None:
            init_linears((self.down, self.up), init_std)
            return
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=INIT_STD, a=-2 * INIT_STD, b=2 * INIT_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Map a branch's output (..., width) to (..., width)."""
        return z + super().forward(z)


@METHODS.register("adapter", BottleneckOptions)
class Adapter(InsertedAdapters):
    """Adapters after attention and after the MLP, before each residual addition.

    Paper: N. Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751 (ICML 2019).

        x = x + drop_path(z + Up(Dropout(GELU(Down(z)))))     z = branch(x), Down: C -> hidden, Up: hidden -> C

    The weights start near zero, so the features start near the pre-trained ones.

    Args:
        backbone: any residual backbone; it is frozen, and the backward pass runs through it.
        options: see `BottleneckOptions`; with `init_std` null, the paper's std of 0.01, truncated at 0.02.
    """

    def __init__(self, backbone: ResidualBackbone, options: BottleneckOptions) -> None:
        build = partial(ResidualBottleneck, hidden=options.hidden, dropout=options.dropout, init_std=options.init_std)
        super().__init__(backbone, build, after_branch)
