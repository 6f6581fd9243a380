import contextlib
import copy
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.formats.coco_file import coco_paths, read_coco
from e3va_cli.data.formats.coco_segmentation import usable_segmentation, validate_segmentation
from e3va_cli.errors import UserError
from tests.components import options_of

Write = Callable[..., tuple[Path, Path]]
Annotate = Callable[..., dict[str, Any]]


def reference(content: dict[str, Any]) -> COCO:
    """pycocotools' own reader, which only knows how to talk."""
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def evaluate(truth: COCO, results: list[dict[str, Any]], kind: str) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def lines_of(call: Callable[[], object]) -> list[str]:
    with pytest.raises(UserError) as caught:
        call()
    assert all("\n" not in message for message in caught.value.messages)
    return caught.value.messages


def test_an_item(write_coco: Write, annotate: Annotate) -> None:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20]), annotate(2, [30, 5, 10, 10], category_id=7, image_id=11)])
    data = open_coco(folder, file)
    assert (len(data), data.classes, data.category_ids) == (2, ["dog", "cat"], [3, 7])
    assert (data.dropped, data.target_types) == ({}, {"boxes", "masks"})
    image, target = data[0]
    assert isinstance(image, tv_tensors.Image)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(Image.open(folder / "a.png")))
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (30, 40)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[2, 3, 12, 23], [30, 5, 40, 15]]
    assert target["labels"].dtype == torch.int64
    assert target["labels"].tolist() == [1, 2]
    assert isinstance(target["masks"], tv_tensors.Mask)
    assert target["masks"].dtype == torch.uint8
    expected = torch.zeros(2, 30, 40)
    expected[0, 3:23, 2:12] = 1
    expected[1, 5:15, 30:40] = 1
    assert torch.equal(target["masks"].float().as_subclass(torch.Tensor), expected)
    assert target["image_id"] == 11
    assert target["original_size"] == data.image_size(0) == (30, 40)


def test_an_image_without_objects_stays(write_coco: Write, annotate: Annotate) -> None:
    _, target = open_coco(*write_coco([annotate(1, [2, 3, 10, 20])]))[1]
    assert target["image_id"] == 5
    assert target["boxes"].shape == (0, 4)
    assert target["labels"].shape == (0,)
    assert target["labels"].dtype == torch.int64
    assert target["masks"].shape == (0, 30, 40)


def test_polygons_and_both_kinds_of_rle_are_the_same_mask(write_coco: Write, annotate: Annotate) -> None:
    polygons = [[3.2, 4.1, 20.7, 5.5, 12.3, 22.9], [25, 10, 35, 10, 35, 20, 25, 20]]
    mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, 30, 40)))
    pixels = mask.ravel(order="F")
    counts, value = [0], 0
    for pixel in pixels.tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    text = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    box = [3, 4, 32, 19]
    data = open_coco(
        *write_coco(
            [
                annotate(1, box, segmentation=polygons),
                annotate(2, box, segmentation={"size": [30, 40], "counts": counts}),
                annotate(3, box, segmentation={"size": [30, 40], "counts": text}),
            ]
        )
    )
    masks = data[0][1]["masks"]
    assert 100 < mask.sum() < 1000
    assert len(masks) == 3
    for one in masks:
        assert np.array_equal(one.numpy(), mask)
    truth = reference(data.ground_truth())
    for number in (1, 2, 3):
        assert np.array_equal(truth.annToMask(truth.anns[number]), mask)


INVALID_POLYGONS = {
    "polygon with fewer than 3 points": [[1, 1, 9, 9], []],
    "malformed polygon": [
        [1, 2, 3],
        [1, 2, 3, 4, 5, float("nan")],
        [float("nan"), 2, 3, 4, 5, 6],
        [1, 2, 3, 4, 5, float("-inf")],
        [1, 2, 3, 4, 5, 10**400],
        [0, 0, 1e30, 0, 0, 9],
        [True, 2, 3, 4, 5, 6],
        ["1"] * 6,
        7,
    ],
}


@pytest.mark.parametrize(("error", "polygons"), INVALID_POLYGONS.items())
def test_invalid_polygons_are_removed(error: str, polygons: list[Any]) -> None:
    good = [2, 3, 12, 3, 12, 23, 2, 23]
    for polygon in polygons:
        assert validate_segmentation([polygon, good], 30, 40) == [error]
        assert usable_segmentation([polygon, good], 30, 40) == [good]
        assert usable_segmentation([polygon], 30, 40) is None


