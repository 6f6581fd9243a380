"""E3VA+: adapters on E3VA's highway that read the normalized residual stream and its neighborhood.

Not published elsewhere. The adapter of the paper sees one position of one branch's output through four low-rank
factors. Here it is

    E(z, x) = z + GELU(Filter(LN(x) A)) Q

with x: the frozen residual stream after the branch, LN: without parameters, A: width x r, Q: r x width, and Filter: y
plus the mean of depthwise 3x3, 5x5 and 7x7 convolutions of y, as in Mona (arXiv 2408.08345). One pair of factors in
place of two nested ones follows CoLin (arXiv 2602.10513), which finds that nested ones converge slowly. Reading x as a
side network does follows LST (arXiv 2206.06522).

x needs no gradient, so the backward pass needs LN(x), in the storage that E3VA has for z, and tensors of r channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, gelu, layer_norm, pad

from e3va_cli.components.options import option
from e3va_cli.models.adapters.activation_storage import ActivationStorage
from e3va_cli.models.adapters.base import METHODS
from e3va_cli.models.adapters.dual_low_rank import cast_tokens
from e3va_cli.models.adapters.highway import HighwayExtractor, HighwayOptions
from e3va_cli.utils.amp import without_autocast

KERNELS = (3, 5, 7)
HALF = (torch.bfloat16, torch.float16)


@dataclass
class E3VAPlusOptions(HighwayOptions):
    """Options of E3VA+."""

    rank: int = option(help="width of the adapters; parameters grow with it, memory hardly does", gt=0)


class MultiScaleFilter(nn.Module):
    """`y + mean of depthwise 3x3, 5x5 and 7x7 convolutions of y`, computed as one 7x7 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(torch.empty(channels, 1, size, size) for size in KERNELS)
        self.bias = nn.Parameter(torch.zeros(channels))
        for kernel in self.kernels:
            nn.init.kaiming_uniform_(kernel, a=5**0.5)  # as nn.Conv2d

    @property
    def kernel(self) -> Tensor:
        """The kernel of the whole filter, (channels, 1, 7, 7)."""
        largest = max(KERNELS)
        kernels = [pad(kernel, [(largest - kernel.shape[-1]) // 2] * 4) for kernel in self.kernels]
        identity = pad(torch.ones_like(self.kernels[0][..., :1, :1]), [largest // 2] * 4)
        return torch.stack(kernels).mean(0) + identity

    def forward(self, y: Tensor) -> Tensor:
        """Map (B, H, W, channels) to the same shape, in the dtype of y."""
        # On CPUs in float32: gradients of 16-bit convolutions may be wrong on tiny maps, see `utils.amp`.
        dtype = torch.float32 if y.is_cpu and y.dtype in HALF else y.dtype
        kernel, bias = self.kernel.to(dtype), self.bias.to(dtype)
        with without_autocast(y):
            filtered = conv2d(
                y.to(dtype).permute(0, 3, 1, 2), kernel, bias, padding=max(KERNELS) // 2, groups=len(bias)
            )
        return filtered.permute(0, 2, 3, 1).to(y.dtype)


class NeighborhoodAdapter(nn.Module):
    """`E(z, x) = z + GELU(Filter(LN(x) A)) Q`; Q is zero-initialized, so E(z, x) = z.

    Args:
        storage: saves LN(x) for the backward pass.
    """

    def __init__(self, width: int, *, rank: int, storage: ActivationStorage) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(width, rank))
        self.Q = nn.Parameter(torch.zeros(rank, width))
        self.filter = MultiScaleFilter(rank)
        self.storage = storage
        nn.init.normal_(self.A, std=width**-0.5)

    def forward(self, highway: Tensor, z: Tensor, x: Tensor) -> Tensor:
        """Add E(z, x) to the highway in place; all (B, H, W, C). z and x get no gradients."""
        if torch.is_grad_enabled():
            return _AddAdapterOutput.apply(highway, z, x, self, *self.parameters())
        return highway.add_(z).add_(self.update(self.low_rank(self.tokens(x), x.shape)))

    def weight_gradients(self, grad: Tensor, z: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of all parameters from that of the highway; all (B, H, W, C)."""
        tokens = self.tokens(x)
        grad_low_rank, *gradients = self.update_gradients(grad, self.low_rank(tokens, x.shape))
        return (tokens.T @ grad_low_rank).to(self.A.dtype), *gradients

    def tokens(self, x: Tensor) -> Tensor:
        """Return LN(x) (N, C), in the dtype of the matrix products."""
        return cast_tokens(layer_norm(x, x.shape[-1:]), (self.A,))

    def low_rank(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """Return `LN(x) A` (B, H, W, r) from LN(x) (N, C) of an x of the given shape."""
        return (tokens @ self.A.to(tokens.dtype)).view(*shape[:-1], -1)

    def update(self, low_rank: Tensor) -> Tensor:
        """Map `LN(x) A` (B, H, W, r) to E(z, x) - z (B, H, W, C)."""
        return gelu(self.filter(low_rank)) @ self.Q.to(low_rank.dtype)

    def update_gradients(self, grad: Tensor, low_rank: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of `LN(x) A` (N, r) and of all parameters but A, from that of the highway."""
        with torch.enable_grad():
            low_rank = low_rank.detach().requires_grad_()
            update = self.update(low_rank)
            inputs = (low_rank, *(p for p in self.parameters() if p is not self.A))
            grad_low_rank, *gradients = torch.autograd.grad(update, inputs, grad.to(update.dtype))
        return grad_low_rank.flatten(0, -2), *gradients


class _AddAdapterOutput(torch.autograd.Function):
    """`highway + E(z, x)` in place; saves LN(x) and `LN(x) A` (B, H, W, r)."""

    @staticmethod
    def forward(
        ctx: Any, highway: Tensor, z: Tensor, x: Tensor, adapter: NeighborhoodAdapter, *weights: Tensor
    ) -> Tensor:
        """Highway, z and x: (B, H, W, C); weights: the parameters, whose gradients autograd expects."""
        tokens = adapter.tokens(x)
        low_rank = adapter.low_rank(tokens, x.shape)
        highway.add_(z).add_(adapter.update(low_rank))
        ctx.mark_dirty(highway)
        ctx.adapter = adapter
        ctx.save_for_backward(low_rank, *weights, *adapter.storage.pack(tokens))
        return highway

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the weights' gradients; the highway's passes through unchanged, z and x get none."""
        adapter, low_rank = ctx.adapter, ctx.saved_tensors[0]
        packed = ctx.saved_tensors[1 + len(list(adapter.parameters())) :]
        grad_low_rank, *gradients = adapter.update_gradients(grad, low_rank)
        grad_a = adapter.storage.weight_grad(packed, grad_low_rank).to(adapter.A.dtype)
        return grad, None, None, None, grad_a, *gradients


@METHODS.register("e3va_plus", E3VAPlusOptions)
class E3VAPlus(HighwayExtractor):
    """The highway with adapters that read the residual stream, `NeighborhoodAdapter`.

    Args:
        backbone: any residual backbone; it is frozen and put into eval mode.
        options: see `E3VAPlusOptions`.
    """

    def build_adapter(self, width: int, options: E3VAPlusOptions, storage: ActivationStorage) -> nn.Module:
        """Return an adapter for a stream of `width` channels."""
        return NeighborhoodAdapter(width, rank=options.rank, storage=storage)
