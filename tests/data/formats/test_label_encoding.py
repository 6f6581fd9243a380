"""Masks as tools write them: values, one bit, palettes and colors become the same labels, measured as NumPy does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from e3va_cli.data.formats.ade20k import Ade20kFormat
from e3va_cli.data.formats.label_encoding import label_encoding
from e3va_cli.errors import UserError
from e3va_cli.evaluation.mean_iou import MeanIoU
from e3va_cli.models.heads import Segmentation

OBJECT = np.random.default_rng(0).random((24, 40)) < 0.2  # what is annotated, bool
VOID = np.zeros_like(OBJECT)
VOID[:3] = True
COLORS = np.array([[7, 0, 0], [250, 20, 60]], np.uint8)


def palette(values: np.ndarray) -> Image.Image:
    picture = Image.fromarray(values.astype(np.uint8))
    picture = picture.convert("P")
    picture.putdata(values.ravel().tolist())
    picture.putpalette(COLORS.ravel().tolist())
    return picture


PLAIN = {"reduce_zero_label": False, "num_classes": 2}
MASKS: dict[str, tuple[Image.Image, dict[str, Any]]] = {
    "0 and 1": (Image.fromarray(OBJECT.astype(np.uint8)), PLAIN),
    "one bit": (Image.fromarray(OBJECT), PLAIN),
    "16 bits": (Image.fromarray(OBJECT.astype(np.uint16)), PLAIN),
    "palette": (palette(OBJECT), PLAIN),
    "0 and 255": (Image.fromarray(OBJECT.astype(np.uint8) * 255), {"label_map": [0, 255]}),
    "1 and 2": (Image.fromarray(OBJECT.astype(np.uint8) + 1), {"num_classes": 2}),
    "7 and 300": (Image.fromarray(np.where(OBJECT, 300, 7).astype(np.uint16)), {"label_map": [7, 300]}),
    "70,000": (Image.fromarray(np.where(OBJECT, 70_000, 7).astype(np.int32)), {"label_map": [7, 70_000]}),
    "colors": (Image.fromarray(COLORS[OBJECT.astype(int)]), {"label_map": COLORS.tolist()}),
    "palette by color": (palette(OBJECT), {"label_map": COLORS.tolist()}),
    "transparent": (Image.fromarray(COLORS[OBJECT.astype(int)]).convert("RGBA"), {"label_map": COLORS.tolist()}),
}


def write(root: Path, *masks: Image.Image, split: str = "training") -> Path:
    for folder in ("images", "annotations"):
        (root / folder / split).mkdir(parents=True, exist_ok=True)
    for number, mask in enumerate(masks):
        Image.new("RGB", mask.size, (9, 99, 200)).save(root / "images" / split / f"{number}.jpg")
        kind = "tif" if mask.mode == "I" else "png"
        mask.save(root / "annotations" / split / f"{number}.{kind}")
    return root


def source(root: Path, **options: Any) -> Ade20kFormat:
    folders = {f"{split}_{kind}": f"{of[kind]}/{name}" for split, name in SPLITS.items() for kind in of}
    return Ade20kFormat(root=str(root), **{"num_classes": None, "classes": None, **folders, **options})


SPLITS, of = {"train": "training", "val": "validation"}, {"images": "images", "labels": "annotations"}


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    [line] = caught.value.messages
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", MASKS)
def test_the_background_is_a_class(tmp_path: Path, name: str) -> None:
    mask, options = MASKS[name]
    dataset = source(write(tmp_path, mask), **options).open("train")
    assert len(dataset.classes) == 2
    target = dataset[0][1]
    assert np.array_equal(target["semantic"].numpy(), OBJECT + 1)
    report = source(tmp_path, **options).check("train")
    assert report.ok and list(report.per_class.values()) == [(~OBJECT).sum(), OBJECT.sum()]

    everywhere = torch.zeros(2, 24, 40)
    everywhere[1] = 1  # the object at every pixel, which was 100 % of a single class
    evaluator = MeanIoU(dataset.classes)
    evaluator.update(Segmentation(everywhere, (24, 40), (24, 40)), target)
    assert evaluator.compute()["mIoU"] == pytest.approx(OBJECT.mean() / 2)
    guess = np.random.default_rng(1).random(OBJECT.shape) < 0.5
    scores = torch.from_numpy(np.stack([~guess, guess]).astype(np.float32))
    evaluator.reset()
    evaluator.update(Segmentation(scores, (24, 40), (24, 40)), target)
    ious = [(guess & OBJECT).sum() / (guess | OBJECT).sum(), (~guess & ~OBJECT).sum() / (~guess | ~OBJECT).sum()]
    assert evaluator.compute()["mIoU"] == pytest.approx(np.mean(ious))


@pytest.mark.parametrize(
    ("values", "options"),
    [
        (np.where(VOID, 255, OBJECT), PLAIN),
        (np.where(VOID, 11, OBJECT), {**PLAIN, "ignore_index": 11}),
        (np.where(VOID, 9, OBJECT), {**PLAIN, "ignore_index": [9, 11]}),
        (np.where(VOID, 0, OBJECT + 1), {"num_classes": 2}),
        (np.where(VOID, 255, OBJECT * 7), {"label_map": [0, 7]}),
        (np.where(VOID, 0, OBJECT + 1), {"label_map": [1, 2], "ignore_index": 0}),
        (np.where(VOID, 3, OBJECT + 1), {"label_map": [1, 2, 3], "ignore_index": 3}),
    ],
)
def test_what_is_ignored_is_not_labeled(tmp_path: Path, values: np.ndarray, options: dict[str, Any]) -> None:
    dataset = source(write(tmp_path, Image.fromarray(values.astype(np.uint8))), **options).open("train")
    semantic = dataset[0][1]["semantic"].numpy()
    assert np.array_equal(semantic, np.where(VOID, 0, OBJECT + 1)) and len(dataset.classes) == 2


def test_colors_that_are_ignored(tmp_path: Path) -> None:
    pixels = COLORS[OBJECT.astype(int)]
    pixels[VOID] = 1, 2, 3
    options = {"label_map": COLORS.tolist(), "ignore_index": [[1, 2, 3]]}
    dataset = source(write(tmp_path, Image.fromarray(pixels)), **options).open("train")
    assert np.array_equal(dataset[0][1]["semantic"].numpy(), np.where(VOID, 0, OBJECT + 1))
    line = refusal(lambda: source(tmp_path, label_map=COLORS.tolist()).open("train")[0])
    assert "[1,2,3] (12 % of the pixels) are not in dataset.label_map" in line
    assert "gives" not in line and "values, not colors" in refusal(
        lambda: source(tmp_path, **PLAIN, ignore_index=[[1, 2, 3]]).open("train")
    )


FILES = {
    "labelmap.txt": "# label:color_rgb:parts:actions\nground:7,0,0::\nbird:250,20,60::\n",
    "label_colors.txt": "7 0 0\tground\n250 20 60\tbird\n",
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_colors(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name])
    data = source(write(tmp_path, MASKS["colors"][0]), label_map=name).open("train")
    assert data.classes == ["ground", "bird"] and np.array_equal(data[0][1]["semantic"].numpy(), OBJECT + 1)
    assert "cannot be read" in refusal(lambda: source(tmp_path, label_map="x.txt").open("train"))


def test_a_file_of_values_in_which_classes_are_merged(tmp_path: Path) -> None:
    (tmp_path / "_classes.csv").write_text("Pixel Value, Class\n0, ground\n1, bird\n2, ground\n")
    values = np.where(VOID & ~OBJECT, 2, OBJECT).astype(np.uint8)
    data = source(write(tmp_path, Image.fromarray(values)), label_map="_classes.csv").open("train")
    assert data.classes == ["ground", "bird"] and np.array_equal(data[0][1]["semantic"].numpy(), OBJECT + 1)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("0 and 1", {"num_classes": 1}, "dataset.reduce_zero_label=false dataset.num_classes=2"),
        ("0 and 1", {"num_classes": 2}, "dataset.reduce_zero_label=false dataset.num_classes=2"),
        ("one bit", {"num_classes": 1}, "dataset.reduce_zero_label=false dataset.num_classes=2"),
        ("0 and 255", {"num_classes": 1}, "dataset.label_map=[0,255] dataset.num_classes=2"),
        ("0 and 255", PLAIN, "dataset.label_map=[0,255] dataset.num_classes=2"),
        ("0 and 255", {"num_classes": 2}, "no pixel of the 3 masks is labeled"),
        ("1 and 2", {"label_map": [1, 3], "ignore_index": 2}, "are of one class, class 1"),
    ],
)
def test_too_few_classes_are_refused_with_a_remedy(
    tmp_path: Path, name: str, options: dict[str, Any], says: str
) -> None:
    made = source(write(tmp_path, *[MASKS[name][0]] * 3), **options)
    assert says in refusal(lambda: made.open("train"))
    report = made.check("train")
    assert [issue.type for issue in report.problems] == ["nothing to learn"]
    assert says in str(report.problems[0].locations[0])


def test_a_class_in_one_mask_of_many_is_found(tmp_path: Path) -> None:
    masks = [Image.new("L", (5, 5))] * 40
    masks[33] = Image.new("L", (5, 5), 1)
    assert len(source(write(tmp_path, *masks), **PLAIN).open("train")) == 40


def test_many_unlabeled_pixels_give_a_warning(tmp_path: Path) -> None:
    values = OBJECT * np.where(VOID, 1, 2).astype(np.uint8)
    [note] = source(write(tmp_path, Image.fromarray(values)), num_classes=2).open("train").notes
    assert f"{100 * (~OBJECT).mean():.0f} % of the pixels are 0" in note
    assert "dataset.reduce_zero_label=false dataset.num_classes=3" in note
    assert source(tmp_path, reduce_zero_label=False, num_classes=3).open("train").notes == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_classes": None}, "dataset.num_classes=null: set it"),
        ({"num_classes": 300, "ignore_index": 255}, "255 is also a class"),
        ({"num_classes": 3, "label_map": [0, 1]}, "set dataset.num_classes=2"),
        ({"label_map": [0, 0]}, "duplicate entry"),
        ({"label_map": [0, [1, 2, 3]]}, "whole numbers from 0, or colors"),
        ({"label_map": [[0, 0, 256]]}, "whole numbers from 0, or colors"),
        ({"label_map": 7}, "set it to the value or color of each class"),
        ({"ignore_index": "void"}, "neither a value nor a color"),
    ],
)
def test_invalid_options(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    given = {"num_classes": None, "reduce_zero_label": False, "ignore_index": None, "label_map": None, **options}
    assert says in refusal(lambda: label_encoding(**given, root=tmp_path))


def test_the_number_of_classes_comes_from_the_names(tmp_path: Path) -> None:
    write(tmp_path, MASKS["1 and 2"][0])
    (tmp_path / "classes.txt").write_text("ground\nbird\n")
    assert source(tmp_path).open("train").classes == ["ground", "bird"]