def test_a_bad_polygon_is_left_out_of_a_mask(write_coco: Write, annotate: Annotate) -> None:
    good = [2, 3, 12, 3, 12, 23, 2, 23]
    data = open_coco(*write_coco([annotate(1, [2, 3, 10, 20], segmentation=[[1, 1, 9, 9], good])]))
    assert data[0][1]["masks"].sum() == 200
    assert data.ground_truth()["annotations"][0]["segmentation"] == [good]


def test_boxes_are_clipped(write_coco: Write, annotate: Annotate) -> None:
    data = open_coco(*write_coco([annotate(1, [-5, -6, 15, 16]), annotate(2, [35, 25, 15.5, 16])]))
    assert data[0][1]["boxes"].tolist() == [[0, 0, 10, 10], [35, 25, 40, 30]]
    assert [a["bbox"] for a in data.ground_truth()["annotations"]] == [[0, 0, 10, 10], [35, 25, 5, 5]], (
        "evaluated as trained"
    )


DROPPED = {
    "box without area": [[5, 5, 0, 5], [5, 5, 5, 0], [15, 5, -5, 5]],
    "box outside the image": [[40, 5, 5, 5], [-9, 5, 9, 5], [5, 31, 5, 5], [500, 500, 5, 5]],
    "box smaller than one pixel": [[5, 5, 0.9, 5], [5, 5, 5, 0.5], [39.5, 5, 9, 9]],
    "box is not four finite numbers": [
        [5, 5, float("nan"), 5],
        [5, float("inf"), 5, 5],
        [5, 5, 5],
        [5, 5, 5, "five"],
        [5, 5, 5, 10**400],
        "5 5 5 5",
    ],
}


def test_unusable_annotations_are_dropped_and_counted(write_coco: Write, annotate: Annotate) -> None:
    sound = annotate(1, [2, 3, 10, 20])
    boxes = [box for boxes in DROPPED.values() for box in boxes]
    annotations = [sound]
    annotations += [{**sound, "id": 100 + i, "bbox": box} for i, box in enumerate(boxes)]
    annotations += [{**sound, "id": 200 + i, "category_id": number} for i, number in enumerate([1, "x3", None, [3]])]
    annotations += [{**sound, "id": 300 + i, "image_id": number} for i, number in enumerate([1, "a.png", {}])]
    annotations += [{**sound, "id": 400, "iscrowd": 1}]
    annotations += [
        {**sound, "id": 500, "segmentation": []},
        {**sound, "id": 501, "segmentation": [[1, 2, 3, 4]]},
    ]
    annotations += [{key: value for key, value in sound.items() if key != "segmentation"} | {"id": 502}]
    data = open_coco(*write_coco(annotations))
    assert data.dropped == {reason: len(boxes) for reason, boxes in DROPPED.items()} | {
        "unknown category id": 4,
        "unknown image id": 3,
        "crowd": 1,
        "no usable mask": 3,
    }
    assert data[0][1]["boxes"].tolist() == [[2, 3, 12, 23]]
    assert data[0][1]["masks"].shape == (1, 30, 40)

    truth = data.ground_truth()
    not_evaluable = sum(map(len, (DROPPED["box is not four finite numbers"], range(4), range(3))))
    assert len(truth["annotations"]) == len(annotations) - not_evaluable
    assert all("segmentation" in a for a in truth["annotations"])
    assert [a["id"] for a in truth["annotations"] if not a["iscrowd"]] == [1], "what is left out is ignored"


def test_the_smallest_usable_box_has_one_pixel(write_coco: Write, annotate: Annotate) -> None:
    data = open_coco(*write_coco([annotate(1, [5, 5, 1, 1]), annotate(2, [39, 29, 5, 5])]))
    assert data.dropped == {}
    assert data[0][1]["boxes"].tolist() == [[5, 5, 6, 6], [39, 29, 40, 30]]


