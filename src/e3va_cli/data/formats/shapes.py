"""Generated images of colored shapes, for demos, tests and benchmarks.

Each image has up to eight shapes of five classes, from 1/10 to 1/2 of its side, rotated, textured and partly occluded,
on a textured and noisy background of low saturation. Each class has a typical hue, which varies. Image `i` of a split
depends on (seed, split, i) only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pycocotools.mask as rle
import torch
from PIL import Image, ImageDraw
from torchvision import tv_tensors

from e3va_cli.components.options import MAX_SEED, option
from e3va_cli.data.dataset import DETECTION, Target
from e3va_cli.data.fingerprint import Fingerprint, digest
from e3va_cli.data.formats.base import DATASET_FORMATS, SPLITS, DatasetFormat, Split
from e3va_cli.data.transforms import DetectionTransforms
from e3va_cli.data.validation.issues import Progress, Report

HUES = {"circle": 0, "square": 72, "triangle": 144, "star": 216, "ring": 288}  # degrees
CLASSES = list(HUES)
HUE_SPREAD = 14.0  # standard deviation, degrees
MIN_SATURATION = 0.45  # of objects
MAX_BACKGROUND_SATURATION = 0.25
MAX_OBJECTS = 8
MIN_SIZE, MAX_SIZE = 1 / 10, 1 / 2  # of an object, relative to the image's side
MIN_VISIBLE = 0.35  # of each object's area
MIN_CONTRAST = 30  # mean difference from the background in some channel, of 255
NOISE = 12.0  # standard deviation, of 255

Outline = tuple[np.ndarray, ...]  # polygons (P, 2) inside the unit circle: the outer one, then a hole


def _regular(corners: int, inner: float = 1.0) -> np.ndarray:
    """Return a polygon on the unit circle, every second corner at radius `inner`."""
    angles = np.arange(corners) * 2 * np.pi / corners
    radii = np.where(np.arange(corners) % 2 == 0, 1.0, inner)[:, None]
    return radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)


OUTLINES: dict[str, Outline] = {
    "circle": (_regular(40),),
    "square": (_regular(4),),
    "triangle": (_regular(3),),
    "star": (_regular(10, 0.45),),
    "ring": (_regular(40), 0.55 * _regular(40)),
}


def _mask(name: str, center: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """Return the mask (H, W) of a shape at `center` (x, y), on the smallest canvas with origin (0, 0)."""
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    width, height = np.ceil(center + radius + 1).astype(int)
    canvas = Image.new("1", (int(width), int(height)))
    draw = ImageDraw.Draw(canvas)
    for fill, outline in zip((1, 0), OUTLINES[name], strict=False):
        draw.polygon([tuple(point) for point in center + radius * outline @ turn], fill=fill)
    return np.asarray(canvas)


def _colors(rng: np.random.Generator, name: str | None) -> np.ndarray:
    """Return two colors, (2, 3) float32, 0..255: of a class, or of the background."""
    hue = rng.uniform(0, 360) if name is None else rng.normal(HUES[name], HUE_SPREAD)
    saturation = rng.uniform(0, MAX_BACKGROUND_SATURATION, 2) if name is None else rng.uniform(MIN_SATURATION, 1, 2)
    value = rng.uniform(0.2, 1, 2)
    return 255 * np.array(
        [hsv_to_rgb(hue % 360 / 360, s, v) for s, v in zip(saturation, value, strict=True)], np.float32
    )


def _texture(rng: np.random.Generator, colors: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a pattern of two colors (plain, stripes, checks or blotches): (height, width, 3) float32, 0..255."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(4, 16)
    pattern = rng.integers(4)
    if pattern == 0:
        return np.broadcast_to(colors[0], (height, width, 3)).copy()
    if pattern == 3:
        coarse = Image.fromarray(rng.uniform(0, 1, (6, 6)).astype(np.float32))
        weight = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    else:
        x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
        along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
        weight = np.sin(2 * np.pi * along / period)
        if pattern == 2:
            weight = weight * np.sin(2 * np.pi * across / period)
        weight = (weight > 0).astype(np.float32)
    weight = 0.6 * weight[..., None]
    return colors[0] * (1 - weight) + colors[1] * weight


def draw_shapes(rng: np.random.Generator, size: int) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Draw one image with N objects.

    Returns:
        image uint8 (size, size, 3), N labels from 1, and owner uint8 (size, size): n where object n is visible, else 0.
    """
    image = _texture(rng, _colors(rng, None), size, size)
    labels: list[int] = []
    whole: list[int] = []  # area of each object without occlusion
    owner = np.zeros((size, size), np.uint8)
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        label = int(rng.integers(len(CLASSES)))
        radius = size / 2 * np.exp(rng.uniform(np.log(MIN_SIZE), np.log(MAX_SIZE)))
        center = rng.uniform(radius * 0.7, size - radius * 0.7, 2)
        corner = np.maximum(0, np.floor(center - radius)).astype(int)  # x, y
        shape = _mask(CLASSES[label], center - corner, radius, rng.uniform(0, 2 * np.pi))
        shape = shape[: size - corner[1], : size - corner[0]]
        window = (slice(corner[1], corner[1] + len(shape)), slice(corner[0], corner[0] + shape.shape[1]))
        texture = _texture(rng, _colors(rng, CLASSES[label]), *shape.shape)
        seen = np.bincount(owner.ravel(), minlength=len(whole) + 1)
        covered = np.bincount(owner[window][shape], minlength=len(whole) + 1)
        occludes = (seen[1:] - covered[1:] < MIN_VISIBLE * np.array(whole)).any()
        contrast = np.abs(texture[shape].mean(0) - image[window][shape].mean(0)).max() if shape.any() else 0
        if occludes or contrast < MIN_CONTRAST:
            continue
        image[window][shape] = texture[shape]
        labels.append(label + 1)
        whole.append(int(shape.sum()))
        owner[window][shape] = len(whole)
    image += rng.standard_normal(image.shape, dtype=np.float32) * NOISE
    return image.clip(0, 255).astype(np.uint8), labels, owner


