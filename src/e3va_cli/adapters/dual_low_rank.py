"""E3VA's adapter: a bottleneck whose two projections are low-rank products themselves (arXiv 2306.09729, section 3).

    E(z) = z + Up(GELU(Dn(z)))      Dn(z) = z A B + b      Up(y) = y P Q + c

With z: tokens x width, A: width x r, B: r x hidden, P: hidden x r, Q: r x width. The gradient of z is never asked for,
so the backward pass needs z and two tensors of r numbers a token; the hidden layer is computed again from one of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import gelu

from e3va_cli.adapters.low_rank import LowRankLinear

gelu_backward = torch.ops.aten.gelu_backward.default


class DualLowRankAdapter(nn.Module):
    """`E(z) = z + Up(GELU(Dn(z)))`, each projection of rank `rank` with a bias; Up starts as zero, so E(z) = z."""

    def __init__(self, width: int, *, hidden: int, rank: int) -> None:
        super().__init__()
        self.down = LowRankLinear(width, hidden, rank=rank)
        self.up = LowRankLinear(hidden, width, rank=rank, zero=True)

    def forward(self, highway: Tensor, z: Tensor) -> Tensor:
        """Add E(z) to the highway, in place; both (B, H, W, C), and z, which nothing else may need a gradient of."""
        down, up = self.down, self.up
        return AddAdapted.apply(highway, z, down.A, down.B, down.bias, up.A, up.B, up.bias)


class AddAdapted(torch.autograd.Function):
    """`highway + E(z)` in the highway's own storage, keeping z and 2 r numbers a token for the backward pass.

    Under autocast the products are computed in its dtype, as a linear layer's are.
    """

    @staticmethod
    def forward(ctx: Any, highway: Tensor, z: Tensor, *weights: Tensor) -> Tensor:
        """Highway and z: (B, H, W, C); weights: A, B, b, P, Q, c."""
        dtype = _compute_dtype(z)
        z = z.to(dtype)
        a, b, bias, p, q, last_bias = (w.to(dtype) for w in weights)
        tokens = z.flatten(0, -2)  # N, C
        thin_in = tokens @ a  # N, r
        thin_out = gelu(torch.addmm(bias, thin_in, b)) @ p  # N, r
        rows = highway.view(tokens.shape)
        rows += torch.addmm(last_bias, thin_out, q)
        rows += tokens
        ctx.mark_dirty(highway)
        ctx.save_for_backward(z, thin_in, thin_out, *weights)
        return highway

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The highway's gradient is the result's own; z gets none."""
        z, thin_in, thin_out, *weights = ctx.saved_tensors  # type: ignore[attr-defined]
        _, b, bias, p, q, _ = (w.to(z.dtype) for w in weights)
        tokens = z.flatten(0, -2)
        rows = grad.reshape(tokens.shape).to(z.dtype)
        of_thin_out = rows @ q.T  # N, r
        hidden = torch.addmm(bias, thin_in, b)  # N, hidden
        of_p = gelu(hidden).T @ of_thin_out
        of_hidden = gelu_backward(of_thin_out @ p.T, hidden)
        del hidden
        of_thin_in = of_hidden @ b.T
        gradients = (
            tokens.T @ of_thin_in,
            thin_in.T @ of_hidden,
            of_hidden.sum(0),
            of_p,
            thin_out.T @ rows,
            rows.sum(0),
        )
        return grad, None, *(g.to(w.dtype) for g, w in zip(gradients, weights, strict=True))


def _compute_dtype(z: Tensor) -> torch.dtype:
    """Of matrix products with `z` at this place of the program."""
    kind = z.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return z.dtype
