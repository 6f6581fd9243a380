"""The bottleneck that Adapter and AdaptFormer insert, each in its place and with its own start."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from e3va_cli.components.options import option
from e3va_cli.models.adapters.base import AdapterOptions


@dataclass
class BottleneckOptions(AdapterOptions):
    """Options of methods with a bottleneck."""

    hidden: int = option(help="width of the bottleneck; parameters grow with it, and memory a little", above=0)
    dropout: float = option(
        help="share of the bottleneck that is dropped; 0.0 saves a mask of its size", least=0, most=1
    )
    init_std: float | None = option(
        None,
        help="of the weights of both projections at the start; null: as the method's own paper has it",
        above=0,
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
    """Start linear layers as Swin's: normal weights, zero biases. So do the baselines of the paper's group."""
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
