import torch
from torchvision import tv_tensors

from e3va_cli.data import collate
from e3va_cli.data.formats.shapes import Shapes
from e3va_cli.data.transforms import DetectionTransforms


def test_padding_to_a_multiple_of_32():
    samples = [(torch.full((3, 33, 50), 7, dtype=torch.uint8), {}), (torch.full((3, 20, 70), 9, dtype=torch.uint8), {})]
    batch = collate(samples)
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.image_sizes == [(33, 50), (20, 70)]
    assert (batch.images[0, :, :33, :50] == 7).all() and batch.images[0].sum() == 7 * 3 * 33 * 50


def test_training_scales_and_flips_boxes_with_their_masks():
    dataset = Shapes(
        "train",
        images=20,
        size=96,
        seed=0,
        transforms=DetectionTransforms(
            train_short_sides=[64, 128], val_short_side=64, max_size=128, flip=0.5
        ).train_transforms(),
    )
    plain = Shapes("train", images=20, size=96, seed=0)
    sizes, flipped = set(), set()
    for index in range(20):
        image, target = dataset[index]
        sizes.add(tuple(image.shape[1:]))
        assert target["masks"].shape[1:] == image.shape[1:]
        for (x1, y1, x2, y2), mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            ys, xs = torch.nonzero(mask, as_tuple=True)
            assert abs(xs.min() - x1) <= 1.5 and abs(xs.max() + 1 - x2) <= 1.5
            assert abs(ys.min() - y1) <= 1.5 and abs(ys.max() + 1 - y2) <= 1.5
        scale = image.shape[1] / 96
        flipped.add(bool((plain[index][1]["boxes"][0] * scale - target["boxes"][0]).abs().max() > 1))
    assert sizes == {(64, 64), (128, 128)} and flipped == {True, False}


def test_boxes_that_vanish_are_dropped_with_label_and_mask():
    boxes = tv_tensors.BoundingBoxes([[0.0, 0, 50, 50], [10, 10, 12, 12]], format="XYXY", canvas_size=(100, 100))
    target = {
        "boxes": boxes,
        "labels": torch.tensor([1, 2]),
        "masks": tv_tensors.Mask(torch.ones(2, 100, 100, dtype=torch.uint8)),
        "image_id": 4,
    }
    image = tv_tensors.Image(torch.zeros(3, 100, 100, dtype=torch.uint8))
    _, small = DetectionTransforms(train_short_sides=[25], val_short_side=25, max_size=25, flip=0.0).train_transforms()(
        image, target
    )
    assert small["labels"].tolist() == [1] and len(small["boxes"]) == len(small["masks"]) == 1
    assert small["image_id"] == 4


def test_evaluation_resizes_the_image_alone():
    image = tv_tensors.Image(torch.zeros(3, 50, 100, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[0, 0, 50, 50]], format="XYXY", canvas_size=(50, 100))
    target = {"boxes": boxes, "labels": torch.tensor([1]), "original_size": (50, 100)}
    resized, same = DetectionTransforms(
        train_short_sides=[80], val_short_side=80, max_size=120, flip=0.5
    ).val_transforms()(image, target)
    assert resized.shape == (3, 60, 120)  # the long side binds
    assert same["boxes"].tolist() == [[0, 0, 50, 50]] and same["original_size"] == (50, 100)
    assert DetectionTransforms(train_short_sides=[80], val_short_side=80, max_size=1333, flip=0.5).val_transforms()(
        image, target
    )[0].shape == (3, 80, 160)
