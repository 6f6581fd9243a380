import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from e3va_cli.data.formats.ade20k import SegmentationDataset
from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.label_encoding import LabelEncoding
from e3va_cli.data.images.formats import IMAGE_SUFFIXES, describe_unsupported, unsupported_format
from e3va_cli.data.images.reading import read_image, read_raw
from e3va_cli.data.validation.semantic_masks import check_semantic_masks
from e3va_cli.errors import UserError
from e3va_cli.inference.image_inputs import find_images

WITHOUT_HEIF = pytest.mark.skipif(".heic" in IMAGE_SUFFIXES, reason="pillow-heif is installed")
FTYP = b"\0\0\0\x18ftyp"


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content + bytes(64))
    return path


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        pytest.param("a.jpg", FTYP + b"heic\0\0\0\0mif1heic", "HEIC", marks=WITHOUT_HEIF),
        pytest.param("a", FTYP + b"mif1\0\0\0\0heicmif1", "HEIC", marks=WITHOUT_HEIF),
        ("a.png", b"\xff\x0a", "JPEG XL"),
        ("a.jpg", b"8BPS\0\1", "Photoshop"),
        ("a.png", b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'>", "SVG"),
        ("a.NEF", b"II*\0", "raw camera"),
        ("a.tga", b"", "TGA"),
        ("a.jpg", b"no image", None),
    ],
)
def test_format_by_content_then_by_suffix(tmp_path, name, content, kind):
    path = write(tmp_path / name, content)
    assert unsupported_format(path) == kind
    with pytest.raises(UserError, match=f"{kind} files are not supported; .*convert" if kind else "unsupported format"):
        read_raw(path)


def test_a_raw_photo_is_not_its_preview(tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "a.nef", format="TIFF")
    with pytest.raises(UserError, match="raw camera"):
        read_raw(tmp_path / "a.nef")


def test_a_jpeg_is_read_whatever_it_is_called(tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "a.heic", format="JPEG")
    Image.new("RGB", (16, 12)).save(tmp_path / "a.dng", format="JPEG")
    assert read_image(tmp_path / "a.heic").shape == read_image(tmp_path / "a.dng").shape == (3, 12, 16)


@pytest.mark.skipif(".avif" not in IMAGE_SUFFIXES, reason="a Pillow without AVIF")
def test_avif_is_read(tmp_path):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12] = (200, 40, 90)
    Image.fromarray(pixels).save(tmp_path / "a.avif", quality=100)
    assert features.check("avif")
    error = (read_image(tmp_path / "a.avif").int() - torch.from_numpy(pixels).permute(2, 0, 1).int()).abs()
    assert error.float().mean() < 3
    assert find_images([str(tmp_path)]) == [tmp_path / "a.avif"]


@pytest.mark.skipif(".heic" not in IMAGE_SUFFIXES, reason="no pillow-heif")
def test_heic_is_read(tmp_path):
    Image.new("RGB", (64, 48), (200, 40, 90)).save(tmp_path / "a.heic", quality=95)
    assert read_image(tmp_path / "a.heic").shape == (3, 48, 64)


def test_unsupported_files_are_described():
    told = describe_unsupported(["b.psd", "e.JXL", "a.jxl", "c.jxl", "d.jxl", "x.jpg", "y.txt"])
    assert told == (
        "4 JPEG XL files that cannot be read (a.jxl, c.jxl, d.jxl and 1 more): convert them to JPEG or PNG; "
        "1 Photoshop file that cannot be read (b.psd): convert them to JPEG or PNG"
    )
    assert describe_unsupported(["x.jpg", "y.txt"]) == ""


@WITHOUT_HEIF
def test_heic_has_a_remedy():
    assert "pip install pillow-heif" in describe_unsupported(["IMG_1.HEIC"])


def test_unsupported_images_in_a_folder_are_refused(tmp_path):
    write(tmp_path / "a.jxl", b"\xff\x0a")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"1 JPEG XL file that cannot be read \(a.jxl\): convert"):
        find_images([str(tmp_path)])
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    assert find_images([str(tmp_path)]) == [tmp_path / "a.jxl", tmp_path / "b.png"]


def test_coco_with_unsupported_images_is_refused(tmp_path):
    write(tmp_path / "a.jxl", b"\xff\x0a")
    content = {
        "images": [{"id": 1, "file_name": "a.jxl", "width": 8, "height": 8}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 4, 4], "area": 16, "iscrowd": 0}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lists 1 JPEG XL file that cannot be read \(a.jxl\)"):
        open_coco(tmp_path, tmp_path / "a.json")


@pytest.fixture
def pairs(tmp_path):
    """Two images with semantic masks, one of them of a format that is not read."""
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    write(tmp_path / "images" / "b.jxl", b"\xff\x0a")
    for stem in "ab":
        Image.fromarray(np.array([[1, 2]] * 4, np.uint8).repeat(4, 1).repeat(2, 0)).save(
            tmp_path / "labels" / f"{stem}.png"
        )
    return tmp_path / "images", tmp_path / "labels"


def test_unsupported_images_beside_masks_are_reported(pairs):
    encoding = LabelEncoding({1: 1, 2: 2}, [1, 2], from_one=True)
    dataset = SegmentationDataset(*pairs, classes=["cat", "dog"], encoding=encoding)
    assert len(dataset) == 1
    assert any("without 1 JPEG XL file that cannot be read (b.jxl)" in note for note in dataset.notes)
    report = check_semantic_masks(*pairs, classes=["cat", "dog"], encoding=encoding)
    [problem] = report.problems
    assert problem.type == "unsupported image format" and problem.count == 1
