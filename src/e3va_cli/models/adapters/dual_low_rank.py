"""E3VA's adapter: a bottleneck with two low-rank projections (arXiv 2306.09729, section 3).

    E(z) = z + Up(GELU(Dn(z)))      Dn(z) = z A B + b      Up(y) = y P Q + c

With z: tokens x width, A: width x r, B: r x hidden, P: hidden x r, Q: r x width. z needs no gradient, so the backward
pass needs z and two low-rank tensors (N, r); the hidden layer is recomputed from one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

from e3va_cli.models.adapters.activation_storage import ActivationStorage, CastStorage
from e3va_cli.utils.amp import autocast_dtype

gelu_backward = torch.ops.aten.gelu_backward.default


class LowRankLinear(nn.Module):
    """`y = x A B + b` with A: in x rank, B: rank x out.

    Args:
        zero: initialize B and b to zero; otherwise both factors keep the variance of their input (normal with
            standard deviation fan_in ** -0.5).
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
        """Initialize factors and bias as LoRand's authors do (`kaiming_uniform_(a=sqrt(5))`)."""
        for factor in (self.A, self.B):
            nn.init.kaiming_uniform_(factor, a=5**0.5)
        bound = len(self.A) ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)


class DualLowRankAdapter(nn.Module):
    """`E(z) = z + Up(GELU(Dn(z)))`, both projections of rank `rank`; Up is zero-initialized, so E(z) = z.

    Args:
        storage: saves z for the backward pass.
    """

    def __init__(self, width: int, *, hidden: int, rank: int, storage: ActivationStorage | None = None) -> None:
        super().__init__()
        self.down = LowRankLinear(width, hidden, rank=rank)
        self.up = LowRankLinear(hidden, width, rank=rank, zero=True)
        self.storage = storage or CastStorage()

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters A, B, b, P, Q, c."""
        return self.down.A, self.down.B, self.down.bias, self.up.A, self.up.B, self.up.bias

    def init_kaiming_uniform(self) -> None:
        """Initialize both projections by `LowRankLinear.init_kaiming_uniform`; E(z) = z does not hold then."""
        self.down.init_kaiming_uniform()
        self.up.init_kaiming_uniform()

    def forward(self, highway: Tensor, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Add E(z) to the highway in place; all (B, H, W, C). z gets no gradient, the stream x is not read."""
        if not torch.is_grad_enabled():
            add_adapter_output_(highway, cast_tokens(z, self.weights), self.weights)
            return highway
        return _AddAdapterOutput.apply(highway, z, self.storage, *self.weights)

    def weight_gradients(self, grad: Tensor, z: Tensor, x: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the gradients of all parameters from that of the highway; all (B, H, W, C)."""
        tokens = cast_tokens(z, self.weights)
        rows = grad.reshape(tokens.shape).to(tokens.dtype)
        gradients, grad_low_rank_in = weight_gradients(rows, low_rank_tensors(tokens, self.weights), self.weights)
        return (tokens.T @ grad_low_rank_in).to(self.down.A.dtype), *gradients


class _AddAdapterOutput(torch.autograd.Function):
    """`highway + E(z)` in place; saves z and two low-rank tensors (N, r)."""

    @staticmethod
    def forward(ctx: Any, highway: Tensor, z: Tensor, storage: ActivationStorage, *weights: Tensor) -> Tensor:
        """Highway and z: (B, H, W, C); weights: A, B, b, P, Q, c."""
        tokens = cast_tokens(z, weights)
        low_rank = add_adapter_output_(highway, tokens, weights)
        if z.element_size() < tokens.element_size():  # a backbone in 16 bits: save those
            tokens = z.flatten(0, -2)
        ctx.mark_dirty(highway)
        ctx.storage = storage
        ctx.save_for_backward(*low_rank, *weights, *storage.pack(tokens))
        return highway

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the weights' gradients; the highway's passes through unchanged, z gets none."""
        saved = ctx.saved_tensors
        low_rank, weights, packed = saved[:2], saved[2:8], saved[8:]
        rows = grad.reshape(-1, grad.shape[-1]).to(low_rank[0].dtype)
        gradients, grad_low_rank_in = weight_gradients(rows, low_rank, weights)
        grad_a = ctx.storage.weight_grad(packed, grad_low_rank_in)
        return grad, None, None, grad_a.to(weights[0].dtype), *gradients


def cast_tokens(z: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Flatten z to tokens (N, C) in the dtype of the matrix products."""
    return z.flatten(0, -2).to(autocast_dtype(z) or weights[0].dtype)


def add_adapter_output_(highway: Tensor, tokens: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Add E(z) to the highway's storage.

    Args:
        highway: (B, H, W, C).
        tokens: z as (N, C), in the dtype of the matrix products.
        weights: A, B, b, P, Q, c.

    Returns:
        `z A` and `GELU(Dn(z)) P`, each (N, r).
    """
    low_rank = low_rank_tensors(tokens, weights)
    *_, q, last_bias = (w.to(tokens.dtype) for w in weights)
    rows = highway.view(tokens.shape)
    if rows.dtype == tokens.dtype:
        torch.addmm(rows, low_rank[1], q, out=rows)  # not addmm_, which flop counters do not know
        rows += last_bias
    else:  # under autocast
        rows += torch.addmm(last_bias, low_rank[1], q)
    rows += tokens
    return low_rank


def low_rank_tensors(tokens: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return `z A` and `GELU(Dn(z)) P`, each (N, r), of tokens z (N, C); weights: A, B, b, P, Q, c."""
    a, b, bias, p, *_ = (w.to(tokens.dtype) for w in weights)
    low_rank_in = tokens @ a
    return low_rank_in, gelu(torch.addmm(bias, low_rank_in, b)) @ p


def weight_gradients(
    rows: Tensor, low_rank: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the gradients of B, b, P, Q, c in the weights' dtypes, and the gradient g of `z A`; A's is `z^T g`.

    Args:
        rows: gradient of the highway, (N, C).
        low_rank: the result of `add_adapter_output_`.
        weights: A, B, b, P, Q, c.
    """
    _, b, bias, p, q, _ = (w.to(rows.dtype) for w in weights)
    low_rank_in, low_rank_out = low_rank
    grad_low_rank_out = rows @ q.T  # N, r
    hidden = torch.addmm(bias, low_rank_in, b)  # N, hidden
    grad_p = gelu(hidden).T @ grad_low_rank_out
    grad_hidden = gelu_backward(grad_low_rank_out @ p.T, hidden)
    grad_low_rank_in = grad_hidden @ b.T  # N, r
    grad_q = (rows.T @ low_rank_out).T  # faster on a CPU than low_rank_out.T @ rows
    gradients = (low_rank_in.T @ grad_hidden, grad_hidden.sum(0), grad_p, grad_q, rows.sum(0))
    return tuple(g.to(w.dtype) for g, w in zip(gradients, weights[1:], strict=True)), grad_low_rank_in
