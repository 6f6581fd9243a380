"""The kangaroo data set, crafted, converted to the layout that training reads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e3va_cli.config.composition import load_config
from scripts import convert_kangaroo

XML = """<annotation><size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>kangaroo</name><difficult>0</difficult>
<bndbox><xmin>5</xmin><ymin>6</ymin><xmax>30</xmax><ymax>23</ymax></bndbox></object></annotation>"""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images, of which the last ends early."""
    for name in ("images", "annots"):
        (tmp_path / "there" / name).mkdir(parents=True)
    for number in range(10):
        file = tmp_path / "there" / "images" / f"{number:05}.jpg"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(file)
        (tmp_path / "there" / "annots" / f"{number:05}.xml").write_text(XML)
    file.write_bytes(file.read_bytes()[:-20])
    return tmp_path / "there"


def lists(root: Path) -> list[list[str]]:
    return [(root / "VOC2007/ImageSets/Main" / f"{split}.txt").read_text().split() for split in ("train", "val")]


def test_it_is_read_and_valid(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "new" / "kangaroo"
    assert convert_kangaroo.main([str(photos), str(target)]) == 0
    left_out, summary = capsys.readouterr().out.splitlines()
    assert left_out.startswith("left out 00009.jpg: image file is truncated")
    assert summary == f"Kangaroos, 7 train and 2 val images, are in {target}: dataset=voc dataset.root={target}"
    config = load_config("train", ["experiment=kangaroo_retinanet_swin_nano", f"dataset.root={target}"])
    for split, count in (("train", 7), ("val", 2)):
        dataset = config.dataset.open(split, None)
        assert (dataset.classes, len(dataset)) == (["kangaroo"], count)
        assert dataset[0][1]["boxes"].tolist() == [[4, 5, 30, 23]]
        assert config.dataset.check(split).ok


def test_the_split_is_the_same_every_time(photos: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert convert_kangaroo.main([str(photos), str(tmp_path / name)]) == 0
    train, val = lists(tmp_path / "a")
    assert [train, val] == lists(tmp_path / "b")
    assert sorted(train + val) == [f"{number:05}" for number in range(9)]
    assert convert_kangaroo.split_names([f"{n}" for n in range(163)])["val"] != sorted(map(str, range(33)))


def test_errors_are_one_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*places: Path) -> str:
        assert convert_kangaroo.main([str(place) for place in places]) == 2
        [found] = capsys.readouterr().err.splitlines()
        return found

    assert "images: no JPEG images; use the folder" in line(tmp_path / "nowhere", tmp_path / "a")
    assert "File exists" in line(photos, tmp_path)
    (photos / "annots" / "00003.xml").unlink()
    assert "No such file" in line(photos, tmp_path / "c")


def test_the_real_photos(real_data: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert_kangaroo.convert(real_data("kangaroo"), tmp_path / "kangaroo")
    assert capsys.readouterr().out == "left out 00090.jpg: image file is truncated (20 bytes not processed)\n"
    assert list(map(len, lists(tmp_path / "kangaroo"))) == [130, 33]
