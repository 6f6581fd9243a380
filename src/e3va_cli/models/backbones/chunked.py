"""Computing the branches of a frozen backbone in chunks, so that little is in memory at a time.

Tokens are independent in norms and MLPs, windows and images in attention. `torch.compile` applies to the function of
one chunk: one graph per width, not per block or image size.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from e3va_cli.utils.amp import autocast_dtype

CHUNK_ELEMENTS = 2**22  # of the stream; fewer take longer on a GPU, which waits for the launches, more take memory


def is_chunked(block: nn.Module) -> bool:
    """Return whether to compute in chunks: without gradients, unless traced for export, which gets timm's code."""
    return not (torch.is_grad_enabled() or block.training or torch.compiler.is_compiling())


def autocast_to_weights(linear: nn.Module, x: Tensor) -> AbstractContextManager[Any]:
    """Return an autocast context to the dtype of 16-bit weights; a null context for float32."""
    dtype = cast(Tensor, linear.weight).dtype
    if dtype not in (torch.bfloat16, torch.float16) or autocast_dtype(x) == dtype:
        return nullcontext()
    return torch.autocast(x.device.type, dtype=dtype)


def chunked_tokens(function: Callable[..., Tensor], block: nn.Module, x: Tensor, compiled: bool = False) -> Tensor:
    """Compute `function(block, tokens)` in chunks of tokens (N, C): (..., C) -> (..., C)."""
    return _chunked(function, block, x.flatten(0, -2), max(1, CHUNK_ELEMENTS // x.shape[-1]), compiled).view(x.shape)


def chunked_images(function: Callable[..., Tensor], block: nn.Module, x: Tensor, compiled: bool = False) -> Tensor:
    """Compute `function(block, image)` for one image (1, ..., C) at a time: (B, ..., C) -> (B, ..., C)."""
    return _chunked(function, block, x, 1, compiled)


def _chunked(function: Callable[..., Tensor], block: nn.Module, x: Tensor, size: int, compiled: bool) -> Tensor:
    compute = as_compiled(function) if compiled else function
    result = torch.empty_like(x, dtype=autocast_dtype(x) or x.dtype, memory_format=torch.contiguous_format)
    for chunk, result_chunk in zip(x.split(size), result.split(size), strict=True):
        result_chunk.copy_(compute(block, chunk))
    return result


@cache
def as_compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile `function` by `torch.compile` for any number of windows or tokens."""
    return torch.compile(function, dynamic=True)