def test_a_data_set_without_masks(write_coco: Write, annotate: Annotate) -> None:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20], segmentation=[]), annotate(2, [2, 3, 9, 9])])
    assert open_coco(folder, file).dropped == {"no usable mask": 1}
    folder, file = write_coco(
        [annotate(1, [2, 3, 10, 20], segmentation=[]), annotate(2, [2, 3, 9, 9], segmentation=None)]
    )
    data = open_coco(folder, file)
    assert data.target_types == {"boxes"}
    assert data.dropped == {}
    assert set(data[0][1]) == {"image_id", "boxes", "labels", "original_size"}
    assert len(data[0][1]["boxes"]) == 2


def test_ground_truth_gives_pycocotools_what_it_needs(write_coco: Write, annotate: Annotate) -> None:
    triangle = [[10.0, 10.0, 20.0, 10.0, 10.0, 20.0]]
    annotations = [
        annotate(0, [10, 10, 10, 10], area=None, segmentation=triangle),  # id 0 means "no match" to pycocotools
        annotate(4, [1, 1, 5, 5], area=None, iscrowd=None, segmentation=None, category_id=7, image_id=5),
        annotate(4, [20, 1, 5, 5], category_id=7, image_id=5),
    ]
    data = open_coco(*write_coco(annotations))
    truth = data.ground_truth()
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3]
    assert truth["categories"] == [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    areas = [a["area"] for a in truth["annotations"]]
    assert areas == [coco_mask.area(coco_mask.frPyObjects(triangle, 30, 40)).item(), 25, 25]
    results = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "bbox": a["bbox"], "score": 1.0}
        for a in annotations
    ]
    assert evaluate(reference(truth), results, "bbox")[0] == pytest.approx(1)
    json.dumps(truth)


def test_valid_ids_are_kept(write_coco: Write, annotate: Annotate) -> None:
    data = open_coco(*write_coco([annotate(9, [2, 3, 10, 20]), annotate(4, [2, 3, 9, 9])]))
    assert [a["id"] for a in data.ground_truth()["annotations"]] == [9, 4]


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("", ["is not JSON"]),
        ('{"images": [', ["is not JSON"]),
        ("\x80", ["is not JSON"]),
        ("[" * 100_000, ["is not JSON"]),
        ("[1]", ["it holds a list, not an object"]),
        ("{}", ["it has no 'images'", "it has no 'annotations'", "it has no 'categories'"]),
        (
            '{"images": {}, "annotations": null, "categories": "x"}',
            ["'images' is an object", "'annotations' is null", "'categories' is a string"],
        ),
        (
            '{"images": [1, 2], "annotations": [[]], "categories": [{}]}',
            [r"images[0] is not an object (and 1 more)", "annotations[0] is not an object"],
        ),
    ],
)
def test_a_file_that_is_not_coco(tmp_path: Path, content: str, lines: list[str]) -> None:
    file = tmp_path / "instances.json"
    file.write_bytes(content.encode("latin-1"))
    found = lines_of(lambda: open_coco(tmp_path, file))
    assert len(found) == len(lines)
    for message, line in zip(found, lines, strict=True):
        assert str(file) in message
        assert line in message


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"images": [], "annotations": [], "categories": []}', encoding="utf-8-sig")
    assert read_coco(tmp_path / "a.json").images == []


@pytest.mark.parametrize(
    ("lists", "lines"),
    [
        ({"images": [], "categories": []}, ["'images' is empty", "'categories' is empty"]),
        (
            {
                "images": [
                    {"id": "one", "file_name": "a.png"},
                    {"id": 2},
                    {"id": 3, "file_name": "b", "width": 3},
                ]
            },
            ["images[0]: id is 'one', not an integer (and 2 more)"],
        ),
        ({"images": [{"id": 1, "file_name": "a.png", "height": 0, "width": 5}]}, ["height is 0"]),
        ({"images": [{"id": 1, "file_name": "a.png", "height": 5, "width": 5.5}]}, ["width is 5.5"]),
        ({"categories": [{"id": 1}]}, ["categories[0]: name is None"]),
        ({"categories": [{"id": 3, "name": "a"}, {"id": 3, "name": "b"}]}, ["2 categories have the id 3"]),
        (
            {"images": [{"id": 1, "file_name": "a.png", "height": 5, "width": 5}] * 2},
            ["2 images have the id 1"],
        ),
        (
            {"images": [{"id": 1, "file_name": "../a.png", "height": 5, "width": 5}]},
            ["'../a.png' (id 1) is outside"],
        ),
        (
            {"images": [{"id": 1, "file_name": "/etc/passwd", "height": 5, "width": 5}]},
            ["'/etc/passwd' (id 1) is outside"],
        ),
    ],
)
def test_entries_without_which_there_is_no_index(
    write_coco: Write, annotate: Annotate, lists: dict[str, Any], lines: list[str]
) -> None:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20])], **lists)
    found = lines_of(lambda: open_coco(folder, file))
    assert len(found) == len(lines)
    for message, line in zip(found, lines, strict=True):
        assert line in message
        assert "check-data" in message


