"""A linear map whose weight is a product of two low-rank factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LowRankLinear(nn.Module):
    """`y = x A B + b` with A: in x rank, B: rank x out.

    Args:
        zero: start with B = 0 and b = 0, so that the map starts as zero; otherwise both factors keep the variance
            of their input (normal with standard deviation fan_in ** -0.5).
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int, zero: bool = False) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_features, rank))
        self.B = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        nn.init.normal_(self.A, std=in_features**-0.5)
        if zero:
            nn.init.zeros_(self.B)
        else:
            nn.init.normal_(self.B, std=rank**-0.5)

    def init_kaiming_uniform(self) -> None:
        """Start no factor at zero, but factors and bias as LoRand's authors do (`kaiming_uniform_(a=sqrt(5))`)."""
        for factor in (self.A, self.B):
            nn.init.kaiming_uniform_(factor, a=5**0.5)
        bound = len(self.A) ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return x @ self.A @ self.B + self.bias