def boxes_of(masks: np.ndarray) -> np.ndarray:
    """Return tight boxes, float32 (N, 4), x1 y1 x2 y2, of non-empty masks, bool (N, H, W)."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = xs[0], ys[0], xs[-1] + 1, ys[-1] + 1
    return boxes


class Shapes:
    """One split of generated images; a `DetectionDataset`.

    Args:
        split: train or val; they share no image.
        images: number of images.
        size: height and width in pixels.
        seed: of the images.
        transforms: of (image, target) pairs.
    """

    target_types = DETECTION

    def __init__(
        self,
        split: Split,
        *,
        images: int,
        size: int,
        seed: int,
        transforms: Callable[..., Any] | None = None,
    ) -> None:
        self.split, self.images, self.size, self.seed = split, images, size, seed
        self.transforms = transforms
        self.classes = list(CLASSES)
        self.category_ids = list(range(1, len(self.classes) + 1))
        self.dropped: dict[str, int] = {}
        self.notes: list[str] = []
        self.num_filtered_images = 0
        self.objects_per_image = np.full(images, MAX_OBJECTS)
        self._drawn: dict[int, tuple[np.ndarray, list[int], np.ndarray]] = {}

    def __len__(self) -> int:
        return self.images

    def _draw(self, index: int) -> tuple[np.ndarray, list[int], np.ndarray]:
        """Return image, labels and masks (N, size, size) bool; cached after the first call (4 bytes a pixel)."""
        if index not in self._drawn:
            seed = [self.seed, SPLITS.index(self.split), index]
            self._drawn[index] = draw_shapes(np.random.default_rng(seed), self.size)
        image, labels, owner = self._drawn[index]
        return image, labels, owner == np.arange(1, len(labels) + 1)[:, None, None]

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        if not 0 <= index < self.images:
            raise IndexError(index)
        pixels, labels, masks = self._draw(index)
        image = tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1).contiguous())
        size = (self.size, self.size)
        target: Target = {
            "image_id": index + 1,
            "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes_of(masks)), format="XYXY", canvas_size=size),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": tv_tensors.Mask(torch.from_numpy(masks.astype(np.uint8))),
            "original_size": size,
        }
        return self.transforms(image, target) if self.transforms else (image, target)

    def fingerprint(self) -> Fingerprint:
        """See `DenseDataset`."""
        return Fingerprint(self.images, digest([self.size, self.seed]), "")

    def ground_truth(self, targets: Collection[str] | None = None) -> dict[str, Any]:
        """Return the split in COCO's format."""
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for index in range(self.images):
            _, labels, masks = self._draw(index)
            images.append({"id": index + 1, "height": self.size, "width": self.size})
            for label, mask, box in zip(labels, masks, boxes_of(masks), strict=True):
                x1, y1, x2, y2 = (float(v) for v in box)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": float(mask.sum()),
                        "iscrowd": 0,
                        "segmentation": rle.encode(np.asfortranarray(mask, dtype=np.uint8)),
                    }
                )
        categories = [{"id": i, "name": n} for i, n in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}


@DATASET_FORMATS.register("shapes")
@dataclass
class ShapesFormat(DetectionTransforms, DatasetFormat):
    """Images generated from a seed."""

    target_types: ClassVar[frozenset[str]] = DETECTION
    usual_classes: ClassVar[int] = len(CLASSES)

    image_size: int = option(help="height and width in pixels", gt=0)
    train_images: int = option(help="number of training images", gt=0)
    val_images: int = option(help="number of validation images", gt=0)
    seed: int = option(help="of the images", ge=0, le=MAX_SEED)

    def open(
        self, split: Split, transforms: Callable[..., Any] | None = None, *, targets: Collection[str] = DETECTION
    ) -> Shapes:
        """Open a split; every object has a box and a mask."""
        images = self.train_images if split == "train" else self.val_images
        return Shapes(split, images=images, size=self.image_size, seed=self.seed, transforms=transforms)

    def check(self, split: Split, progress: Progress | None = None, *, targets: Collection[str] = DETECTION) -> Report:
        """Return the counts; generated images have no issues."""
        truth = self.open(split).ground_truth()
        per_class = dict.fromkeys(CLASSES, 0)
        for annotation in truth["annotations"]:
            per_class[CLASSES[annotation["category_id"] - 1]] += 1
        totals = {"images": len(truth["images"]), "objects": len(truth["annotations"])}
        return Report(f"generated {split} images, seed {self.seed}", [], [], totals, per_class)
