"""LoRand: an adapter after each residual branch whose weights are sums of low-rank products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from e3va_cli.components.options import option
from e3va_cli.models.adapters.base import METHODS, AdapterOptions
from e3va_cli.models.adapters.insertion import InsertedAdapters, after_branch
from e3va_cli.models.backbones.base import ResidualBackbone


class MultiBranchLinear(nn.Module):
    """`y = x W + b` with `W = sum_i A_i K_i B_i`; A_i: in x rank, K_i: rank x rank, B_i: rank x out.

    Initialization as in the authors' code: uniform within 1/sqrt(columns), and 1/sqrt(in) for the bias.
    """

    def __init__(self, in_features: int, out_features: int, *, branches: int, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(branches, in_features, rank))
        self.K = nn.Parameter(torch.empty(branches, rank, rank))
        self.B = nn.Parameter(torch.empty(branches, rank, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        for factor in (self.A, self.K, self.B):
            bound = 1 / math.sqrt(factor.shape[-1])
            nn.init.uniform_(factor, -bound, bound)
        nn.init.uniform_(self.bias, -1 / math.sqrt(in_features), 1 / math.sqrt(in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        weight = (self.A @ self.K @ self.B).sum(0)  # in, out
        return x @ weight + self.bias


class LowRankBottleneck(nn.Module):
    """`M(z) = z + Up(GELU(Down(z)))` with Down: width -> hidden and Up: hidden -> width, sums of low-rank products."""

    def __init__(self, width: int, *, hidden_ratio: float, branches: int, rank: int) -> None:
        super().__init__()
        hidden = max(1, round(width * hidden_ratio))
        self.down = MultiBranchLinear(width, hidden, branches=branches, rank=rank)
        self.activation = nn.GELU()
        self.up = MultiBranchLinear(hidden, width, branches=branches, rank=rank)

    def forward(self, z: Tensor) -> Tensor:
        """Map a branch's output (..., width) to (..., width)."""
        return z + self.up(self.activation(self.down(z)))


@dataclass
class LoRandOptions(AdapterOptions):
    """Options of LoRand."""

    hidden_ratio: float = option(help="bottleneck width over the stage's width; more uses more memory", gt=0)
    branches: int = option(help="products summed per weight; more adds parameters, not memory", gt=0)
    rank: int = option(help="of each product; more adds parameters, not memory", gt=0)


@METHODS.register("lorand", LoRandOptions)
class LoRand(InsertedAdapters):
    """LoRand adapters after attention and after the MLP, before each residual addition.

    Paper: D. Yin et al., "1% VS 100%: Parameter-Efficient Low Rank Adapter for Dense Predictions", CVPR 2023
    (https://openaccess.thecvf.com/CVPR2023).

        x = x + drop_path(z + Up(GELU(Down(z))))     z = branch(x), Down: C -> hidden, Up: hidden -> C
        the weight of Down and of Up = sum_i A_i K_i B_i

    The authors initialize no factor to zero, so training does not start at the pre-trained features.

    Args:
        backbone: any residual backbone; it is frozen, and the backward pass runs through it.
        options: see `LoRandOptions`.
    """

    def __init__(self, backbone: ResidualBackbone, options: LoRandOptions) -> None:
        build = partial(
            LowRankBottleneck, hidden_ratio=options.hidden_ratio, branches=options.branches, rank=options.rank
        )
        super().__init__(backbone, build, after_branch)
