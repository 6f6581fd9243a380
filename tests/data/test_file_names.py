"""Names that nearly match: taken where one file alone can be meant, named where one is likely, all of them at once."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from e3va_cli.data import build_datasets
from e3va_cli.data.file_names import match_stems, resolve_names
from e3va_cli.data.formats.ade20k import Ade20kFormat
from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.voc import VocFormat
from e3va_cli.data.validation.coco import check_coco_file
from e3va_cli.errors import UserError
from tests.data.validation.damages import sheet, thing

SUFFIXES = {".jpg", ".png"}


def made(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("listed", "file"),
    [
        ("sub\\a.jpg", "sub/a.jpg"),
        ("sub/A.JPG", "sub/a.jpg"),
        ("a%20photo%20(1).jpg", "a photo (1).jpg"),
        ("sub%2Fa.jpg", "sub/a.jpg"),
        (unicodedata.normalize("NFD", "größe.jpg"), unicodedata.normalize("NFC", "größe.jpg")),
        (unicodedata.normalize("NFC", "größe.jpg"), unicodedata.normalize("NFD", "größe.jpg")),
        ("train/images/a.jpg", "images/a.jpg"),
        ("images/images/a.jpg", "images/a.jpg"),
        ("a.jpg", "images/deep/a.jpg"),
        ("C:\\data\\sub\\a.jpg", "sub/a.jpg"),
        ("./x/../a.JPG", "a.jpg"),
    ],
)
def test_unambiguous_names_are_resolved(tmp_path: Path, listed: str, file: str) -> None:
    made(tmp_path, file, "other.jpg", "notes.txt")
    found = resolve_names(tmp_path, [listed, "other.jpg"], SUFFIXES)
    assert found.resolved == {listed: file} and not found.missing


@pytest.mark.parametrize(
    ("listed", "files", "likely"),
    [
        (["A.jpg"], ["a.jpg", "a.JPG"], "a.JPG"),
        (["x/a.jpg"], ["y/a.jpg"], "y/a.jpg"),
        (["x/a.jpg", "y/a.jpg"], ["a.jpg"], "a.jpg"),
        (["sub/a.jpg", "a.jpg"], ["a.jpg"], "a.jpg"),
        (["photo_0001.jpg"], ["photo_0001.png"], "photo_0001.png"),
        (["photo_1.jpg"], ["photo_01.jpg"], "photo_01.jpg"),
        (["photo.jpg"], ["something else entirely.jpg"], None),
        (["a.jpg"], [], None),
    ],
)
def test_ambiguous_names_have_a_suggestion(
    tmp_path: Path, listed: list[str], files: list[str], likely: str | None
) -> None:
    found = resolve_names(made(tmp_path, *files), listed, SUFFIXES)
    assert not found.resolved and set(found.missing.values()) == {likely}


def test_files_outside_the_folder_are_not_searched(tmp_path: Path) -> None:
    made(tmp_path, "outside/a.jpg", "data/b.jpg")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "outside")
    names = ["../outside/a.jpg", "..\\outside\\a.jpg", str(tmp_path / "outside" / "a.jpg"), "link/a.jpg"]
    found = resolve_names(tmp_path / "data", names, SUFFIXES)
    assert not found.resolved and list(found.missing) == ["..\\outside\\a.jpg"]


def test_all_missing_files_at_once_before_the_first_step(
    write_coco: Callable[..., tuple[Path, Path]], annotate: Any
) -> None:
    images = [{"id": n, "file_name": f"photo_{n}.jpg", "width": 40, "height": 30} for n in range(100, 130)]
    folder, file = write_coco([annotate(1, [2, 3, 10, 20], image_id=100)], images=images)
    made(folder, "photo-100.jpg", "photo_129.jpg")
    with pytest.raises(UserError) as caught:
        open_coco(folder, file)
    [line] = caught.value.messages
    assert f"no such image: 29 of 30 are not in {folder}" in line and "(perhaps photo-100.jpg)" in line
    assert "photo_109.jpg" in line and "and 19 more" in line and "\n" not in line
    [missing] = [one for one in check_coco_file(folder, file).problems if one.type == "missing image"]
    assert missing.count == 29 and "perhaps photo-100.jpg" in str(missing.locations[0])


def test_images_are_read_under_their_names_on_disk(write_coco: Callable[..., tuple[Path, Path]], annotate: Any) -> None:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20]), annotate(2, [2, 3, 9, 9], image_id=5, category_id=7)])
    content = json.loads(file.read_text())
    content["images"][0]["file_name"], content["images"][1]["file_name"] = "images/A.PNG", "sub\\b%2Ejpg"
    other = file.with_name("other.json")
    other.write_text(json.dumps(content))
    plain, data = open_coco(folder, file), open_coco(folder, other)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(plain, data, strict=True))
    report = check_coco_file(folder, other)
    assert report.ok and [(one.type, one.count) for one in report.notes] == [
        ("file name differs from the listed one", 2)
    ]
    assert "images/A.PNG, a.png is used" in str(report.notes[0].locations[0])


@pytest.mark.parametrize("lines", ["a.jpg\nB\n", "JPEGImages/a.jpg\nb.JPG\n", "JPEGImages\\a\nb%2Exml\n", "a\nb\n"])
def test_lists_of_voc(tmp_path: Path, lines: str) -> None:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)
    for name, suffix in (("a", "xml"), ("b", "XML")):
        Image.new("RGB", (40, 30)).save(tmp_path / f"VOC2007/JPEGImages/{name}.jpg")
        (tmp_path / f"VOC2007/Annotations/{name}.{suffix}").write_text(sheet(thing()))
    (tmp_path / "VOC2007/ImageSets/Main/train.txt").write_text(lines.replace("%2Exml", ""))
    data = VocFormat(str(tmp_path), "train", "train", None).open("train")
    assert len(data) == 2 and [len(target["boxes"]) for _, target in data] == [1, 1]


@pytest.mark.parametrize(
    ("images", "labels", "matched"),
    [
        (["a", "b"], ["a", "b", "c"], {"a": "a", "b": "b"}),
        (["A", "b"], ["a", "b"], {"A": "a", "b": "b"}),
        (["a", "b"], ["a_mask", "b_mask"], {"a": "a_mask", "b": "b_mask"}),
        (["1", "11"], ["1_gt", "11_gt"], {"1": "1_gt", "11": "11_gt"}),
        (["a", "b"], ["a_mask", "b_seg"], {}),
        (["a", "b"], ["a_mask", "a_edge", "b_mask", "b_edge"], {}),
        (["a", "A"], ["ä"], {}),
        (["a"], ["A", "a "], {"a": "A"}),
    ],
)
def test_masks_are_matched_to_images(images: list[str], labels: list[str], matched: dict[str, str]) -> None:
    assert match_stems(images, labels) == matched


def test_masks_with_an_ending(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        Image.new("RGB", (3, 2)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8)).save(tmp_path / "labels" / f"{name}_mask.png")
    folders = {f"{split}_{kind}": kind for split in ("train", "val") for kind in ("images", "labels")}
    source = Ade20kFormat(root=str(tmp_path), num_classes=2, classes=None, **folders)
    assert source.open("train")[1][1]["semantic"].tolist() == [[0, 1, 2], [2, 1, 0]]
    assert "semantic mask name differs from its image" in [note.type for note in source.check("train").notes]
    (tmp_path / "labels" / "b_mask.png").rename(tmp_path / "labels" / "b_gt.png")
    with pytest.raises(
        UserError, match=r"a\.jpg \(and 1 more\) has no semantic mask a\.png .* \(perhaps a_mask\.png\)"
    ):
        source.open("train")


def test_problems_of_both_splits_in_one_report(tmp_path: Path, config: Any) -> None:
    category = [{"id": 1, "name": "cat"}]
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        images = [{"id": 1, "file_name": f"{split}.jpg", "width": 4, "height": 3}]
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2]}
        content = {"images": images, "annotations": [box], "categories": category}
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    words = ["dataset=coco", f"dataset.root={tmp_path}"]
    words += [f"dataset.{split}_{kind}" for split in ("train", "val") for kind in (f"images={split}",)]
    words += [f"dataset.{split}_annotations={split}.json" for split in ("train", "val")]
    with pytest.raises(UserError) as caught:
        build_datasets(config(*words).dataset, targets={"boxes"})
    assert ["train.jpg" in caught.value.messages[0], "val.jpg" in caught.value.messages[1]] == [True, True]
    with pytest.raises(UserError) as caught:
        build_datasets(replace(config(*words).dataset, root=str(tmp_path / "nowhere")))
    assert len(caught.value.messages) == 1, "what both have in common is said once"
