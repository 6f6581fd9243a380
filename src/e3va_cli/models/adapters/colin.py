"""CoLin: an adapter after each residual addition whose low-rank weights are kept close to orthogonal by a loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from e3va_cli.components.options import option
from e3va_cli.models.adapters.base import METHODS, AdapterOptions
from e3va_cli.models.adapters.insertion import InsertedAdapters, after_addition
from e3va_cli.models.backbones.base import ResidualBackbone
from e3va_cli.utils.amp import without_autocast

KERNEL = 3


class SharedFactorLinear(nn.Module):
    """`y = x W + b` with `W = A (sum_i diag(k_i)) B`: branches i share A (in x rank) and B (rank x out).

    The diagonals k (branches x rank) are an argument, as two layers share them.
    """

    def __init__(self, in_features: int, out_features: int, *, rank: int) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(in_features, rank))
        self.B = nn.Parameter(torch.empty(rank, out_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def init_svd(self, branches: int) -> Tensor:
        """Set A and B to the means of the singular vectors of one random matrix per branch.

        Returns:
            The singular values, (branches, rank). The matrices are initialized as nn.Linear.
        """
        in_features, rank = self.A.shape
        bound = 1 / math.sqrt(in_features)
        weights = torch.empty(branches, in_features, self.B.shape[1]).uniform_(-bound, bound)
        left, values, right = torch.linalg.svd(weights, full_matrices=False)
        self.A.copy_(left[:, :, :rank].mean(0))
        self.B.copy_(right[:, :rank].mean(0))
        return values[:, :rank]

    def forward(self, x: Tensor, diagonals: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return x @ (self.A * diagonals.sum(0)) @ self.B + self.bias

    def orthogonality_loss(self) -> Tensor:
        """Return `|A^T A - I|^2 + |B B^T - I|^2` (Frobenius norm), a scalar."""
        with without_autocast(self.A):
            return _distance_from_identity(self.A.T @ self.A) + _distance_from_identity(self.B @ self.B.T)


def _distance_from_identity(matrix: Tensor) -> Tensor:
    return (matrix - torch.eye(len(matrix), device=matrix.device)).square().sum()


class ComplexLinearAdapter(nn.Module):
    """`M(x) = x + Up(GELU(s * Filter(y) + (1 - s) * y))` with `y = Down(x)`, the module of CoLin.

    Down: width -> hidden, Up: hidden -> width, see `SharedFactorLinear`; Filter: a depthwise 3x3 convolution; s: the
    sigmoid of one parameter per channel, which starts as 1/2.
    """

    def __init__(self, width: int, *, hidden: int, branches: int, rank: int) -> None:
        super().__init__()
        rank = min(rank, width, hidden)
        self.down = SharedFactorLinear(width, hidden, rank=rank)
        self.up = SharedFactorLinear(hidden, width, rank=rank)
        self.down.init_svd(branches)
        self.diagonals = nn.Parameter(self.up.init_svd(branches))  # as in the authors' code, those of Up
        self.filter = nn.Conv2d(hidden, hidden, KERNEL, padding=KERNEL // 2, groups=hidden)
        self.gate = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream (B, H, W, C) to a stream of the same shape."""
        y = self.down(x, self.diagonals)
        filtered = self.filter(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        gate = self.gate.sigmoid()
        y = gate * filtered + (1 - gate) * y
        return x + self.up(gelu(y), self.diagonals)

    def orthogonality_loss(self) -> Tensor:
        """Return the sum over branches and both layers, a scalar."""
        return len(self.diagonals) * (self.down.orthogonality_loss() + self.up.orthogonality_loss())


@dataclass
class CoLinOptions(AdapterOptions):
    """Options of CoLin."""

    hidden: int = option(help="bottleneck width; more uses more memory", gt=0)
    branches: int = option(help="diagonals summed per weight", gt=0)
    rank: int = option(help="of the factors; more adds parameters, not memory", gt=0)
    orthogonality: float = option(help="weight of the loss for orthogonal factors", ge=0, free=True)


@METHODS.register("colin", CoLinOptions)
class CoLin(InsertedAdapters):
    """CoLin: complex linear projection adapters in series with the stream, after each residual addition.

    Paper: D. Yin et al., arXiv 2602.10513, and the authors' code (https://github.com/DongshuoYin/CoLin).

        x = M(x + drop_path(branch(x)))     M: see `ComplexLinearAdapter`

    No factor is initialized to zero, so training does not start at the pre-trained features.

    Args:
        backbone: any residual backbone; it is frozen, and the backward pass runs through it.
        options: see `CoLinOptions`.
    """

    def __init__(self, backbone: ResidualBackbone, options: CoLinOptions) -> None:
        build = partial(ComplexLinearAdapter, hidden=options.hidden, branches=options.branches, rank=options.rank)
        super().__init__(backbone, build, partial(after_addition, patches=backbone.patches))
        self.orthogonality = options.orthogonality

    def regularization(self) -> dict[str, Tensor]:
        """Return the orthogonality loss of all adapters."""
        adapters = cast(Iterable[ComplexLinearAdapter], self.inserted)
        losses = torch.stack([adapter.orthogonality_loss() for adapter in adapters])
        return {"orthogonality": self.orthogonality * losses.sum()}
