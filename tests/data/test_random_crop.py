"""The augmentation of DETR and of mmdetection's Swin recipes: crop or none, then multi-scale resize."""

from collections import Counter

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from e3va_cli.data.transforms import DetectionTransforms, RandomCropInRange

LEAST, MOST = 384, 600
SIZES = [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
OBJECTS = 60


def sample(height, width, seed=0):
    """An image whose pixels tell their place, with boxes and masks all over it, some across its border's corners."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows % 256, columns % 256, (rows // 256) * 16 + columns // 256]).astype(np.uint8)
    first, second = (generator.uniform(0, (width, height), (OBJECTS, 2)) for _ in range(2))
    boxes = np.concatenate([np.minimum(first, second), np.maximum(first, second)], 1).astype(np.float32)
    masks = np.zeros((OBJECTS, height, width), np.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().astype(int), strict=True):
        mask[y1 : (y1 + y2) // 2 + 1, x1:x2] = 1  # the upper half alone: a crop may meet the box and not the mask
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=(height, width)),
        "labels": torch.arange(1, OBJECTS + 1),
        "masks": tv_tensors.Mask(torch.from_numpy(masks)),
        "image_id": 1,
        "original_size": (height, width),
    }
    return tv_tensors.Image(torch.from_numpy(image)), target


def window(image):
    """Where a crop was taken from, by its pixels."""
    row, column, block = image[:, 0, 0].tolist()
    return block // 16 * 256 + row, block % 16 * 256 + column


def mmdetections_crop(target, top, left, height, width):
    """Boxes, labels and masks as mmdetection's `RandomCrop._crop_data` leaves them, negative crops allowed."""
    boxes = target["boxes"].numpy() - np.array([left, top, left, top], np.float32)
    boxes[:, 0::2] = boxes[:, 0::2].clip(0, width)
    boxes[:, 1::2] = boxes[:, 1::2].clip(0, height)
    valid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    masks = target["masks"].numpy()[valid][:, top : top + height, left : left + width]
    return boxes[valid], target["labels"].numpy()[valid], masks


@pytest.mark.parametrize("size", [(500, 750), (750, 500), (400, 400), (300, 1200), (100, 90)])
def test_a_crop_is_mmdetections(size):
    image, target = sample(*size)
    torch.manual_seed(0)
    for _ in range(5):
        part, found = RandomCropInRange(LEAST, MOST)(image, target)
        height, width = part.shape[-2:]
        top, left = window(part)
        assert min(LEAST, size[0]) <= height <= min(MOST, size[0])
        assert min(LEAST, size[1]) <= width <= min(MOST, size[1])
        assert torch.equal(part, image[:, top : top + height, left : left + width])
        boxes, labels, masks = mmdetections_crop(target, top, left, height, width)
        x1, y1, x2, y2 = found["boxes"].unbind(1)
        kept = (x2 > x1) & (y2 > y1)
        np.testing.assert_allclose(found["boxes"][kept], boxes, atol=1e-4)
        assert found["labels"][kept].tolist() == labels.tolist()
        assert np.array_equal(found["masks"][kept], masks)


def test_sides_and_places_of_crops_are_drawn_evenly():
    image, target = tv_tensors.Image(torch.zeros(1, 12, 9, dtype=torch.uint8)), {}
    crop = RandomCropInRange(4, 6)
    torch.manual_seed(0)
    params = [crop.make_params([image, target]) for _ in range(6000)]
    assert {key: set(Counter(p[key] for p in params)) for key in ("height", "width")} == {
        "height": {4, 5, 6},
        "width": {4, 5, 6},
    }
    assert all(abs(Counter(p["height"] for p in params)[side] - 2000) < 200 for side in (4, 5, 6))
    tops = Counter(p["top"] for p in params if p["height"] == 4)
    assert set(tops) == set(range(9)) and max(tops.values()) < 1.5 * min(tops.values())
    assert {p["left"] for p in params if p["width"] == 6} == set(range(4))


def recipe(**options):
    return DetectionTransforms(
        train_short_sides=SIZES,
        val_short_side=800,
        max_size=1333,
        flip=0.0,
        crop_short_sides=[400, 500, 600],
        crop_range=[384, 600],
        **options,
    )


def test_half_of_the_images_are_cropped_before_the_resize():
    """A whole image of 3:2 keeps its shape; a crop hardly ever does."""
    image = tv_tensors.Image(torch.zeros(3, 40, 60, dtype=torch.uint8))
    target = {
        "boxes": tv_tensors.BoundingBoxes([[0.0, 0, 60, 40]], format="XYXY", canvas_size=(40, 60)),
        "labels": torch.tensor([1]),
    }
    transforms = recipe(crop_probability=0.5).train_transforms()
    torch.manual_seed(0)
    shapes = [tuple(transforms(image, target)[0].shape[1:]) for _ in range(60)]
    whole = [shape for shape in shapes if abs(shape[1] / shape[0] - 1.5) < 0.01]
    assert 20 <= len(whole) <= 40
    assert all(min(abs(min(shape) - size) for size in SIZES) <= 1 for shape in shapes)
    assert all(max(shape) <= 1333 for shape in shapes)


def test_boxes_outside_of_a_crop_are_left_out_with_labels_and_masks():
    image, target = sample(600, 900)
    transforms = recipe(crop_probability=1.0).train_transforms()
    torch.manual_seed(0)
    _, found = transforms(image, target)
    assert 0 < len(found["boxes"]) < OBJECTS
    assert len(found["boxes"]) == len(found["labels"]) == len(found["masks"])
    x1, y1, x2, y2 = found["boxes"].unbind(1)
    assert (x2 - x1 >= 1).all() and (y2 - y1 >= 1).all()


def test_a_crop_without_objects_stays():
    image, target = sample(600, 900)
    nothing = {**target, "boxes": target["boxes"][:0], "labels": target["labels"][:0], "masks": target["masks"][:0]}
    nothing["boxes"] = tv_tensors.BoundingBoxes(nothing["boxes"], format="XYXY", canvas_size=(600, 900))
    nothing["masks"] = tv_tensors.Mask(nothing["masks"])
    part, found = recipe(crop_probability=1.0).train_transforms()(image, nothing)
    assert len(found["boxes"]) == 0 and min(part.shape[1:]) >= min(SIZES) - 1


def test_plans_take_the_largest_image_that_a_crop_can_become(config):
    """A crop is resized to the same sides as a whole image, so it is never larger."""
    transforms = config("experiment=coco_cascade_swin_b", "dataset.root=x").dataset
    assert (transforms.crop_probability, transforms.filter_empty) == (0.5, True)
    assert transforms.largest_image == (800, 1333)
    image = tv_tensors.Image(torch.zeros(3, 384, 640, dtype=torch.uint8))
    target = {"boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(384, 640))}
    torch.manual_seed(1)
    for _ in range(10):
        short, long = sorted(transforms.train_transforms()(image, {**target, "labels": torch.zeros(0)})[0].shape[1:])
        assert short <= 800 and long <= 1333
