import numpy as np
import pycocotools.mask as rle
import torch

from e3va_cli.data.formats.shapes import CLASSES, Shapes


def test_same_seed_same_image_and_splits_differ():
    one, again = (Shapes("train", images=4, size=96, seed=0)[2] for _ in range(2))
    assert torch.equal(one[0], again[0]) and torch.equal(one[1]["masks"], again[1]["masks"])
    assert not torch.equal(one[0], Shapes("val", images=4, size=96, seed=0)[2][0])
    assert not torch.equal(one[0], Shapes("train", images=4, size=96, seed=1)[2][0])


def test_boxes_are_tight_and_masks_do_not_overlap():
    dataset = Shapes("train", images=40, size=128, seed=0)
    overlapping_boxes = 0
    for image, target in (dataset[i] for i in range(40)):
        assert image.shape == (3, 128, 128) and image.dtype == torch.uint8
        assert (target["masks"].sum(0) <= 1).all(), "a pixel shows one object"
        assert len(target["boxes"]) == len(target["labels"]) == len(target["masks"])
        for (x1, y1, x2, y2), mask in zip(target["boxes"].long().tolist(), target["masks"], strict=True):
            assert mask[y1:y2, x1:x2].sum() == mask.sum() > 0
            for edge in (mask[y1, x1:x2], mask[y2 - 1, x1:x2], mask[y1:y2, x1], mask[y1:y2, x2 - 1]):
                assert edge.any()
        overlapping_boxes += sum(
            bool((a[:2] < b[2:]).all() and (b[:2] < a[2:]).all())
            for k, a in enumerate(target["boxes"])
            for b in target["boxes"][:k]
        )
    assert overlapping_boxes > 10


def test_every_class_and_a_wide_range_of_sizes():
    truth = Shapes("val", images=100, size=128, seed=0).ground_truth()
    assert {a["category_id"] for a in truth["annotations"]} == set(range(1, len(CLASSES) + 1))
    sides = [max(a["bbox"][2:]) for a in truth["annotations"]]
    assert min(sides) < 20 and max(sides) > 50


def test_ground_truth_agrees_with_the_items():
    dataset = Shapes("val", images=3, size=64, seed=0)
    truth = dataset.ground_truth()
    for index in range(3):
        _, target = dataset[index]
        own = [a for a in truth["annotations"] if a["image_id"] == target["image_id"]]
        assert [a["category_id"] for a in own] == target["labels"].tolist()
        for annotation, mask in zip(own, target["masks"], strict=True):
            assert np.array_equal(rle.decode(annotation["segmentation"]), mask.numpy())
            assert annotation["area"] == mask.sum()