def test_names_that_stay_inside_the_folder(write_coco: Write, annotate: Annotate) -> None:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20])])
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = "sub/../a.png"
    content["images"][1]["file_name"] = str(folder.absolute() / "sub" / "b.jpg")
    file.write_text(json.dumps(content))
    data = open_coco(folder, file)
    assert [target["image_id"] for _, target in (data[0], data[1])] == [11, 5]


def test_no_usable_objects(write_coco: Write, annotate: Annotate) -> None:
    folder, file = write_coco([annotate(1, [5, 5, 0, 5]), annotate(2, [5, 5, 9, 9], category_id=99)])
    [line] = lines_of(lambda: open_coco(folder, file))
    assert "no usable object" in line
    assert "box without area: 1" in line
    assert "unknown category id: 1" in line
    folder, file = write_coco([])
    [line] = lines_of(lambda: open_coco(folder, file))
    assert "no annotations" in line
    folder, file = write_coco([annotate(1, [5, 5, 9, 9], iscrowd=1)])
    assert "crowd: 1" in lines_of(lambda: open_coco(folder, file))[0]


def test_images_are_looked_at_when_they_are_read(write_coco: Write, annotate: Annotate) -> None:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20])])
    data = open_coco(folder, file)
    Image.new("RGB", (30, 40)).save(folder / "a.png")
    [line] = lines_of(lambda: data[0])
    assert str(folder / "a.png") in line
    assert "30x40 pixels" in line
    assert "40x30" in line
    assert "check-data" in line
    (folder / "a.png").unlink()
    [line] = lines_of(lambda: data[0])
    assert line.startswith(f"no such image: {folder / 'a.png'} (image 11); run `e3va check-data`")
    half = (folder / "sub" / "b.jpg").read_bytes()[:400]
    (folder / "sub" / "b.jpg").write_bytes(half)
    [line] = lines_of(lambda: data[1])
    assert "cannot read the image" in line
    assert "b.jpg" in line


def test_missing_folder_and_file(write_coco: Write, annotate: Annotate, tmp_path: Path) -> None:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20])])
    assert "no such folder of images" in lines_of(lambda: open_coco(tmp_path / "x", file))[0]
    assert "cannot read" in lines_of(lambda: open_coco(folder, tmp_path / "x.json"))[0]


def test_paths(write_coco: Write, tmp_path: Path) -> None:
    folder, file = write_coco([])
    assert coco_paths(tmp_path, "images", "instances.json") == (folder, file)
    [line] = lines_of(lambda: coco_paths(tmp_path / "coco", "images", "instances.json"))
    assert f"no such data root: {tmp_path / 'coco'}" in line
    lines = lines_of(lambda: coco_paths(tmp_path, "train2017", "annotations/train.json"))
    assert len(lines) == 2
    for line in lines:
        assert line.endswith(f"{tmp_path} contains images/, instances.json")


def test_transforms_get_both(write_coco: Write, annotate: Annotate) -> None:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20])])
    image, target = open_coco(folder, file, transforms=v2.RandomHorizontalFlip(p=1))[0]
    assert target["boxes"].tolist() == [[28, 3, 38, 23]]
    assert target["masks"][0, 5, 28:38].all()
    assert target["masks"].sum() == 200
    assert target["original_size"] == (30, 40)
    assert torch.equal(image, open_coco(folder, file)[0][0].flip(-1))


