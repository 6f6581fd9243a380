import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.coco_file import coco_paths
from e3va_cli.errors import UserError
from e3va_cli.visualization.drawing import class_color, draw_detections, grid, save_png, to_pil

CLASSES = ["cat", "dog"]


def gray(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def draw(image: Tensor, boxes: list[list[float]], labels: list[int], **keys: Tensor) -> Tensor:
    return draw_detections(image, torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels), CLASSES, **keys)


def has_color(pixels: Tensor, label: int) -> Tensor:
    return (pixels == torch.tensor(class_color(label))[:, None, None]).all(0)


def test_a_class_has_one_color_of_its_own() -> None:
    colors = [class_color(label) for label in range(1, 151)]
    assert len(set(colors)) == 150
    assert colors == [class_color(label) for label in range(1, 151)]
    for one, other in itertools.pairwise(colors):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) > 100


def test_a_box_is_drawn_at_its_place_in_its_color() -> None:
    image = gray(200, 400)
    picture = draw(image, [[100, 80, 300, 150]], [2])
    assert picture.shape == image.shape
    assert picture.dtype == torch.uint8
    drawn = has_color(picture, 2)
    assert drawn[80, 100:301].all()
    assert drawn[150, 100:301].all()
    assert drawn[80:151, 100].all()
    assert drawn[80:151, 300].all()
    assert torch.equal(picture[:, 90:140, 110:290], image[:, 90:140, 110:290])
    assert torch.equal(picture[:, 160:], image[:, 160:])
    assert (image == 100).all()  # the input is left alone


def test_the_name_is_written_above_the_box_and_with_the_score() -> None:
    image = gray(200, 400)
    plain, scored = (draw(image, [[100, 80, 300, 150]], [1], **keys) for keys in ({}, {"scores": torch.tensor([0.5])}))
    width_plain, width_scored = (int((p != image).any(0)[70].sum()) for p in (plain, scored))
    assert 10 < width_plain < width_scored < 150


def test_a_name_does_not_hide_another() -> None:
    picture = draw(gray(200, 400), [[100, 80, 300, 150], [100, 80, 300, 150]], [1, 2])
    assert not has_color(picture, 1)[81:].any()  # the boxes lie on each other ...
    assert has_color(picture, 1)[:80].sum() > 100  # ... but the names do not
    assert has_color(picture, 2)[82:149, 102:299].sum() > 100


def test_a_name_at_the_edge_is_moved_into_the_picture() -> None:
    whole, moved = (draw(gray(200, 400), [box], [1]) for box in ([200, 100, 204, 104], [395, 0, 399, 4]))
    size = [int(has_color(picture, 1).sum()) for picture in (whole, moved)]
    assert size[0] > 200
    assert size[1] > size[0] - 40  # the name covers its small box


def test_small_objects_lie_on_top() -> None:
    picture = draw(gray(200, 400), [[100, 80, 140, 150], [100, 80, 300, 150]], [1, 2])
    assert has_color(picture, 1)[120, 100]
    assert has_color(picture, 2)[120, 300]


def test_a_mask_is_tinted_and_outlined() -> None:
    image = gray(200, 400)
    mask = torch.zeros(1, 200, 400, dtype=torch.uint8)
    mask[0, 100:140, 120:200] = 1
    picture = draw(image, [[100, 80, 300, 150]], [2], masks=mask)
    assert has_color(picture, 2)[100, 120:200].all()
    inside = picture[:, 110:130, 130:190].flatten(1)
    assert (inside == inside[:, :1]).all()
    expected = 0.6 * 100 + 0.4 * torch.tensor(class_color(2), dtype=torch.float32)
    assert torch.allclose(inside[:, 0].float(), expected, atol=1)
    assert torch.equal(picture[:, 100:140, 210:290], image[:, 100:140, 210:290])


def test_a_small_image_is_enlarged_until_names_can_be_read() -> None:
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    mask = torch.zeros(1, 48, 64, dtype=torch.uint8)
    mask[0, 20:30, 20:30] = 1
    picture = draw(image, [[10, 20, 30, 40]], [1], masks=mask)
    assert picture.shape == (3, 240, 320)
    assert has_color(picture, 1)[100:201, 50].all()
    assert torch.equal(picture[:, ::5, ::5][:, 41:, :], image[:, 41:, :])
    assert draw(image, [], []).shape == (3, 240, 320)


def test_no_objects_and_boxes_at_or_beyond_the_edge() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(draw(gray(200, 400), [], []), gray(200, 400))
        empty = torch.zeros(0, 200, 400, dtype=torch.uint8)
        assert torch.equal(draw(gray(200, 400), [], [], masks=empty), gray(200, 400))
    drawn = has_color(draw(gray(200, 400), [[-5, 100, 400, 260]], [1]), 1)
    assert drawn[100:, 0].all()
    assert drawn[199, :].all()
    assert drawn[100:, 399].all()


def test_grid() -> None:
    sheet = grid([torch.zeros(3, 10, 20), torch.zeros(3, 30, 10), torch.zeros(3, 30, 20)], columns=2)
    assert sheet.shape == (3, 6 + 2 * 36, 6 + 2 * 26)
    black = (sheet == 0).all(0)
    assert black.sum() == 10 * 20 + 30 * 10 + 30 * 20
    assert black[16:26, 6:26].all()  # the first in the middle of its cell
    assert black[42:72, 6:26].all()  # the third begins the second row
    assert sheet[~black.expand(3, -1, -1)].unique().tolist() == [255]
    assert grid([torch.zeros(3, 10, 20)], columns=4).shape == (3, 22, 32)
    for images, columns in (([], 2), ([torch.zeros(3, 1, 1)], 0)):
        with pytest.raises(ValueError, match="a grid needs"):
            grid(images, columns)


def test_save(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    (tmp_path / "new").mkdir()
    save_png(to_pil(picture), tmp_path / "new" / "a.png")
    assert np.array_equal(np.array(Image.open(tmp_path / "new" / "a.png")), picture.permute(1, 2, 0).numpy())
    with pytest.raises(UserError, match="cannot write mode F"):
        save_png(Image.new("F", (5, 7)), tmp_path / "new" / "a.png")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "new" / "a.png").size == (7, 5)


def test_real_data(coco_tiny: Path, tmp_path: Path) -> None:
    data = open_coco(*coco_paths(coco_tiny, "val2017", "annotations/instances_val2017.json"))
    pictures = []
    for index in range(4):
        image, target = data[index]
        picture = draw_detections(image, target["boxes"], target["labels"], data.classes, masks=target["masks"])
        assert type(picture) is Tensor
        assert picture.shape == image.shape
        for label in set(target["labels"].tolist()):
            assert has_color(picture, label).any()
        pictures.append(picture)
    save_png(to_pil(grid(pictures, 2)), tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").format == "PNG"
