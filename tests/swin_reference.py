"""A plain implementation of the Swin authors' detection backbone (arXiv 2103.14030), on a timm model's weights.

There, a map that is no multiple of the window is padded, then shifted; attention between
tokens from opposite ends of the map is masked.
"""

import torch
from torch.nn.functional import layer_norm, linear, pad

WINDOW = 7


def bias_of(attn):
    """The relative position bias (heads, tokens, tokens), looked up offset by offset."""
    table, tokens = attn.relative_position_bias_table, [(y, x) for y in range(WINDOW) for x in range(WINDOW)]
    index = [
        [(y1 - y2 + WINDOW - 1) * (2 * WINDOW - 1) + x1 - x2 + WINDOW - 1 for y2, x2 in tokens] for y1, x1 in tokens
    ]
    return table[torch.tensor(index)].permute(2, 0, 1)


def attention(block, x, shifted):
    """The branch of (shifted-)window attention, window by window: norm, pad, shift, attend, shift back, crop."""
    _, height, width, channels = x.shape
    x = layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias)
    attn, shift = block.attn, WINDOW // 2 if shifted else 0
    x = pad(x, (0, 0, 0, -width % WINDOW, 0, -height % WINDOW))
    padded_h, padded_w = x.shape[1:3]
    rows = (torch.arange(padded_h) + shift) % padded_h  # source row of each position
    columns = (torch.arange(padded_w) + shift) % padded_w
    x = x[:, rows][:, :, columns]
    out = torch.empty_like(x)
    bias = bias_of(attn)
    for top in range(0, padded_h, WINDOW):
        for left in range(0, padded_w, WINDOW):
            window = x[:, top : top + WINDOW, left : left + WINDOW].reshape(len(x), WINDOW**2, channels)
            wrapped_y = rows[top : top + WINDOW] < rows[top]  # wrapped around the map
            wrapped_x = columns[left : left + WINDOW] < columns[left]
            region = (2 * wrapped_y[:, None] + wrapped_x[None]).flatten()
            mask = -100.0 * (region[:, None] != region[None]).to(x.dtype)
            qkv = linear(window, attn.qkv.weight, attn.qkv.bias)
            query, key, value = qkv.reshape(len(x), WINDOW**2, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
            scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + bias + mask
            mixed = (scores.softmax(-1) @ value).transpose(1, 2).reshape(len(x), WINDOW, WINDOW, channels)
            out[:, top : top + WINDOW, left : left + WINDOW] = linear(mixed, attn.proj.weight, attn.proj.bias)
    back = torch.empty_like(out)
    back[:, rows[:, None], columns[None]] = out
    return back[:, :height, :width]


def stage_outputs(model, images):
    """The stream after each stage."""
    x = model.patch_embed(images)
    outputs = []
    for stage in model.layers:
        x = stage.downsample(x)
        for index, block in enumerate(stage.blocks):
            x = x + attention(block, x, shifted=index % 2 == 1)
            x = x + block.mlp(layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias))
        outputs.append(x)
    return outputs


def large_biases(model):
    """Draw position biases as large as trained ones, so that positions in windows matter."""
    for name, parameter in model.named_parameters():
        if "relative_position_bias_table" in name:
            torch.nn.init.normal_(parameter)
