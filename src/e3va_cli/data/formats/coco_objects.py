"""The annotations of an image as training and evaluation take them, and which of them are objects."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from e3va_cli.data.formats.coco_file import (
    CocoFile,
    Entry,
    box_of,
    clip_box,
    exceeds_image,
    is_area,
    is_known_id,
    is_whole,
    to_rle,
    usable_segmentation,
    validate_box,
)

IGNORED = "ignored"


def group_by_image(coco: CocoFile, label: dict[int, int], dropped: Counter[str]) -> dict[int, list[Entry]]:
    """The annotations of known categories, by the id of their image; counts the others in `dropped`."""
    by_image: dict[int, list[Entry]] = {image["id"]: [] for image in coco.images}
    for annotation in coco.annotations:
        if not is_known_id(annotation.get("image_id"), by_image):
            dropped["unknown image id"] += 1
        elif not is_known_id(annotation.get("category_id"), label):
            dropped["unknown category id"] += 1
        else:
            by_image[annotation["image_id"]].append(annotation)
    return by_image


class ObjectCounts:
    """The objects of a data set, counted as its annotations are cleaned.

    Attributes:
        kinds: annotations by what is wrong with them, if anything, and whether they have a usable mask.
    """

    def __init__(self) -> None:
        self.kinds: Counter[tuple[str | None, bool]] = Counter()
        self._per_image: list[tuple[int, int]] = []  # usable objects, and those with a mask

    def add(self, annotations: list[Entry], image: Entry) -> list[Entry]:
        """The annotations of one more image, cleaned."""
        entries = [_cleaned(annotation, image) for annotation in annotations]
        kinds = Counter(
            (drop_reason(entry, image["height"], image["width"]), "segmentation" in entry) for entry in entries
        )
        self.kinds.update(kinds)
        self._per_image.append((kinds[None, False] + kinds[None, True], kinds[None, True]))
        return entries

    def usable(self, *, masks: bool) -> NDArray[np.int64]:
        """How many objects of each image can be trained on, by heads with or without masks."""
        return np.array(self._per_image, dtype=np.int64).reshape(-1, 2)[:, int(masks)]

    def left_out(self, ignored: str, *, masks: bool) -> Counter[str]:
        """How many annotations cannot be trained on, by reason; `ignored` is that of crowds."""
        found = Counter({"no usable mask": self.kinds[None, False]} if masks else {})
        for (error, _), count in self.kinds.items():
            if error:
                found[ignored if error == IGNORED else error] += count
        return found


def _cleaned(annotation: Entry, image: Entry) -> Entry:
    """What training and evaluation need of an annotation.

    `bbox` is None where it is not four finite numbers; `id` is 0, pycocotools' "no match", where it has none.
    """
    height, width = image["height"], image["width"]
    number = annotation.get("id", 0)
    entry: Entry = {
        "id": number if is_whole(number) else 0,
        "image_id": image["id"],
        "category_id": int(annotation["category_id"]),
        "iscrowd": int(bool(annotation.get("iscrowd", 0))),
    }
    segmentation = usable_segmentation(annotation.get("segmentation"), height, width)
    entry["bbox"] = box_of(annotation, segmentation, height, width)
    if segmentation is not None:
        entry["segmentation"] = segmentation
    area = annotation.get("area")
    entry["area"] = area if is_area(area) else _area(entry, height, width)
    return entry


def _area(entry: Entry, height: int, width: int) -> float:
    """Pixels, by which COCO tells small from large objects: of the mask, or else of the box."""
    if "segmentation" in entry:
        return float(coco_mask.area(to_rle(entry["segmentation"], height, width)))
    return entry["bbox"][2] * entry["bbox"][3] if entry["bbox"] else 0.0


def drop_reason(entry: Entry, height: int, width: int) -> str | None:
    """Why an annotation is left out of training, or None; masks aside."""
    return IGNORED if entry["iscrowd"] else validate_box(entry["bbox"], height, width)


def is_training_object(entry: Entry, height: int, width: int, *, masks: bool) -> bool:
    """Whether heads with or without masks learn from a cleaned annotation."""
    return not drop_reason(entry, height, width) and ("segmentation" in entry or not masks)


def to_ground_truth(entry: Entry, height: int, width: int, *, masks: bool, crowds: bool = True) -> Entry:
    """An annotation as evaluation takes it: what training leaves out has `iscrowd`, neither a hit nor a miss.

    Only some of these are crowds, any part of which is no miss. The others are single objects, with `ignore`; all of
    them where `iscrowd` marks no `crowds`.
    Boxes that leave the image end at its edge, as in training. An object that is ignored for lack of a mask has its box
    for one.
    """
    x, y, w, h = entry["bbox"]
    if exceeds_image((x, y, w, h), height, width):
        x1, y1, x2, y2 = clip_box((x, y, w, h), height, width)
        x, y, w, h = x1, y1, x2 - x1, y2 - y1
    truth = {**entry, "bbox": [x, y, w, h]}
    if not is_training_object(entry, height, width, masks=masks):
        truth["ignore"] = int(not (crowds and entry["iscrowd"]))
        truth["iscrowd"] = 1
        if masks and "segmentation" not in entry:
            truth["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return truth
