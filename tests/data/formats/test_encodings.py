"""Names in annotation files of any encoding, as Python's codecs read them; values as the tools that write them mean."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from e3va_cli.config.composition import validate_overrides
from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.text_encodings import decode_text, decode_xml
from e3va_cli.data.formats.voc import VocFormat
from e3va_cli.errors import UserError

NAMES = {
    "gbk": "黑熊",
    "gb2312": "黑熊",
    "big5": "黑熊",
    "shift_jis": "くま",
    "euc-kr": "곰",
    "windows-1251": "медведь",
    "koi8-r": "медведь",
    "iso-8859-1": "Bär",
    "iso-8859-2": "niedźwiedź",
    "windows-1254": "ağaç",
    "utf-8": "黑熊 медведь Bär",
    "utf-16": "黑熊",
}


def sheet(name: str, declared: str | None = None, more: str = "") -> str:
    head = f'<?xml version="1.0" encoding="{declared}"?>\n' if declared else ""
    box = "<bndbox><xmin>3</xmin><ymin>4</ymin><xmax>12</xmax><ymax>23</ymax></bndbox>"
    size = "<size><width>40</width><height>30</height></size>"
    return f"{head}<annotation>{more}{size}<object><name>{name}</name>{box}</object></annotation>"


def write(root: Path, content: bytes) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / "VOC2007" / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(root / "VOC2007/JPEGImages/a.jpg")
    (root / "VOC2007/Annotations/a.xml").write_bytes(content)
    for split in ("train", "val"):
        (root / f"VOC2007/ImageSets/Main/{split}.txt").write_text("a\n")
    return root


def classes(root: Path, **options: Any) -> list[str]:
    return VocFormat(str(root), None, None, None, **options).open("train").classes


@pytest.mark.parametrize("encoding", NAMES)
def test_the_declared_encoding_is_read(tmp_path: Path, encoding: str) -> None:
    name = NAMES[encoding]
    content = sheet(name, encoding).encode(encoding)
    assert codecs.decode(content, encoding).count(name) == 1
    assert classes(write(tmp_path, content)) == [name]
    if encoding in (
        "windows-1251",
        "koi8-r",
        "iso-8859-2",
        "utf-8",
        "utf-16",
    ):  # what the standard library's parser reads
        assert ElementTree.fromstring(content).findtext("object/name") == name


@pytest.mark.parametrize("encoding", ["gbk", "windows-1251", "iso-8859-1"])
def test_an_undeclared_encoding_is_refused_until_it_is_given(tmp_path: Path, encoding: str) -> None:
    root = write(tmp_path, sheet(NAMES[encoding]).encode(encoding))
    with pytest.raises(UserError, match=r"a\.xml: annotation file of an unknown encoding.*dataset\.encoding"):
        classes(root)
    source = VocFormat(str(root), None, None, None)
    assert [problem.type for problem in source.check("train").problems] == ["annotation file of an unknown encoding"]
    assert classes(root, encoding=encoding) == [NAMES[encoding]]


@pytest.mark.parametrize("declared", [None, "utf-8"])
def test_undecodable_bytes_outside_names_are_ignored(tmp_path: Path, declared: str | None) -> None:
    """The owners of VOC's photos have names in latin-1."""
    owner = "<owner><name>Vázquez</name></owner>"
    assert classes(write(tmp_path, sheet("bear", declared, owner).encode("latin-1"))) == ["bear"]


def test_utf_8_wins_over_the_given_encoding(tmp_path: Path) -> None:
    assert classes(write(tmp_path, sheet("медведь").encode()), encoding="cp1251") == ["медведь"]
    assert decode_text(codecs.BOM_UTF8 + "ä".encode(), "cp1251") == "ä"
    assert decode_xml("ä".encode("latin-1")) == ("ä", True)


@pytest.mark.parametrize("name", ["klingon", "rot13", "base64"])
def test_unknown_encodings_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="encoding"):
        validate_overrides("train", ["dataset=voc", "dataset.root=x", f"dataset.encoding='{name}'"])


def texts(value: Any) -> Any:
    """All numbers of a document as text, as some tools write them."""
    if isinstance(value, dict):
        return {key: texts(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [texts(inner) for inner in value]
    return str(value) if isinstance(value, int | float) else value


def floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: floats(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [floats(inner) for inner in value]
    return float(value) if isinstance(value, int) else value


@pytest.mark.parametrize("written", [texts, floats])
def test_numbers_as_tools_write_them_are_the_same_data_set(
    written: Any, write_coco: Any, annotate: Any, tmp_path: Path
) -> None:
    folder, file = write_coco(
        [
            annotate(1, [2, 3, 10, 20]),
            annotate(2, [2, 3.5, 9, 9], image_id=5, category_id=7),
            annotate(3, [1, 1, 5, 5], iscrowd=1),
        ]
    )
    plain = open_coco(folder, file)
    other = tmp_path / "other.json"
    other.write_text(json.dumps(written(json.loads(file.read_text()))))
    read = open_coco(folder, other)
    assert read.ground_truth() == plain.ground_truth() and read.dropped == plain.dropped == {"crowd": 1}
    assert all(np.array_equal(a[1]["masks"], b[1]["masks"]) for a, b in zip(read, plain, strict=True))
