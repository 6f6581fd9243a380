"""Drawing of semantic segmentation on images, with a legend."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from e3va_cli.visualization.drawing import BACKGROUND, Color, class_color, scale_factor, upscale
from e3va_cli.visualization.fonts import fit_text, legible_names

ALPHA = 0.5  # of a class's color over the image
MAX_NAMES = 12
BASELINE = 0.78  # of a line's height, from its top
TEXT_COLOR: Color = (0, 0, 0)


def draw_segmentation(image: Tensor, labels: Tensor, classes: Sequence[str]) -> Tensor:
    """Draw the classes of pixels over an image, and below it a legend of the largest classes.

    Args:
        image: uint8 [3, H, W], RGB.
        labels: integers [H, W], 1..K; 0 is unlabeled and not drawn.
        classes: K names.

    Returns:
        uint8 [3, s H + h, s W]; the integer s is 1 except for small images, h is the height of the legend.
    """
    image, labels = image.as_subclass(Tensor).cpu(), labels.as_subclass(Tensor).cpu().long()
    palette = torch.tensor([TEXT_COLOR, *map(class_color, range(1, len(classes) + 1))])
    colors = palette[labels].permute(2, 0, 1)  # 3, H, W
    factor = scale_factor(image)
    image, labels, colors = (upscale(pixels, factor) for pixels in (image, labels, colors))
    strength = torch.where(_edges(labels), 1.0, ALPHA) * (labels > 0)
    picture = image.float().lerp(colors.float(), strength).round().to(torch.uint8)
    pixels = torch.bincount(labels.flatten(), minlength=len(palette))
    present = [label for label in pixels.argsort(descending=True, stable=True).tolist() if label and pixels[label]]
    shown = legible_names(classes)
    entries = [(shown[label - 1], class_color(label)) for label in present]
    return torch.cat([picture, _legend(entries, picture.shape[2], max(picture.shape[1:]))], 1)


def _edges(labels: Tensor) -> Tensor:
    """Return the pixels [H, W] with a 4-neighbor of another class."""
    edges = torch.zeros_like(labels, dtype=torch.bool)
    across, down = labels[:, :-1] != labels[:, 1:], labels[:-1] != labels[1:]
    edges[:, :-1] |= across
    edges[:, 1:] |= across
    edges[:-1] |= down
    edges[1:] |= down
    return edges


def _legend(entries: list[tuple[str, Color]], width: int, longer_side: int) -> Tensor:
    """Return color squares with names, in rows from left to right: uint8 [3, h, width]."""
    size = min(max(11, longer_side // 48), 28)
    line, gap = size + size // 4, size // 2
    hidden = len(entries) - MAX_NAMES
    shown: list[tuple[str, Color | None]] = [*entries[:MAX_NAMES]]
    if hidden > 0:
        shown.append((f"and {hidden} more", None))
    room = width - line - 3 * gap
    lines = [fit_text(name, size, room) for name, _ in shown]
    cell = line + 3 * gap + max((round(text.length) for text in lines), default=0)
    columns = max(1, width // cell)
    rows = -(-len(shown) // columns)
    canvas = Image.new("RGB", (width, rows * (line + gap) + gap), (BACKGROUND,) * 3)
    draw = ImageDraw.Draw(canvas)
    for i, (text, (_, color)) in enumerate(zip(lines, shown, strict=True)):
        left, top = i % columns * (width // columns) + gap, i // columns * (line + gap) + gap
        if color:
            draw.rectangle((left, top, left + line - 1, top + line - 1), fill=color)
        text.draw(draw, (left + line + gap, top + BASELINE * line), TEXT_COLOR)
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
