from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision import tv_tensors

from e3va_cli.data.formats.ade20k import Ade20kFormat
from e3va_cli.visualization.drawing import class_color, grid, save_png, to_pil
from e3va_cli.visualization.segmentation import draw_segmentation

CLASSES = ["sky", "road", "car"]


def gray(height: int, width: int) -> Tensor:
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def has_color(pixels: Tensor, label: int) -> Tensor:
    return (pixels == torch.tensor(class_color(label))[:, None, None]).all(0)


def halves() -> Tensor:
    """Class 1 above, class 2 below, unlabeled on the right."""
    labels = torch.zeros(200, 400, dtype=torch.int16)
    labels[:80, :300], labels[80:, :300] = 1, 2
    return labels


def test_segments_are_tinted_and_outlined() -> None:
    image = gray(200, 400)
    picture = draw_segmentation(image, halves(), CLASSES)
    assert picture.shape[0] == 3 and picture.shape[1] > 200 and picture.shape[2] == 400
    assert picture.dtype == torch.uint8
    for label, inside in ((1, picture[:, 2:78, 2:298]), (2, picture[:, 82:198, 2:298])):
        mixed = 0.5 * 100 + 0.5 * torch.tensor(class_color(label), dtype=torch.float32)
        assert (inside.flatten(1) == inside[:, 0, :1]).all()
        assert torch.allclose(inside[:, 0, 0].float(), mixed, atol=1)
    assert has_color(picture, 1)[79, :300].all() and has_color(picture, 2)[80, :300].all()
    assert has_color(picture, 1)[:80, 299].all() and not has_color(picture, 1)[:79, :299].any()
    assert torch.equal(picture[:, :200, 300:], image[:, :, 300:])  # unlabeled
    assert (image == 100).all()  # the input is left alone


def test_a_line_one_pixel_wide_stays_visible() -> None:
    labels = torch.ones(200, 400, dtype=torch.uint8)
    labels[:, 100] = 3
    assert has_color(draw_segmentation(gray(200, 400), labels, CLASSES), 3)[:200, 100].all()


def legend(labels: Tensor, classes: list[str]) -> Tensor:
    return draw_segmentation(gray(*labels.shape), labels, classes)[:, labels.shape[0] :]


def squares(picture: Tensor, labels: range) -> list[int]:
    """The classes whose colors a legend shows, in reading order."""
    corners = {label: has_color(picture, label).nonzero() for label in labels}
    first = {label: tuple(places[0].tolist()) for label, places in corners.items() if len(places)}
    return sorted(first, key=lambda label: first[label])


def test_the_legend_names_what_is_there_by_frequency() -> None:
    labels = halves()
    labels[150:160, 350:360] = 3
    shown = legend(labels, [*CLASSES, "absent"])
    assert squares(shown, range(1, 5)) == [2, 1, 3]
    assert (shown[:, -1] == 255).all() and (shown[:, :, -1] == 255).all()
    ink = (shown == 0).all(0).sum(0).nonzero().flatten()
    assert ink.min() > has_color(shown, 2).any(0).nonzero().min()  # names to the right of their squares


def stripes(count: int, width: int = 400) -> Tensor:
    """The classes 1..count, each in one row fewer than the one before."""
    rows = [label for label in range(1, count + 1) for _ in range(3 * count - 2 * label)]
    return torch.tensor(rows)[:, None].expand(-1, width)


@pytest.mark.parametrize("width", [320, 700])
@pytest.mark.parametrize("count", [1, 11, 12, 13, 20])
def test_twelve_names_at_most(count: int, width: int) -> None:
    names = [f"class {label}" for label in range(1, 21)]
    shown = legend(stripes(count, width), names)
    assert squares(shown, range(1, 21)) == list(range(1, min(count, 12) + 1))


def test_names_in_order_and_how_many_more(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, **keys: written.append(text))
    names = [f"class {label}" for label in range(1, 21)]
    legend(stripes(20), names)
    assert written == [*names[:12], "and 8 more"]
    written.clear()
    legend(stripes(12), names)
    assert written == names[:12]


def test_a_name_too_long_is_cut() -> None:
    labels = torch.ones(200, 330, dtype=torch.int16)
    short, long = legend(labels, ["w" * 10]), legend(labels, ["w" * 500])
    assert long.shape == short.shape
    assert (long[:, :, -3:] == 255).all()
    assert (long != 255).any(0).sum() > (short != 255).any(0).sum()


def test_no_labels() -> None:
    picture = draw_segmentation(gray(200, 400), torch.zeros(200, 400, dtype=torch.int16), CLASSES)
    assert torch.equal(picture[:, :200], gray(200, 400)) and (picture[:, 200:] == 255).all()


def test_a_small_image_is_enlarged_until_names_can_be_read() -> None:
    labels = torch.zeros(48, 64, dtype=torch.int16)
    labels[10:20, 10:20] = 2
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    picture = draw_segmentation(tv_tensors.Image(image), tv_tensors.Mask(labels), CLASSES)
    assert type(picture) is Tensor and picture.shape[2] == 320
    assert torch.equal(picture[:, :50:5, :320:5], image[:, :10])
    assert has_color(picture, 2)[50, 50:100].all() and not has_color(picture, 2)[51:99, 51:99].any()


@pytest.mark.parametrize(("folder", "num_classes"), [("camvid_small", 11), ("ade_sample", 150)])
def test_real_data(tmp_path: Path, real_data: Callable[[str], Path], folder: str, num_classes: int) -> None:
    source = Ade20kFormat(
        root=str(real_data(folder)),
        train_images="images/training",
        train_labels="annotations/training",
        val_images="images/validation",
        val_labels="annotations/validation",
        num_classes=num_classes,
        classes=None,
    )
    data = source.open("val", None)
    pictures = []
    for index in range(3):
        image, target = data[index]
        picture = draw_segmentation(image, target["semantic"], data.classes)
        assert picture.shape[2] == image.shape[2]
        largest = int(torch.bincount(target["semantic"].flatten().int())[1:].argmax()) + 1
        assert has_color(picture[:, image.shape[1] :], largest).any()
        pictures.append(picture)
    save_png(to_pil(grid(pictures, 2)), tmp_path / "grid.png")
    assert np.array(Image.open(tmp_path / "grid.png")).ndim == 3
