"""Sizes of resized images are rounded, as mmdetection and detectron2 do it."""

import math
from fractions import Fraction

import pytest
import torch
from torchvision import tv_tensors

from e3va_cli.data.transforms import RandomResizeShortestEdge, ResizeShortestEdge, resized_shape


def rounded(height, width, short, longest):
    """Both sides scaled and rounded, halves up, in exact arithmetic; and whether one was a half."""
    scale = min(Fraction(short, min(height, width)), Fraction(longest, max(height, width)))
    sides = [side * scale for side in (height, width)]
    return tuple(math.floor(side + Fraction(1, 2)) for side in sides), any(side % 1 == Fraction(1, 2) for side in sides)


@pytest.mark.parametrize(("short", "longest"), [(800, 1333), (600, 1000), (480, 10_000)])
def test_sizes_are_rounded_to_the_nearest_pixel(short, longest):
    for height in range(32, 3000):
        expected, half = rounded(height, 640, short, longest)
        assert half or resized_shape((height, 640), short, longest) == expected, height


def test_the_short_side_is_what_was_asked_for():
    assert {min(resized_shape((height, 3000), 800, 100_000)) for height in range(32, 3000)} == {800}


def test_sides_have_at_least_one_pixel():
    assert resized_shape((1, 4000), 800, 1333) == (1, 1333)


def test_training_and_evaluation_resize_alike():
    image = tv_tensors.Image(torch.zeros(3, 123, 457, dtype=torch.uint8))
    trained = RandomResizeShortestEdge([96], max_size=300)(image)
    evaluated, _ = ResizeShortestEdge(96, 300)(image, {})
    assert trained.shape == evaluated.shape == (3, *resized_shape((123, 457), 96, 300))
