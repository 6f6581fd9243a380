"""Every line of `damages.py`: what the check says, what training does, and that nobody hangs or looks outside."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.GifImagePlugin import GifImageFile

from e3va_cli.data import DatasetFormat, DenseDataset, collate
from e3va_cli.errors import UserError
from tests.components import options_of
from tests.data.validation import damages
from tests.data.validation.damages import Damage

SIZES = {"train_short_sides": [32], "val_short_side": 32, "max_size": 64, "flip": 0.5}
CROPS = {"short_side": 32, "max_size": 64, "scales": [1.0, 1.0], "crop_size": 32, "cat_max_ratio": 0.9, "flip": 0.5}
COCO = {"name": "coco", "train_images": "images", "train_annotations": "instances.json", **SIZES}
COCO |= {"val_images": "images", "val_annotations": "instances.json"}
VOC = {"name": "voc", "train_set": "train", "val_set": "train", "classes": None, **SIZES}
ADE = {"name": "ade20k", "train_images": "images/training", "train_labels": "annotations/training", **CROPS}
ADE |= {"val_images": "images/training", "val_labels": "annotations/training"}
ADE |= {"num_classes": 3, "classes": None, "photometric_distortion": False}

COCO_DAMAGES = [*damages.COCO_FILE, *damages.COCO_ENTRIES, *damages.COCO_SHAPES, *damages.COCO_SOUND]
TABLES: dict[str, tuple[Callable[[Path], None], dict[str, Any], list[Damage]]] = {
    "coco": (damages.build_coco, COCO, COCO_DAMAGES),
    "images": (damages.build_coco, COCO, damages.IMAGES),
    "voc": (damages.build_voc, VOC, damages.VOC),
    "ade20k": (damages.build_ade, ADE, damages.LABEL_MAPS),
}
CASES = [pytest.param(table, damage, id=f"{table}: {damage.name}") for table in TABLES for damage in TABLES[table][2]]
FORBIDDEN = ("/etc", "/dev/zero")


class Opened:
    """The files and folders that this process opens, as Python's audit events tell."""

    def __init__(self) -> None:
        self.names: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.names is not None and event in ("open", "os.scandir", "os.listdir"):
            self.names.append(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | Path) else "")


OPENED = Opened()


@pytest.fixture
def in_time() -> Iterator[None]:
    """Ends the whole test run where a reader waits for ever; nothing less reaches a thread that does."""
    faulthandler.dump_traceback_later(300, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[list[str]]:
    """What is opened from now on; nothing of it may lie outside the data, wherever a link leads."""
    OPENED.names = names = []
    yield names
    OPENED.names = None
    outside = (str(tmp_path / "outside"), *FORBIDDEN)
    assert not [name for name in names if os.path.realpath(name).startswith(outside)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An empty data root, beside a folder that holds what nobody may open."""
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    damages.RGB.save(outside / "secret.png")
    (outside / "x.xml").write_text(damages.sheet(damages.thing()))
    (outside / "evil.dtd").write_text("")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def source_of(table: str, root: Path) -> DatasetFormat:
    source: DatasetFormat = options_of("dataset", **TABLES[table][1], root=str(root))
    return source


def checked(source: DatasetFormat) -> tuple[list[str], set[str]]:
    """The lines of `check-data` on the training split, and the kinds of what it finds, unused classes aside."""
    try:
        report = source.check("train", None)
    except UserError as error:
        return error.messages, {"not readable"}
    kinds = {issue.type for issue in (*report.problems, *report.notes)}
    return report.lines(), kinds - {"class without objects", "class without pixels"}


def trained_on(source: DatasetFormat) -> DenseDataset:
    """The training split, every item of it read and transformed, and all of them in one batch."""
    dataset = source.open("train", source.train_transforms())
    batch = collate([dataset[index] for index in range(len(dataset))])
    assert batch.images.shape[1] == 3 and batch.images.dtype == torch.uint8
    for (height, width), target in zip(batch.image_sizes, batch.targets, strict=True):
        for x1, y1, x2, y2 in target.get("boxes", torch.empty(0, 4)).tolist():
            assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        assert set(target.get("labels", torch.empty(0)).tolist()) <= set(range(1, len(dataset.classes) + 1))
        if "semantic" in target:
            assert target["semantic"].min() >= 0 and target["semantic"].max() <= 3
    return dataset


@pytest.mark.parametrize("table", TABLES)
def test_undamaged(table: str, root: Path) -> None:
    TABLES[table][0](root)
    source = source_of(table, root)
    assert trained_on(source).dropped == {}
    assert source.check("train", None).ok


def test_the_table_is_long_and_its_lines_have_names() -> None:
    names = [str(case.id) for case in CASES]
    assert len(names) == len(set(names)) >= 40


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize(("table", "damage"), CASES)
def test_damage(table: str, damage: Damage, root: Path, opened: list[str]) -> None:
    TABLES[table][0](root)
    damage.spoil(root)
    opened.clear()
    source = source_of(table, root)

    lines, kinds = checked(source)
    for line in lines:
        assert "\n" not in line and line.isprintable() and len(line) < 1000
    assert any(damage.says in line for line in lines) if damage.says else not kinds, lines

    does, reason = damage.training
    if does == "stops":
        with pytest.raises(UserError) as refused:
            trained_on(source)
        assert any(reason in message for message in refused.value.messages), refused.value.messages
        for message in refused.value.messages:
            assert "\n" not in message and message.isprintable() and len(message) < 1000
    else:
        assert trained_on(source).dropped == ({reason: 1} if does == "drops" else {})


def test_damage_after_the_first_frame(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow may raise anything when it looks for a second one."""
    damages.build_coco(root)
    damages.drawn(damages.A, damages.RGB, "GIF")(root)
    monkeypatch.setattr(GifImageFile, "is_animated", property(lambda image: [][0]))
    source = source_of("coco", root)
    assert checked(source)[1] == {"corrupt image metadata"}
    assert trained_on(source).dropped == {}


TOGETHER = [
    "file name twice",
    "category name like markup",
    "annotation id a text",
    "box with NaN",
    "polygon of two points",
    "image of null",
    "no category",
]
WORDS = [f"{'dataset' if key == 'name' else f'dataset.{key}'}={value}" for key, value in COCO.items()]
WORDS += ["backbone=swin_nano", "head=mask_rcnn_nano", "data.num_workers=1", "trainer.accelerator=cpu"]


def test_the_command_reports_all_problems(root: Path, e3va: Callable[..., Any]) -> None:
    damages.build_coco(root)
    found = {damage.name: damage for damage in TABLES["coco"][2]}
    for name in TOGETHER:
        found[name].spoil(root)
        damages.document(lambda content: content["annotations"].insert(0, damages.annotation(9)))(root)
    done = e3va("check-data", *WORDS, f"dataset.root={root}", expect=1)
    assert "Traceback" not in done.stderr and done.stderr == ""
    for name in TOGETHER:
        assert (found[name].says or "[/red]") in done.stdout


def test_a_run_stops_at_a_broken_image(root: Path, e3va: Callable[..., Any]) -> None:
    """It is another process that reads it; nothing but the line comes of that."""
    damages.build_coco(root)
    damages.pipe(damages.A)(root)
    done = e3va("train", *WORDS, f"dataset.root={root}", "trainer.max_steps=1", "data.batch_size=2", expect=2)
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("e3va: error: cannot read the image") and "a.png" in line and "(image 11)" in line
