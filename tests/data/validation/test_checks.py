import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.coco_file import coco_paths
from e3va_cli.data.validation.coco import check_coco_file
from e3va_cli.data.validation.issues import MAX_LOCATIONS, Issue, Report

Write = Callable[..., tuple[Path, Path]]
Annotate = Callable[..., dict[str, Any]]


def counts(issues: list[Issue]) -> dict[str, int]:
    return {issue.type: issue.count for issue in issues}


def only(issues: list[Issue], kind: str) -> Issue:
    [issue] = [issue for issue in issues if issue.type == kind]
    return issue


def image(number: int, name: str, width: int = 40, height: int = 30) -> dict[str, Any]:
    return {"id": number, "file_name": name, "width": width, "height": height}


def test_valid_data_set(write_coco: Write, annotate: Annotate) -> None:
    folder, file = write_coco(
        [
            annotate(1, [2, 3, 10, 20]),
            annotate(2, [0, 0, 40.4, 30], image_id=5),
            annotate(3, [2, 3, 5, 5], iscrowd=1, category_id=7),
            annotate(4, [2, 3, 5, 5], category_id=7),
        ]
    )
    report = check_coco_file(folder, file)
    assert report.ok
    assert (report.problems, report.notes) == ([], [])
    assert report.totals == {"images": 2, "annotations": 4, "crowds": 1, "classes": 2}
    assert report.per_class == {"dog": 2, "cat": 1}
    assert report.lines() == [
        f"{file}: 2 images, 4 annotations, 1 crowd, 2 classes",
        "  no problems",
    ]


def test_every_problem_at_once(write_coco: Write, annotate: Annotate) -> None:
    full = {"size": [30, 40], "counts": [0, 1200]}
    folder, file = write_coco(
        [
            annotate(1, [2, 3, 10, 20]),
            annotate(2, [5, 5, 0, 5]),
            annotate(3, [5, 5, -4, 5]),
            annotate(4, [50, 5, 5, 5]),
            annotate(5, [35, 5, 15, 5]),
            annotate(6, [5, 5, 0.5, 5]),
            annotate(7, [5, 5, 9, 9], bbox=[1, 2, float("nan"), 4]),
            annotate(8, [5, 5, 9, 9], bbox=[1, 2, 3]),
            annotate(9, [5, 5, 9, 9], category_id=99),
            annotate(10, [5, 5, 9, 9], image_id=99),
            annotate(10, [5, 5, 9, 9]),
            annotate(11, [5, 5, 9, 9], segmentation=[[1, 2, 3, 4], [5, 6], [1, 1, 9, 1, 9, 9]]),
            annotate(12, [5, 5, 9, 9], segmentation=[[1, 2, 3, 4, 5]]),
            annotate(13, [5, 5, 9, 9], segmentation=full | {"size": [40, 30]}),
            annotate(14, [5, 5, 9, 9], segmentation=full | {"counts": [3, 4]}),
            annotate(15, [5, 5, 9, 9], segmentation=full),
            annotate(16, [5, 5, 9, 9], segmentation="mask.png"),
            annotate(17, [5, 5, 9, 9], segmentation=[]),
            {"image_id": 11, "category_id": 7, "bbox": [1, 1, 5, 5], "segmentation": full},
        ],
        images=[
            image(11, "a.png"),
            image(5, "sub/b.jpg"),
            image(5, "missing.png"),
            image(20, "a.png"),
            image(21, "turned.png", 30, 40),
            image(22, "truncated.jpg"),
            image(23, "text.jpg"),
            image(24, "../outside.png"),
            {"id": 25, "file_name": "a.png"},
            {"id": "x", "file_name": 3},
        ],
        categories=[
            {"id": 7, "name": "cat"},
            {"id": 3, "name": "dog"},
            {"id": 3, "name": "dog"},
            {"id": 8, "name": "owl"},
            {"id": None, "name": "ghost"},
        ],
    )
    Image.new("RGB", (40, 30)).save(folder / "turned.png")
    Image.new("RGB", (40, 30)).save(folder / "unlisted.png")
    (folder / "truncated.jpg").write_bytes((folder / "sub" / "b.jpg").read_bytes()[:-300])
    (folder / "text.jpg").write_text("not found")
    seen: list[tuple[int, int]] = []
    report = check_coco_file(folder, file, progress=lambda done, total: seen.append((done, total)))
    assert counts(report.problems) == {
        "invalid category": 1,
        "duplicate category id": 1,
        "duplicate category name": 1,
        "invalid image entry": 2,
        "file outside the folder of images": 1,
        "duplicate image id": 1,
        "duplicate file name": 1,
        "missing image": 1,
        "size mismatch": 1,
        "unreadable image": 2,
        "box without area": 2,
        "box outside the image": 1,
        "box partly outside the image": 1,
        "box smaller than one pixel": 1,
        "box is not four finite numbers": 2,
        "unknown category id": 1,
        "unknown image id": 1,
        "polygon with fewer than 3 points": 1,
        "malformed polygon": 1,
        "RLE of another size than the image": 1,
        "malformed RLE": 1,
        "segmentation is neither polygons nor RLE": 1,
        "annotation without a mask": 1,
        "annotation without an id": 1,
        "duplicate annotation id": 1,
    }
    assert seen[-1] == (8, 8)
    location = only(report.problems, "box outside the image").locations[0]
    assert (location.file, location.image_id, location.annotation_id) == ("a.png", 11, 4)
    assert (
        str(only(report.problems, "unknown category id").locations[0])
        == "a.png, image 11, annotation 9, category id 99"
    )
    location = only(report.problems, "size mismatch").locations[0]
    assert location.file == "turned.png"
    assert location.detail == "the file has 40x30, but 30x40 are annotated"
    assert only(report.problems, "missing image").locations[0].file == "missing.png"
    assert {p.file for p in only(report.problems, "unreadable image").locations} == {"truncated.jpg", "text.jpg"}
    assert [str(p) for p in only(report.notes, "image file without an annotation entry").locations] == ["unlisted.png"]
    assert only(report.notes, "class without objects").locations[0].detail == "owl (id 8)"
    assert not report.ok
    text = "\n".join(report.lines())
    for issue in (*report.problems, *report.notes):
        assert f"{issue.type}: {issue.count}" in text


