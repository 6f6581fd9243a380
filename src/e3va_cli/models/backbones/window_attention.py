"""(Shifted-)window attention of Swin and Swin V2: in chunks without gradients, by timm's modules with them.

Windows are independent, so only one chunk's projections and scores are in memory at a time. On maps of whole windows
the results equal timm's up to rounding. Other maps are padded before windows are shifted, as in Swin's detection code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from e3va_cli.models.backbones import chunked
from e3va_cli.models.backbones.timm_private import shifted_window_attention
from e3va_cli.utils.amp import autocast_dtype

MASK_VALUE = -100.0  # added to the scores of tokens from different ends of a shifted map, as in timm
FUSED_DEVICES = ("cuda",)  # PyTorch's fused attention is slower for windows on a CPU


def pad_to_windows(x: Tensor, window_h: int, window_w: int) -> Tensor:
    """Pad a map (B, H, W, C) with zeros at the bottom and right to whole windows."""
    missing_h, missing_w = -x.shape[1] % window_h, -x.shape[2] % window_w
    return pad(x, (0, 0, 0, missing_w, 0, missing_h)) if missing_h or missing_w else x  # pad would copy


def timm_window_attention(
    block: SwinTransformerBlock | SwinTransformerV2Block, x: Tensor, *, pad_before_shift: bool
) -> Tensor:
    """Compute the (shifted-)window attention of `block` by timm's modules: (B, H, W, C) -> (B, H, W, C)."""
    if not pad_before_shift:
        return shifted_window_attention(block, x)
    height, width = x.shape[1:3]
    return shifted_window_attention(block, pad_to_windows(x, *block.window_size))[:, :height, :width]


def chunked_window_attention(
    block: SwinTransformerBlock | SwinTransformerV2Block,
    attention: Callable[..., Tensor],
    bias: Tensor,
    attn_mask: Tensor,
    x: Tensor,
    *,
    compiled: bool = False,
    pad_before_shift: bool = True,
) -> Tensor:
    """Compute the (shifted-)window attention of `block` in chunks: (B, H, W, C) -> (B, H, W, C).

    Args:
        attention: computes `attention(block, windows, bias)` of windows (N, tokens, C).
        bias: relative position bias added to the scores of every window, (1, heads, tokens, tokens).
        attn_mask: the `shift_attn_mask` of its windows.
        compiled: whether to use `torch.compile`.
        pad_before_shift: pad before shifting, as Swin's detection code; timm shifts first.
    """
    attend = chunked.as_compiled(attention) if compiled else attention
    height, width = x.shape[1:3]
    (window_h, window_w), (shift_h, shift_w) = block.window_size, block.shift_size
    windowed = pad_to_windows(x, window_h, window_w) if pad_before_shift else x
    result_dtype = autocast_dtype(x) or x.dtype
    del x
    if shift_h or shift_w:
        windowed = windowed.roll((-shift_h, -shift_w), (1, 2))
    windowed = pad_to_windows(windowed, window_h, window_w)
    result = torch.empty_like(windowed, dtype=result_dtype, memory_format=torch.contiguous_format)
    if shift_h or shift_w:
        indices = mask_indices(
            windowed.shape[1] // window_h, windowed.shape[2] // window_w, block.shift_size, bias.device
        )
        bias = bias + attn_mask.flatten(0, 1)[:, None]  # 4, heads, tokens, tokens
    for chunk in chunk_slices(windowed, block.window_size, block.attn.num_heads):
        windows = window_partition(windowed[chunk], window_h, window_w)
        scores_bias = bias
        if shift_h or shift_w:
            chunk_indices = indices[chunk[1].start // window_h : chunk[1].stop // window_h].flatten()
            scores_bias = bias[chunk_indices.repeat(len(windows) // len(chunk_indices))]
        windows = attend(block, windows, scores_bias)
        result[chunk].copy_(window_reverse(windows, result[chunk].shape, window_h, window_w))
    del windowed
    if not pad_before_shift:
        result = result[:, :height, :width]
    if shift_h or shift_w:
        result = result.roll((shift_h, shift_w), (1, 2))
    return result[:, :height, :width].contiguous()


def mask_indices(rows: int, columns: int, shift_size: tuple[int, int], device: torch.device) -> Tensor:
    """Return the index of each window's mask in the four of `shift_attn_mask`, (rows, columns), of a shifted map.

    Only the windows of the last row and column contain tokens from both ends of the map.
    """
    indices = torch.zeros(rows, columns, dtype=torch.long, device=device)
    if shift_size[0]:
        indices[-1] += 2
    if shift_size[1]:
        indices[:, -1] += 1
    return indices


def shift_attn_mask(window_h: int, window_w: int) -> Tensor:
    """Return the mask added to the scores in shifted windows, (2, 2, tokens, tokens): 0 or `MASK_VALUE`.

    The first index is 1 for windows of the last row, the second for those of the last column. Windows are shifted by
    half their size.
    """
    last = torch.tensor([False, True])[:, None]
    lower = last & (torch.arange(window_h) >= window_h - window_h // 2)
    right = last & (torch.arange(window_w) >= window_w - window_w // 2)
    end = (2 * lower.int()[:, None, :, None] + right.int()[None, :, None, :]).flatten(2)
    return MASK_VALUE * (end[..., None] != end[..., None, :]).float()


def chunk_slices(windowed: Tensor, window_size: tuple[int, int], num_heads: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices of images and rows of a padded map (B, H, W, C), each of one row of windows or more.

    The scores of a chunk have at most four times `CHUNK_ELEMENTS`, as the hidden layer of a chunk of an MLP.
    """
    images, height, width, channels = windowed.shape
    window = window_size[0]
    scores = num_heads * window_size[0] * window_size[1]  # of a token
    elements = window * width * max(channels, scores // 4)  # of a row of windows
    chunk_rows = window * max(1, chunked.CHUNK_ELEMENTS // elements)
    chunk_images = max(1, chunked.CHUNK_ELEMENTS // (elements * (height // window)))
    for image in range(0, images, chunk_images):
        for row in range(0, height, chunk_rows):
            yield slice(image, min(image + chunk_images, images)), slice(row, min(row + chunk_rows, height))


def window_partition(x: Tensor, window_h: int, window_w: int) -> Tensor:
    """Split a map into windows: (B, H, W, C) -> (windows, tokens, C)."""
    images, height, width, channels = x.shape
    x = x.reshape(images, height // window_h, window_h, width // window_w, window_w, channels)
    return x.transpose(2, 3).reshape(-1, window_h * window_w, channels)


def window_reverse(windows: Tensor, shape: tuple[int, ...], window_h: int, window_w: int) -> Tensor:
    """Merge windows into a map: (windows, tokens, C) -> (B, H, W, C)."""
    images, height, width, channels = shape
    x = windows.view(images, height // window_h, width // window_w, window_h, window_w, channels)
    return x.transpose(2, 3).reshape(shape)


def split_heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into query, key and value: (N, tokens, 3 C) -> (N, heads, tokens, C / heads) each."""
    query, key, value = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


def biased_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Compute multi-head attention with `bias` added to scores: (N, heads, tokens, C / heads) -> (N, tokens, C)."""
    if value.device.type in FUSED_DEVICES:
        mixed = scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype), scale=scale)
    else:
        scores = (query * scale) @ key.mT + bias
        mixed = scores.softmax(-1) @ value
    return mixed.transpose(1, 2).flatten(2)
