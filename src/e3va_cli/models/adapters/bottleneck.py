"""The bottleneck of Adapter and AdaptFormer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from e3va_cli.components.options import option
from e3va_cli.models.adapters.base import AdapterOptions


@dataclass
class BottleneckOptions(AdapterOptions):
    """Options of methods with a bottleneck."""

    hidden: int = option(help="bottleneck width; more adds parameters, and a little memory", gt=0)
    dropout: float = option(help="dropout rate in the bottleneck; 0.0 saves the memory of a mask", ge=0, le=1)
    init_std: float | None = option(
        None,
        help="std of the initial weights of both projections; null: initialization of the method's paper",
        gt=0,
        free=True,
    )


class Bottleneck(nn.Module):
    """`B(x) = Up(Dropout(GELU(Down(x))))` with Down: width -> hidden and Up: hidden -> width, linear with biases."""

    def __init__(self, width: int, *, hidden: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.activation = nn.GELU()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., width) to (..., width)."""
        return self.up(self.dropout(self.activation(self.down(x))))


def init_linears(linears: Iterable[nn.Linear], std: float) -> None:
    """Initialize linear layers as Swin's and the published baselines': truncated normal weights, zero biases."""
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