def test_many_problems_of_a_kind_are_counted_but_not_listed(write_coco: Write, annotate: Annotate) -> None:
    report = check_coco_file(*write_coco([annotate(i, [5, 5, 0, 5]) for i in range(1, 31)]))
    issue = only(report.problems, "box without area")
    assert (issue.count, len(issue.locations)) == (30, MAX_LOCATIONS)
    assert [location.annotation_id for location in issue.locations] == [1, 2, 3, 4, 5]
    assert "      and 25 more" in report.lines()


def test_images_and_classes_without_objects_are_no_problem(write_coco: Write, annotate: Annotate) -> None:
    report = check_coco_file(*write_coco([annotate(1, [2, 3, 10, 20], segmentation=None)]))
    assert report.ok
    assert counts(report.notes) == {"image without objects": 1, "class without objects": 1}
    assert only(report.notes, "image without objects").locations[0].file == "sub/b.jpg"


def test_no_coco_file_and_no_folder(write_coco: Write, annotate: Annotate, tmp_path: Path) -> None:
    folder, file = write_coco([annotate(1, [5, 5, 0, 5])])
    report = check_coco_file(tmp_path / "x", file)
    assert counts(report.problems) == {"no such folder of images": 1, "box without area": 1}
    file.write_text(json.dumps({"images": []}))
    report = check_coco_file(folder, file)
    assert counts(report.problems) == {"invalid annotation file": 2}
    assert "it has no 'annotations'" in str(only(report.problems, "invalid annotation file").locations[0])


def test_dropped_annotations_are_problems(write_coco: Write, annotate: Annotate) -> None:
    folder, file = write_coco(
        [
            annotate(1, [2, 3, 10, 20]),
            annotate(2, [5, 5, 0, 5]),
            annotate(3, [50, 5, 5, 5]),
            annotate(4, [1, 1, 9, 9], category_id=1),
        ]
    )
    assert counts(check_coco_file(folder, file).problems) == open_coco(folder, file).dropped


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_data(coco_tiny: Path, split: str) -> None:
    folder, file = coco_paths(coco_tiny, split, f"annotations/instances_{split}.json")
    report: Report = check_coco_file(folder, file)
    raw = json.loads(file.read_text())
    assert report.ok
    assert report.totals["images"] == 80
    assert sum(report.per_class.values()) + report.totals["crowds"] == len(raw["annotations"])
    assert next(iter(report.per_class)) == "person"
    assert report.per_class["person"] == sum(a["category_id"] == 1 and not a["iscrowd"] for a in raw["annotations"])


def test_the_other_split_s_images(coco_tiny: Path) -> None:
    report = check_coco_file(coco_tiny / "train2017", coco_tiny / "annotations" / "instances_val2017.json")
    assert counts(report.problems) == {"missing image": 80}
    assert counts(report.notes)["image file without an annotation entry"] == 80