def test_items_are_the_same_in_a_worker(write_coco: Write, annotate: Annotate) -> None:
    data = open_coco(*write_coco([annotate(1, [2, 3, 10, 20]), annotate(2, [1, 1, 9, 9], image_id=5)]))
    loader = DataLoader(data, batch_size=None, num_workers=1)
    for (image, target), (other, expected) in zip(loader, (data[0], data[1]), strict=True):
        assert torch.equal(image, other)
        assert target.keys() == expected.keys()
        assert torch.equal(target["boxes"], expected["boxes"])
        assert torch.equal(target["masks"], expected["masks"])
    again = pickle.loads(pickle.dumps(data))
    assert again.ground_truth() == data.ground_truth()


def test_a_missing_index_ends_iteration(write_coco: Write, annotate: Annotate) -> None:
    data = open_coco(*write_coco([annotate(1, [2, 3, 10, 20])]))
    assert len(list(data)) == 2
    with pytest.raises(IndexError):
        data[2]


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_real_data_agrees_with_pycocotools(coco_tiny: Path, split: str) -> None:
    folder, file = coco_paths(coco_tiny, split, f"annotations/instances_{split}.json")
    data = open_coco(folder, file)
    raw = json.loads(file.read_text())
    truth = reference(raw)
    assert len(data) == len(raw["images"]) == 80
    assert data.category_ids == sorted(truth.cats)
    assert data.classes[data.category_ids.index(90)] == "toothbrush"
    assert data.dropped == {"crowd": sum(a["iscrowd"] for a in raw["annotations"])}
    with_crowd = {a["image_id"] for a in raw["annotations"] if a["iscrowd"]}
    for index in range(len(data)):
        if index % 10 and raw["images"][index]["id"] not in with_crowd:
            continue
        image, target = data[index]
        entry = truth.imgs[target["image_id"]]
        objects = [a for a in truth.imgToAnns[entry["id"]] if not a["iscrowd"]]
        assert image.shape == (3, entry["height"], entry["width"])
        assert [data.category_ids[label - 1] for label in target["labels"]] == [a["category_id"] for a in objects]
        for box, mask, expected in zip(target["boxes"], target["masks"], objects, strict=True):
            assert np.array_equal(mask.numpy(), truth.annToMask(expected))
            x, y, w, h = expected["bbox"]
            assert box.tolist() == pytest.approx([x, y, x + w, y + h], abs=0.02)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_evaluation_is_that_of_the_file(coco_tiny: Path, kind: str) -> None:
    folder, file = coco_paths(coco_tiny, "val2017", "annotations/instances_val2017.json")
    truth = open_coco(folder, file).ground_truth()
    raw = reference(json.loads(file.read_text()))
    random = np.random.default_rng(0)
    results = []
    for annotation in raw.dataset["annotations"]:
        result = {key: annotation[key] for key in ("image_id", "category_id")} | {"score": random.random()}
        if kind == "bbox":
            result["bbox"] = (np.array(annotation["bbox"]) * random.uniform(0.9, 1.1, 4)).tolist()
        else:
            result["segmentation"] = raw.annToRLE(annotation)
        results.append(result)
    ours, theirs = evaluate(reference(truth), results, kind), evaluate(raw, results, kind)
    assert np.array_equal(ours, theirs)
    assert 0.1 < ours[0] <= 1


@pytest.mark.parametrize("crowd", [0, 1])
def test_images_without_objects_can_be_left_out_of_training(write_coco: Write, annotate: Annotate, crowd: int) -> None:
    """Of the two images, number 5 has no annotation or a crowd alone: nothing to train on."""
    others = [annotate(2, [3, 3, 9, 9], image_id=5, iscrowd=1)] * crowd
    folder, file = write_coco([annotate(1, [2, 3, 10, 20], image_id=11), *others])
    names = {f"{split}_{kind}": str(path) for split in ("train", "val") for kind, path in _kinds(folder, file)}
    for filter_empty, left in ((False, [11, 5]), (True, [11])):
        source = options_of("dataset", name="coco", root="/", filter_empty=filter_empty, **names)
        train, val = source.open("train", None), source.open("val", None)
        assert [train[index][1]["image_id"] for index in range(len(train))] == left
        assert train.num_filtered_images == 2 - len(left)
        assert train.image_size(0) == (30, 40) and len(train[0][1]["boxes"]) == 1
        assert len(val) == 2 and val.num_filtered_images == 0, "evaluation has all"
    assert train.dropped == ({"crowd": 1} if crowd else {})


def _kinds(folder: Path, file: Path) -> list[tuple[str, Path]]:
    return [("images", folder), ("annotations", file)]
