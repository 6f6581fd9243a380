from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from e3va_cli.data.formats import voc_folder as voc_format
from e3va_cli.data.formats.voc import VocFormat
from e3va_cli.data.validation.issues import Issue
from e3va_cli.errors import UserError
from tests.components import options_of

TWENTY = [
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]


def thing(name: str | None, corners: Sequence[Any] | None, difficult: int | None = 0) -> str:
    """An <object>; what is None has no element."""
    parts = [f"<name>{name}</name>"] if name is not None else []
    parts += ["<pose>Left</pose><part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"]
    parts += [f"<difficult>{difficult}</difficult>"] if difficult is not None else []
    if corners is not None:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        parts += ["<bndbox>" + "".join(f"<{k}>{v}</{k}>" for k, v in sides if v is not None) + "</bndbox>"]
    return "<object>" + "".join(parts) + "</object>"


def sheet(*things: str, size: str | None = "<width>40</width><height>30</height><depth>3</depth>") -> str:
    """An XML file of a 40 x 30 image."""
    return f"<annotation>{'' if size is None else f'<size>{size}</size>'}{''.join(things)}</annotation>"


PERSON = thing("person", [3, 4, 12, 23])
DOG = thing("dog", [3, 4, 12, 23])


def write(root: Path, year: str, sets: dict[str, list[str]], sheets: dict[str, str | bytes | None]) -> Path:
    """A year with those sets, and an image for each XML file; None for an image without one."""
    folder = root / year
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, stems in sets.items():
        (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
    for number, (stem, content) in enumerate(sheets.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "JPEGImages" / f"{stem}.jpg")
        if content is not None:
            data = content if isinstance(content, bytes) else content.encode()
            (folder / "Annotations" / f"{stem}.xml").write_bytes(data)
    return root


def plain(root: Path, *things: str) -> Path:
    """One training image with those objects, one validation image with a person."""
    return write(root, "VOC2007", {"train": ["a"], "val": ["b"]}, {"a": sheet(*things), "b": sheet(PERSON)})


def source(root: Path, train_set: str | None = None, val_set: str | None = None, classes: Any = None) -> VocFormat:
    return VocFormat(str(root), train_set, val_set, classes)


def files(data: Any) -> list[str]:
    return [image["file_name"] for image in data.ground_truth()["images"]]


def lines_of(call: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        call()
    assert all("\n" not in message for message in caught.value.messages)
    return caught.value.messages


def counts(issues: list[Issue]) -> dict[str, int]:
    return {issue.type: issue.count for issue in issues}


def test_an_item(tmp_path: Path) -> None:
    things = (PERSON, thing("cat", ["1", " 1.0 ", "40", 30]), thing("dog", [10.5, 2.25, 20.5, 8.75], None))
    data = source(plain(tmp_path, *things)).open("train")
    image, target = data[0]
    assert np.array_equal(
        image.permute(1, 2, 0).numpy(), np.array(Image.open(tmp_path / "VOC2007" / "JPEGImages" / "a.jpg"))
    )
    # Corners count from 1 and the last pixel is inside: 3..12 are the ten pixels from 2 up to 12.
    assert target["boxes"].tolist() == [[2, 3, 12, 23], [0, 0, 40, 30], [9.5, 1.25, 20.5, 8.75]]
    assert [data.classes[label - 1] for label in target["labels"]] == ["person", "cat", "dog"]
    assert target["labels"].dtype == torch.int64
    assert target["original_size"] == data.image_size(0) == (30, 40)
    assert set(target) == {"image_id", "boxes", "labels", "original_size"}
    assert (data.dropped, data.target_types) == ({}, {"boxes"})


def test_difficult_objects_are_ignored_by_evaluation_and_not_trained_on(tmp_path: Path) -> None:
    things = (PERSON, thing("cat", [5, 5, 20, 20], 1), thing("cat", [5, 5, 25, 20], 0), thing("dog", [1, 1, 9, 9], 1))
    data = source(plain(tmp_path, *things)).open("train")
    assert data.dropped == {"difficult": 2}
    assert data[0][1]["boxes"].tolist() == [[2, 3, 12, 23], [4, 4, 25, 20]]
    truth = data.ground_truth()["annotations"]
    assert [entry["iscrowd"] for entry in truth] == [0, 1, 0, 1]
    assert [entry["bbox"] for entry in truth][1] == [4, 4, 16, 16]
    assert [entry["area"] for entry in truth][1] == 256


UNUSABLE = {
    "box without area": [[5, 5, 5, 9], [5, 5, 9, 5], [9, 5, 5, 9], [504, 337, 504, 337]],
    "box outside the image": [[41, 5, 50, 9], [5, 31, 9, 60]],
    "box is not four finite numbers": [
        [5, 5, "nan", 9],
        [5, "inf", 9, 9],
        [5, 5, "1e999", 9],
        ["five", 5, 9, 9],
        ["", 5, 9, 9],
        [5, 5, 9, None],
        None,
    ],
}


def test_unusable_objects_are_dropped_and_counted(tmp_path: Path) -> None:
    things = [thing("dog", corners) for boxes in UNUSABLE.values() for corners in boxes]
    root = plain(tmp_path, PERSON, *things, thing(None, [1, 1, 9, 9]), thing("  ", [1, 1, 9, 9]))
    data = source(root).open("train")
    assert data.dropped == {kind: len(boxes) for kind, boxes in UNUSABLE.items()} | {"object without a name": 2}
    assert data[0][1]["boxes"].tolist() == [[2, 3, 12, 23]]
    report = source(root).check("train")
    assert counts(report.problems) == data.dropped
    boxes = next(f for f in report.problems if f.type == "box is not four finite numbers").locations
    assert "'five'" in str(boxes[3])


def sets_used(found: VocFormat) -> tuple[list[str], list[str]]:
    return files(found.open("train")), files(found.open("val"))


def years(root: Path, first: dict[str, list[str]], second: dict[str, list[str]] | None = None) -> Path:
    """VOC2007 with one, VOC2012 with another dictionary of sets, all images with a person."""
    for year, sets in (("VOC2007", first), ("VOC2012", second)):
        if sets is not None:
            write(root, year, sets, {stem: sheet(PERSON) for stems in sets.values() for stem in stems})
    return root


FIRST = {"train": ["1"], "val": ["2"], "trainval": ["1", "2"], "test": ["3"]}
SECOND = {"train": ["x"], "val": ["y"], "trainval": ["x", "y"]}


def names(*found: str) -> list[str]:
    """07/1 as VOC2007/JPEGImages/1.jpg."""
    return [f"VOC20{name.split('/')[0]}/JPEGImages/{name.split('/')[1]}.jpg" for name in found]


def test_sets_without_being_told(tmp_path: Path) -> None:
    found = sets_used(source(years(tmp_path / "both", FIRST, SECOND)))
    assert found == (names("07/1", "07/2", "12/x", "12/y"), names("07/3"))
    assert sets_used(source(years(tmp_path / "2007", FIRST))) == (names("07/1", "07/2"), names("07/3"))
    no_test = {name: stems for name, stems in FIRST.items() if name != "test"}
    found = sets_used(source(years(tmp_path / "no test", no_test, SECOND)))
    assert found == (names("07/1", "12/x"), names("07/2", "12/y"))
    write(tmp_path, "VOC2012", SECOND, {stem: sheet(PERSON) for stem in "xy"})
    assert sets_used(source(tmp_path)) == (names("12/x"), names("12/y"))
    # Images of VOC2012's test set have no public annotations.
    found = sets_used(source(years(tmp_path / "2012 test", FIRST, SECOND | {"test": ["z"]})))
    assert found[1] == names("07/3")


def test_sets_by_name(tmp_path: Path) -> None:
    root = years(tmp_path, FIRST | {"few": ["2"]}, SECOND)
    assert sets_used(source(root, "train", "val")) == (names("07/1", "12/x"), names("07/2", "12/y"))
    assert sets_used(source(root, "few", "test")) == (names("07/2"), names("07/3"))
    assert sets_used(source(root, "trainval")) == (names("07/1", "07/2", "12/x", "12/y"), names("07/3"))
    # Validated on val, it must not be trained on trainval.
    assert sets_used(source(root, None, "val")) == (names("07/1", "12/x"), names("07/2", "12/y"))


def test_image_ids_are_whole_and_tell_the_image(tmp_path: Path) -> None:
    data = source(years(tmp_path, FIRST, SECOND)).open("train")
    truth = {image["id"]: image["file_name"] for image in data.ground_truth()["images"]}
    assert [truth[data[index][1]["image_id"]] for index in range(4)] == names("07/1", "07/2", "12/x", "12/y")
    assert len(truth) == 4


def test_missing_image_set(tmp_path: Path) -> None:
    root = years(tmp_path, FIRST | {f"{name}_train": [] for name in TWENTY}, SECOND)
    [line] = lines_of(lambda: source(root, "trian").open("train"))
    assert "trian.txt" in line
    assert "VOC2007 has val, test, train, trainval" in line
    assert "and 14 more; VOC2012 has val, train, trainval" in line
    assert "set dataset.train_set" in line
    assert "dataset.val_set" in lines_of(lambda: source(root, None, "../val").open("val"))[0]
    assert "there is no such list" in lines_of(lambda: source(write(tmp_path / "x", "VOC2007", {}, {})).open("val"))[0]


def test_the_root(tmp_path: Path) -> None:
    plain(tmp_path / "data" / "VOCdevkit", PERSON)
    assert source(tmp_path / "data").open("train").images == tmp_path / "data" / "VOCdevkit"
    assert source(tmp_path / "data" / "VOCdevkit").open("train").classes == TWENTY
    for root in (tmp_path / "data" / "VOCdevkit" / "VOC2007", tmp_path, tmp_path / "no" / "such"):
        [line] = lines_of(lambda root=root: source(root).open("train"))
        assert f"no VOC2007 or VOC2012 in {root} or in {root / 'VOCdevkit'}" in line
        assert "set dataset.root" in line
    (tmp_path / "data" / "VOCdevkit" / "VOC2007" / "JPEGImages").rename(tmp_path / "images")
    assert "no folder" in lines_of(lambda: source(tmp_path / "data").open("train"))[0]


@pytest.mark.parametrize("content", [b"\x89PNG\xff", b""])
def test_a_list_without_images(tmp_path: Path, content: bytes) -> None:
    root = plain(tmp_path, PERSON)
    (root / "VOC2007" / "ImageSets" / "Main" / "train.txt").write_bytes(content)
    [line] = lines_of(lambda: source(root).open("train"))
    assert ("cannot read the list of images" if content else "'images' is empty") in line
    assert "train" in line


def test_lists_with_blanks_and_other_line_ends(tmp_path: Path) -> None:
    root = plain(tmp_path, PERSON)
    (root / "VOC2007" / "ImageSets" / "Main" / "train.txt").write_bytes("\ufeffb\r\n\r\n  a  \r\n".encode())
    assert files(source(root).open("train")) == names("07/b", "07/a")


def test_classes_are_voc_s_twenty_or_those_of_both_splits(tmp_path: Path) -> None:
    for data in (source(plain(tmp_path / "voc", DOG)).open(split) for split in ("train", "val")):
        assert (data.classes, data.category_ids) == (TWENTY, list(range(1, 21)))
    root = plain(tmp_path / "own", thing("owl", [1, 1, 9, 9]), thing("Person", [1, 1, 9, 9]))
    for data in (source(root).open(split) for split in ("train", "val")):
        assert (data.classes, data.category_ids) == (["Person", "owl", "person"], [1, 2, 3])
    assert source(root).open("val")[0][1]["labels"].tolist() == [3]


def test_classes_as_given(tmp_path: Path) -> None:
    root = plain(tmp_path, PERSON, DOG, DOG, thing("owl", [1, 1, 9, 9]))
    (tmp_path / "names.txt").write_text("owl\nperson\nunicorn\n")
    for classes in (["owl", "person", "unicorn"], str(tmp_path / "names.txt")):
        data = source(root, classes=classes).open("train")
        assert (data.classes, data.dropped) == (["owl", "person", "unicorn"], {"unlisted class": 2})
        assert data[0][1]["labels"].tolist() == [2, 1]
        report = source(root, classes=classes).check("train")
        assert report.ok
        assert counts(report.notes) == {"object of an unlisted class": 2, "class without objects": 1}
        assert report.per_class == {"owl": 1, "person": 1, "unicorn": 0}
    [line] = lines_of(lambda: source(root, classes=["Dog", "cat"]).open("train"))
    assert "dataset.classes: " in line
    assert "has no object of Dog, cat; its classes are dog, owl, person" in line
    assert "no such file" in lines_of(lambda: source(root, classes=str(tmp_path / "x.txt")).open("val"))[0]


BOMB = """<?xml version="1.0"?><!DOCTYPE lolz [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>
<annotation><size><width>40</width><height>30</height></size><object><name>&b;</name></object></annotation>"""
FAULTS: dict[str, tuple[str | bytes | None, str]] = {
    "missing": (None, "missing annotation file"),
    "empty": ("", "unreadable annotation file: broken XML"),
    "broken": (sheet(PERSON)[:-5], "unreadable annotation file: broken XML"),
    "binary": (b"\x89PNG\0\xff", "unreadable annotation file: broken XML"),
    "other": ("<html><body/></html>", "it holds <html>, not <annotation>"),
    "bomb": (BOMB, "annotation file with a document type"),
    "bomb in latin-1": (BOMB.replace("lolz", "l\xf6lz").encode("latin-1"), "annotation file with a document type"),
    "bomb in utf-16": (BOMB.replace("1.0", '1.0" encoding="utf-16').encode("utf-16"), "with a document type"),
    "bomb in ebcdic": (b'<?xml version="1.0" encoding="cp037"?>' + BOMB[21:].encode("cp037"), "a document type"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_annotation_files_without_which_there_is_no_index(tmp_path: Path, case: str) -> None:
    content, message = FAULTS[case]
    root = write(
        tmp_path,
        "VOC2007",
        {"train": ["good", "bad", "worse"], "val": ["good"]},
        {"good": sheet(PERSON), "bad": content, "worse": content},
    )
    [line] = lines_of(lambda: source(root).open("train"))
    assert line.startswith(str(root / "VOC2007" / "Annotations" / "bad.xml"))
    assert message in line
    assert "(and 1 more); run `e3va check-data`" in line
    assert source(root).open("val").classes == TWENTY
    problems = source(root).check("train").problems
    assert [issue.count for issue in problems] == [2]
    assert message in f"{problems[0].type}: {problems[0].locations[0].detail}"


def test_a_bomb_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = plain(tmp_path)
    (root / "VOC2007" / "Annotations" / "a.xml").write_text(BOMB)
    monkeypatch.setattr(voc_format.ElementTree, "fromstring", lambda text: pytest.fail("parsed"))
    monkeypatch.setattr(VocFormat, "_classes", TWENTY)
    lines_of(lambda: source(root).open("train"))


def test_names_in_any_encoding(tmp_path: Path) -> None:
    for encoding in ("utf-8", "utf-8-sig", "latin-1"):
        root = plain(tmp_path / encoding)
        text = '<?xml version="1.0" encoding="latin-1"?>' * (encoding == "latin-1") + sheet(thing("bär", [1, 1, 9, 9]))
        (root / "VOC2007" / "Annotations" / "a.xml").write_bytes(text.encode(encoding))
        assert source(root).open("train").classes == ["bär", "person"]


@pytest.mark.parametrize(
    "size",
    [
        None,
        "",
        "<width>0</width><height>0</height>",
        "<width>40</width>",
        "<width>x</width><height>nan</height>",
        "<width>-40</width><height>inf</height>",
    ],
)
def test_size_read_from_the_image(tmp_path: Path, size: str | None) -> None:
    root = plain(tmp_path)
    (root / "VOC2007" / "Annotations" / "a.xml").write_text(sheet(PERSON, size=size))
    data = source(root).open("train")
    assert data.image_size(0) == data[0][1]["original_size"] == (30, 40)
    report = source(root).check("train")
    assert report.ok
    assert counts(report.notes)["image size taken from the image file"] == 1
    for content, reason in ((b"not an image", "not an image"), (None, "no such image")):
        image = root / "VOC2007" / "JPEGImages" / "a.jpg"
        image.unlink()
        if content:
            image.write_bytes(content)
        [line] = lines_of(lambda: source(root).open("train"))
        assert "a.xml: annotation file without an image size" in line
        assert reason in line
        assert counts(source(root).check("train").problems) == {"annotation file without an image size": 1}


def test_images_of_other_kinds(tmp_path: Path) -> None:
    root = plain(tmp_path, PERSON)
    folder = root / "VOC2007" / "JPEGImages"
    Image.open(folder / "a.jpg").save(folder / "a.PNG")
    assert files(source(root).open("train")) == names("07/a")
    (folder / "a.jpg").unlink()
    data = source(root).open("train")
    assert files(data) == ["VOC2007/JPEGImages/a.PNG"]
    assert data[0][0].shape == (3, 30, 40)
    (folder / "a.PNG").unlink()
    assert "no such image" in lines_of(lambda: source(root).open("train")[0])[0]
    assert counts(source(root).check("train").problems) == {"missing image": 1}


def test_nothing_outside_the_root_is_listed(tmp_path: Path) -> None:
    write(tmp_path / "out", "VOC2007", {}, {"secret": sheet(PERSON)})
    for stem in (
        "../../../out/VOC2007/Annotations/secret",
        str(tmp_path / "out" / "VOC2007" / "Annotations" / "secret"),
    ):
        root = write(tmp_path / "in", "VOC2007", {"train": [stem, "b"], "val": ["b"]}, {"b": sheet(PERSON)})
        lines = lines_of(lambda root=root: source(root).open("train"))
        assert "is outside" in lines[0] or "missing annotation file" in lines[0]
        assert not source(root).check("train").ok


def test_every_problem_at_once(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        "VOC2007",
        {
            "train": ["good", "missing", "bomb", "html", "sizeless", "wrong size", "boxes", "gone", "empty", "good"],
            "val": ["good", "val"],
        },
        {
            "good": sheet(PERSON, thing("cat", [1, 1, 9, 9], 1)),
            "missing": None,
            "bomb": BOMB,
            "html": "<html/>",
            "sizeless": sheet(DOG, size=None),
            "wrong size": sheet(DOG, size="<width>41</width><height>30</height>"),
            "boxes": sheet(thing("dog", [5, 5, 5, 5]), thing("dog", [5, 5, 60, 9]), thing(None, [1, 1, 9, 9])),
            "gone": sheet(DOG),
            "empty": sheet(),
            "val": sheet(PERSON),
        },
    )
    (root / "VOC2007" / "JPEGImages" / "gone.jpg").unlink()
    seen: list[tuple[int, int]] = []
    report = source(root).check("train", lambda done, total: seen.append((done, total)))
    assert counts(report.problems) == {
        "missing annotation file": 1,
        "annotation file with a document type": 1,
        "unreadable annotation file": 1,
        "object without a name": 1,
        "duplicate file name": 1,
        "missing image": 1,
        "size mismatch": 1,
        "box without area": 1,
        "box partly outside the image": 1,
    }
    assert seen[-1] == (7, 7)
    places = {issue.type: str(issue.locations[0]) for issue in (*report.problems, *report.notes)}
    assert places["missing annotation file"] == "VOC2007/Annotations/missing.xml, no such file"
    assert places["object without a name"] == "VOC2007/Annotations/boxes.xml, image 7, object 3"
    assert places["box without area"].startswith("VOC2007/JPEGImages/boxes.jpg, image 7")
    assert counts(report.notes) == {
        "image size taken from the image file": 1,
        "image without objects": 1,
        "class without objects": 18,
    }
    assert report.totals == {"images": 7, "annotations": 9, "difficult": 2, "classes": 20}
    assert {name: count for name, count in report.per_class.items() if count} == {"dog": 5, "person": 2}
    assert f"{root} (VOC2007 train): 7 images" in report.lines()[0]
    assert len(lines_of(lambda: source(root).open("train"))) == 3

    report = source(root).check("val")
    assert report.ok
    [issue] = [f for f in report.notes if f.type == "image that is also in the training set"]
    assert [location.file for location in issue.locations] == names("07/good")


def test_each_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = years(tmp_path, FIRST, SECOND)
    parsed: Counter[Path] = Counter()
    parse = voc_format._parse
    monkeypatch.setattr(voc_format, "_parse", lambda path, *more: parsed.update([path]) or parse(path, *more))
    both = source(root)
    for split in ("train", "val"):
        both.open(split)
        both.check(split)
    assert len(parsed) == 5
    assert set(parsed.values()) == {1}
    parsed.clear()
    source(root, classes=["person"]).open("val")
    assert len(parsed) == 1


def test_evaluation_does_without_the_training_images(tmp_path: Path) -> None:
    root = write(tmp_path, "VOC2007", {"test": ["b"]}, {"b": sheet(PERSON)})
    assert source(root).open("val").classes == TWENTY
    assert "trainval.txt" in lines_of(lambda: source(root).open("train"))[0]


def test_no_usable_objects(tmp_path: Path) -> None:
    [line] = lines_of(lambda: source(plain(tmp_path / "1", thing("dog", [1, 1, 9, 9], 1))).open("train"))
    assert "(VOC2007 train) has no usable object (difficult: 1)" in line
    [line] = lines_of(lambda: source(plain(tmp_path / "2")).open("train"))
    assert "no annotations" in line


def test_made_of_its_configuration(tmp_path: Path) -> None:
    config = {"name": "voc", "root": str(plain(tmp_path, PERSON)), "train_set": None, "val_set": None}
    assert options_of("dataset", **config, classes=None, metric="voc").open("val").classes == TWENTY


def test_a_year_may_be_a_link(tmp_path: Path) -> None:
    plain(tmp_path / "clone", PERSON)
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit" / "VOC2007").symlink_to("../clone/VOC2007")
    assert source(tmp_path / "VOCdevkit").open("train")[0][1]["labels"].tolist() == [15]


def test_real_data(real_data: Callable[[str], Path]) -> None:
    bccd = real_data("bccd")
    found = source(bccd)
    folder = bccd / "VOCdevkit" / "VOC2007"
    total = 0
    for split, images, faulty in (("train", 292, 2), ("val", 72, 0)):
        data = found.open(split)
        assert len(data) == images
        assert data.classes == ["Platelets", "RBC", "WBC"]
        assert data.dropped == ({"box without area": faulty} if faulty else {})
        report = found.check(split)
        assert counts(report.problems) == data.dropped
        total += sum(report.per_class.values())
        for index in range(0, images, 20):
            image, target = data[index]
            stem = Path(files(data)[index]).stem
            objects = ElementTree.parse(folder / "Annotations" / f"{stem}.xml").getroot().iter("object")
            expected = [[int(float(side.text or "")) for side in thing.find("bndbox") or []] for thing in objects]
            assert image.shape == (3, 480, 640)
            assert target["boxes"].tolist() == [[x1 - 1, y1 - 1, x2, y2] for x1, y1, x2, y2 in expected]
    assert total == 4888
    places = {str(location) for issue in found.check("train").problems for location in issue.locations}
    assert {location.split(",")[0] for location in places} == {
        "VOC2007/JPEGImages/BloodImage_00338.jpg",
        "VOC2007/JPEGImages/BloodImage_00343.jpg",
    }
