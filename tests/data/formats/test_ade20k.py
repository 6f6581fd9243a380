from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from e3va_cli.data.formats.ade20k import Ade20kFormat
from e3va_cli.data.formats.label_encoding import label_encoding
from e3va_cli.data.validation.issues import Issue
from e3va_cli.data.validation.semantic_masks import check_semantic_masks
from e3va_cli.errors import UserError
from tests.components import options_of

FOLDERS = {
    "train_images": "images/training",
    "train_labels": "annotations/training",
    "val_images": "images/validation",
    "val_labels": "annotations/validation",
}
Add = Callable[..., tuple[Path, Path]]


def source(root: Path, num_classes: int | None = 3, classes: Any = None, **options: Any) -> Ade20kFormat:
    return Ade20kFormat(root=str(root), num_classes=num_classes, classes=classes, **{**FOLDERS, **options})


def labels_of(*rows: list[int], dtype: type = np.uint8) -> np.ndarray:
    return np.array(rows, dtype=dtype)


PLAIN = labels_of([0, 1, 2], [3, 3, 1])


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Adds an image and its semantic mask to a split; what is None is left out."""

    def write(
        name: str,
        labels: np.ndarray | Image.Image | None = PLAIN,
        *,
        size: tuple[int, int] | None = (3, 2),
        **keys: Any,
    ) -> tuple[Path, Path]:
        split, suffix = keys.get("split", "training"), keys.get("suffix", "png")
        images, maps = tmp_path / "images" / split, tmp_path / "annotations" / split
        images.mkdir(parents=True, exist_ok=True)
        maps.mkdir(parents=True, exist_ok=True)
        if size:
            pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{name}.{suffix}")
        if labels is not None:
            (Image.fromarray(labels) if isinstance(labels, np.ndarray) else labels).save(maps / f"{name}.png")
        return images, maps

    return write


def refusal(root: Path, index: int | None = None, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        dataset = source(root, **keys).open("train", None)
        if index is not None:
            dataset[index]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_images_and_masks(add: Add, tmp_path: Path) -> None:
    add("b", labels_of([1, 1, 1], [2, 2, 0]))
    images, _ = add("a")
    dataset = source(tmp_path).open("train", None)
    assert len(dataset) == 2
    assert dataset.classes == ["class 1", "class 2", "class 3"]
    assert dataset.category_ids == [1, 2, 3]
    assert (dataset.dropped, dataset.target_types) == ({}, {"semantic"})
    image, target = dataset[0]
    assert type(image) is tv_tensors.Image and image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(Image.open(images / "a.png")))
    assert type(target["semantic"]) is tv_tensors.Mask and target["semantic"].dtype == torch.int16
    assert target["semantic"].tolist() == PLAIN.tolist()
    assert (target["image_id"], target["original_size"]) == (1, (2, 3))
    assert dataset[1][1]["semantic"].tolist() == [[1, 1, 1], [2, 2, 0]]
    assert dataset[1][1]["image_id"] == 2


def test_transforms_are_called_with_both(add: Add, tmp_path: Path) -> None:
    add("a")
    dataset = source(tmp_path).open("train", lambda image, target: (image + 1, {**target, "seen": True}))
    assert dataset[0][1]["seen"]


def test_palette_indices_are_the_labels(add: Add, tmp_path: Path) -> None:
    picture = Image.fromarray(PLAIN)
    picture = picture.convert("P")
    picture.putdata(PLAIN.ravel().tolist())
    picture.putpalette([7, 7, 7, 250, 0, 0, 9, 9, 250, 0, 250, 0])
    _, maps = add("a", picture)
    assert Image.open(maps / "a.png").mode == "P"
    assert source(tmp_path).open("train", None)[0][1]["semantic"].tolist() == PLAIN.tolist()


def test_sixteen_bits(add: Add, tmp_path: Path) -> None:
    add("a", labels_of([0, 300, 2], [299, 1, 1], dtype=np.uint16))
    semantic = source(tmp_path, num_classes=300).open("train", None)[0][1]["semantic"]
    assert semantic.dtype == torch.int16 and semantic.tolist() == [[0, 300, 2], [299, 1, 1]]
    assert "the largest label is 300, of 299 classes; set dataset.num_classes=300" in refusal(
        tmp_path, 0, num_classes=299
    )


@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "png", "bmp", "webp"])
def test_common_image_formats_and_other_files(add: Add, tmp_path: Path, suffix: str) -> None:
    images, maps = add("a.b", suffix=suffix)
    for junk in (images / "._a.b.jpg", images / "Thumbs.db", maps / "._a.b.png", maps / "readme.txt"):
        junk.write_text("nothing")
    (images / "folder.png").mkdir()
    dataset = source(tmp_path).open("train", None)
    assert len(dataset) == 1 and dataset[0][0].shape == (3, 2, 3)


def test_mask_in_colors(add: Add, tmp_path: Path) -> None:
    _, maps = add("a", Image.new("RGB", (3, 2)))
    line = refusal(tmp_path, 0)
    assert f"{maps / 'a.png'}: an image of mode RGB, not one number per pixel; save it as a PNG of mode L or P" in line


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_other_modes_are_refused(add: Add, tmp_path: Path, mode: str) -> None:
    add("a", Image.new(mode, (3, 2)))
    assert f"mode {mode}, not one number per pixel" in refusal(tmp_path, 0)


def test_label_above_the_number_of_classes(add: Add, tmp_path: Path) -> None:
    _, maps = add("a", labels_of([0, 1, 7], [5, 0, 0]))
    line = refusal(tmp_path, 0)
    assert f"{maps / 'a.png'}: the largest label is 7, of 3 classes; set dataset.num_classes=7 if" in line
    add("a", labels_of([255, 1, 2], [0, 0, 0]))
    line = refusal(tmp_path, 0, ignore_index=254)
    assert "the largest label is 255, of 3 classes; if 255 is unlabeled, set dataset.ignore_index=255" in line


def test_size_of_the_mask(add: Add, tmp_path: Path) -> None:
    _, maps = add("a", size=(2, 3))
    assert f"{maps / 'a.png'}: the semantic mask has 3x2 pixels, its image 2x3" in refusal(tmp_path, 0)


def test_missing_mask(add: Add, tmp_path: Path) -> None:
    images, maps = add("a", None)
    add("b", None)
    add("c")
    line = refusal(tmp_path)
    assert f"{images / 'a.png'} (and 1 more) has no semantic mask a.png in {maps}; add it" in line


def test_broken_files(add: Add, tmp_path: Path) -> None:
    images, maps = add("a")
    content = (maps / "a.png").read_bytes()
    (maps / "a.png").write_bytes(content[:40])
    assert f"cannot read the image {maps / 'a.png'}" in refusal(tmp_path, 0)
    (maps / "a.png").write_bytes(content)
    (images / "a.png").write_text("an HTML page, say")
    assert f"cannot read the image {images / 'a.png'}" in refusal(tmp_path, 0)


def test_two_files_of_one_name(add: Add, tmp_path: Path) -> None:
    images, _ = add("a")
    add("a", suffix="jpg")
    assert f"{images}: a.jpg and a.png" in refusal(tmp_path)


def test_missing_folders(add: Add, tmp_path: Path) -> None:
    assert "no such data root" in refusal(tmp_path / "elsewhere")
    images, _ = add("a")
    with pytest.raises(UserError) as caught:
        source(tmp_path).open("val", None)
    one, two = caught.value.messages
    assert f"no such folder: {tmp_path / 'images/validation'}; {tmp_path / 'images'} contains training/" in one
    assert "annotations/validation" in two
    (images / "a.png").unlink()
    (images / "readme.txt").touch()
    assert f"no images in {images}; {images} contains readme.txt" in refusal(tmp_path)


@pytest.mark.parametrize("folder", ["../other", "images/../../other", "/tmp"])
def test_folders_outside_the_root_are_refused(add: Add, tmp_path: Path, folder: str) -> None:
    add("a")
    (tmp_path.parent / "other").mkdir(exist_ok=True)
    for key in ("train_images", "train_labels"):
        assert f"dataset.{key}={folder} is outside dataset.root={tmp_path}" in refusal(tmp_path, **{key: folder})


def test_the_parent_folder_is_accepted(add: Add, tmp_path: Path) -> None:
    add("a", split="validation")
    (tmp_path / "ADEChallengeData2016").mkdir()
    for folder in ("images", "annotations"):
        (tmp_path / folder).rename(tmp_path / "ADEChallengeData2016" / folder)
    (tmp_path / "ADEChallengeData2016/classes.txt").write_text("wall\ndoor\nsky\n")
    assert source(tmp_path).open("val", None).classes == ["wall", "door", "sky"]
    with pytest.raises(UserError, match="ADEChallengeData2016/images contains validation/"):
        source(tmp_path).open("train", None)


@pytest.mark.parametrize("file", ["objectInfo150.txt", "classes.txt", "names.txt"])
def test_class_names_from_the_root(add: Add, tmp_path: Path, file: str) -> None:
    add("a")
    (tmp_path / file).write_text("sky\nroad\ncar\n")
    assert source(tmp_path).open("train", None).classes == ["sky", "road", "car"]
    assert source(tmp_path, classes=["x", "y", "z"]).open("train", None).classes == ["x", "y", "z"]
    (tmp_path / "mine").write_text("p\nq\nr")
    assert source(tmp_path, classes=str(tmp_path / "mine")).open("train", None).classes == ["p", "q", "r"]


def test_another_number_of_names(add: Add, tmp_path: Path) -> None:
    add("a")
    line = refusal(tmp_path, classes=["x", "y"])
    assert "dataset.classes names 2 classes, dataset.num_classes is 3; set dataset.num_classes=2" in line
    (tmp_path / "names.txt").write_text("sky\nroad\ncar\ntree\n")
    assert f"{tmp_path / 'names.txt'} names 4 classes, dataset.num_classes is 3" in refusal(tmp_path)


def counts(issues: list[Issue]) -> dict[str, int]:
    return {issue.type: issue.count for issue in issues}


def location(issues: list[Issue], kind: str) -> str:
    [issue] = [issue for issue in issues if issue.type == kind]
    return str(issue.locations[0])


def test_check_of_a_valid_split(add: Add, tmp_path: Path) -> None:
    for name in "abc":
        images, _ = add(name)
    seen: list[tuple[int, int]] = []
    report = source(tmp_path).check("train", lambda done, total: seen.append((done, total)))
    assert report.ok and not report.notes
    assert report.source == str(images)
    assert report.totals == {
        "images": 3,
        "semantic masks": 3,
        "classes": 3,
        "labeled pixels": 15,
        "unlabeled pixels": 3,
    }
    assert report.per_class == {"class 1": 6, "class 2": 3, "class 3": 6} and report.unit == "pixels"
    assert seen == [(3, 3)]


def test_every_problem_at_once(add: Add, tmp_path: Path) -> None:
    add("sound", labels_of([1, 1, 0], [1, 1, 1]))
    add("without", None)
    add("lonely", size=None)
    add("colours", Image.new("RGB", (3, 2), (1, 1, 1)))
    add("turned", size=(2, 3))
    add("above", labels_of([1, 9, 5], [7, 0, 0]))
    add("more", labels_of([4, 0, 0], [0, 0, 0]), size=(4, 4))
    add("void", np.zeros((2, 3), np.uint8))
    add("twice")
    add("twice", suffix="jpg")
    images, maps = add("truncated")
    add("page")
    (maps / "truncated.png").write_bytes((maps / "truncated.png").read_bytes()[:40])
    (images / "page.png").write_text("an HTML page, say")
    report = source(tmp_path, classes=["one", "two", "three"]).check("train")
    assert counts(report.problems) == {
        "several images of the same name": 1,
        "missing semantic mask": 1,
        "label above the number of classes": 2,
        "semantic mask in colors": 1,
        "size mismatch": 2,
        "unreadable image": 1,
        "unreadable semantic mask": 1,
    }
    assert counts(report.notes) == {
        "semantic mask without an image": 1,
        "image without labeled pixels": 1,
        "unlabeled pixels": 1,
    }
    assert location(report.problems, "label above the number of classes").startswith(
        "above.png, the largest label is 9"
    )
    assert location(report.problems, "missing semantic mask").startswith("without.png, no without.png in ")
    assert location(report.problems, "unreadable semantic mask").startswith("truncated.png, cannot read")
    assert location(report.problems, "unreadable image").startswith("page.png, cannot read")
    assert location(report.problems, "several images of the same name") == "twice.jpg, twice.png"
    assert location(report.notes, "image without labeled pixels") == "void.png"
    assert location(report.notes, "semantic mask without an image") == "lonely.png"
    # sound 5 of class 1; above 1; turned, twice and page 2, 1 and 2 of each class
    assert report.per_class == {"one": 5 + 1 + 3 * 2, "two": 3, "three": 3 * 2}
    assert (report.totals["images"], report.totals["semantic masks"]) == (10, 10)


def test_classes_without_any_pixel(add: Add) -> None:
    images, maps = add("a", labels_of([0, 1, 1], [3, 3, 3]))
    encoding = label_encoding(
        num_classes=4, reduce_zero_label=True, ignore_index=None, label_map=None, root=images.parent
    )
    report = check_semantic_masks(images, maps, ["sky", "road", "car", "tree"], encoding)
    assert report.ok and counts(report.notes) == {"class without pixels": 2}
    assert location(report.notes, "class without pixels") == "road (label 2)"


def test_check_of_missing_folders_and_wrong_names(add: Add, tmp_path: Path) -> None:
    add("a")
    assert counts(source(tmp_path).check("val").problems) == {
        "no such folder of images": 1,
        "no such folder of semantic masks": 1,
    }
    report = source(tmp_path, classes=["x"]).check("train")
    assert counts(report.problems) == {"invalid class names": 1} and next(iter(report.per_class)) == "class 1"
    (tmp_path / "images/training/a.png").unlink()
    assert counts(source(tmp_path).check("train").problems) == {"folder without images": 1}


def test_the_registry_builds_both_from_the_same_keys(add: Add, tmp_path: Path) -> None:
    add("a")
    config = {
        "name": "ade20k",
        "metric": "miou",
        "root": str(tmp_path),
        "num_classes": 3,
        "classes": None,
        "short_side": 8,
        "max_size": 64,
        "scales": [1.0, 1.0],
        "crop_size": 8,
        "cat_max_ratio": 1.0,
        "flip": 0.0,
        "photometric_distortion": True,
        **FOLDERS,
    }
    made = options_of("dataset", **config)
    image, target = made.open("train", made.train_transforms())[0]
    assert image.shape == (3, 8, 8) and target["semantic"].shape == (8, 8)


def test_camvid(real_data: Callable[[str], Path]) -> None:
    root = real_data("camvid_small")
    dataset = source(root, num_classes=11).open("val", None)
    assert len(dataset) == 15 and dataset.classes[0] == "sky" and dataset.classes[10] == "bicyclist"
    report = source(root, num_classes=11).check("val")
    assert report.ok
    pixels = sum(torch.bincount(target["semantic"].flatten().int(), minlength=12) for _, target in dataset)
    assert list(report.per_class.values()) == pixels[1:].tolist()
    assert report.totals["unlabeled pixels"] == pixels[0]
    image, target = dataset[0]
    assert image[2][target["semantic"] == 1].float().mean() > image[2][target["semantic"] == 4].float().mean()


def test_ade20k(real_data: Callable[[str], Path]) -> None:
    root = real_data("ade_sample")
    dataset = source(root, num_classes=150).open("val", None)
    assert len(dataset) == 3 and dataset.classes[:3] == ["wall", "building", "sky"]
    image, target = dataset[2]
    assert image.shape == (3, 300, 400) and target["semantic"].max() == 103
    assert source(root, num_classes=150).check("val").ok
    assert "invalid class names" in counts(source(root, num_classes=11).check("val").problems)
