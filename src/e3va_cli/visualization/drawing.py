"""Drawing of boxes, masks and class names on images."""

import colorsys
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from e3va_cli.utils.files import atomic_write
from e3va_cli.visualization.fonts import fit_text, legible_names

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]

GOLDEN_ANGLE = 0.618034
SHADES = ((0.85, 1.0), (1.0, 0.8), (0.55, 1.0), (0.75, 0.65))  # saturation, value
BACKGROUND = 255
MIN_SIDE = 320  # pixels of the longer side; smaller images are enlarged so that names are legible


def class_color(label: int) -> Color:
    """Return the color of a class; successive labels differ in hue."""
    saturation, value = SHADES[label % len(SHADES)]
    red, green, blue = colorsys.hsv_to_rgb(label * GOLDEN_ANGLE % 1, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    masks: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """Draw masks, boxes and class names on an image.

    Args:
        image: uint8 [3, H, W], RGB.
        boxes: XYXY in pixels [N, 4].
        labels: [N], 1..K.
        classes: K names.
        masks: [N, H, W], 0 or 1.
        scores: [N], 0..1, drawn after the names.

    Returns:
        uint8 [3, s H, s W]; the integer s is 1 except for small images.
    """
    image = image.as_subclass(Tensor).cpu()
    boxes = boxes.as_subclass(Tensor).detach().cpu().float()
    if not len(boxes):
        return _enlarge(image)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    order = areas.argsort(descending=True)  # small objects on top
    numbers = labels.cpu()[order].tolist()
    colors = [class_color(label) for label in numbers]
    picture = _enlarge(image)
    if masks is not None:
        shapes = upscale(masks.as_subclass(Tensor).cpu()[order] > 0, scale_factor(image))
        picture = draw_segmentation_masks(picture, shapes, alpha=0.4, colors=colors)
        picture = draw_segmentation_masks(picture, _outlines(shapes), alpha=1, colors=colors)
    thickness = max(1, round(max(picture.shape[1:]) / 400))
    corners = _inside(boxes[order] * scale_factor(image), picture)
    picture = draw_bounding_boxes(picture, corners, colors=colors, width=thickness)
    shown = legible_names(classes)
    written = [""] * len(numbers) if scores is None else [f" {score:.2f}" for score in scores.cpu()[order].tolist()]
    names = [(shown[label - 1], score) for label, score in zip(numbers, written, strict=True)]
    return _write_names(picture, corners.tolist(), names, colors)


def grid(images: Sequence[Tensor], columns: int) -> Tensor:
    """Arrange images of any sizes, uint8 [3, h, w], in rows of equal cells: uint8 [3, H, W].

    Raises:
        ValueError: there is no image, or no column.
    """
    if not images or columns < 1:
        raise ValueError(f"a grid needs images and columns, not {len(images)} and {columns}")
    columns = min(columns, len(images))
    gap = 6
    height, width = max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    rows = ceil(len(images) / columns)
    sheet = torch.full((3, rows * (height + gap) + gap, columns * (width + gap) + gap), BACKGROUND, dtype=torch.uint8)
    for i, image in enumerate(images):
        top = gap + i // columns * (height + gap) + (height - image.shape[1]) // 2
        left = gap + i % columns * (width + gap) + (width - image.shape[2]) // 2
        sheet[:, top : top + image.shape[1], left : left + image.shape[2]] = image
    return sheet


def to_pil(pixels: Tensor) -> Image.Image:
    """Return a PIL image of uint8 [3, H, W], RGB."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image atomically."""
    with atomic_write(path) as unfinished:
        image.save(unfinished, format="PNG")


def scale_factor(image: Tensor) -> int:
    """Return the integer by which an image is enlarged so that names are legible."""
    return max(1, ceil(MIN_SIDE / max(image.shape[1:])))


def _enlarge(image: Tensor) -> Tensor:
    return upscale(image, scale_factor(image))


def upscale(pixels: Tensor, factor: int) -> Tensor:
    """Repeat each pixel `factor` times in both directions."""
    return pixels.repeat_interleave(factor, -2).repeat_interleave(factor, -1)


def _outlines(masks: Tensor) -> Tensor:
    """Return the boundary pixels of masks [N, H, W]."""
    outside = functional.max_pool2d((~masks).float()[:, None], kernel_size=3, stride=1, padding=1)[:, 0]
    return masks & (outside > 0)


def _inside(boxes: Tensor, picture: Tensor) -> Tensor:
    limit = torch.tensor([picture.shape[2] - 1, picture.shape[1] - 1] * 2)
    return boxes.clamp(min=torch.zeros(4), max=limit)


def _write_names(
    picture: Tensor, boxes: list[list[float]], names: list[tuple[str, str]], colors: list[Color]
) -> Tensor:
    """Draw name and score of each box on the class's color, where they overlap no earlier one."""
    canvas = to_pil(picture)
    draw = ImageDraw.Draw(canvas)
    size = min(max(11, max(canvas.size) / 48), 28)
    taken: list[Rectangle] = []
    for box, (name, score), color in zip(boxes, names, colors, strict=True):
        line = fit_text(name, size, canvas.width - 4, score)
        left, top, right, bottom = line.box
        rectangle = _free_rectangle(box, right - left + 4, bottom - top + 4, canvas.size, taken)
        taken.append(rectangle)
        draw.rectangle(rectangle, fill=color)
        line.draw(draw, (rectangle[0] + 2 - left, rectangle[1] + 2 - top), _text_color(color))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).contiguous()


def _free_rectangle(
    box: list[float], width: float, height: float, size: tuple[int, int], taken: list[Rectangle]
) -> Rectangle:
    """Return the first rectangle above, in or below a box that overlaps no other name."""
    x1, y1, x2, y2 = box
    candidates = []
    for x, y in ((x1, y1 - height), (x1, y1), (x1, y2), (x2 - width, y1 - height), (x2 - width, y2 - height)):
        x, y = min(max(x, 0), max(size[0] - width, 0)), min(max(y, 0), max(size[1] - height, 0))
        candidates.append((x, y, x + width, y + height))
    return next((one for one in candidates if not any(_overlap(one, other) for other in taken)), candidates[0])


def _overlap(one: Rectangle, other: Rectangle) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _text_color(color: Color) -> Color:
    """Return black or white, whichever is legible on the color."""
    luminance = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luminance > 140 else (255, 255, 255)
