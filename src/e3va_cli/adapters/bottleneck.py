"""The bottleneck that Adapter and AdaptFormer insert, each in its place and with its own start."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


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


def draw_linears(linears: Iterable[nn.Linear], std: float) -> None:
    """Start linear layers as Swin's: normal weights, zero biases. So do the baselines of the paper's group."""
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
