"""Annotations for training and evaluation: which are objects, which are crowds, and which are dropped."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from e3va_cli.data.formats.coco_file import (
    CocoFile,
    box_of,
    clip_box,
    exceeds_image,
    is_area,
    is_integer,
    is_known_id,
    validate_box,
)
from e3va_cli.data.formats.coco_segmentation import to_rle, usable_segmentation
from e3va_cli.data.formats.coco_values import Entry

IGNORED = "ignored"
USUAL_CROWDS = 0.1  # of all annotations; COCO has 1 % and hardly ever two of a class in an image


def crowds_as_objects(coco: CocoFile) -> CocoFile:
    """Return the annotations with `iscrowd` set to 0."""
    return replace(coco, annotations=[{**annotation, "iscrowd": 0} for annotation in coco.annotations])


def with_images(coco: CocoFile, images: list[Entry]) -> CocoFile:
    """Return the file with some of its image entries only, and without the annotations of the others."""
    kept = {id(image) for image in images}
    others = {image["id"] for image in coco.images if id(image) not in kept and is_integer(image.get("id"))}
    of_others = (is_integer(one.get("image_id")) and one["image_id"] in others for one in coco.annotations)
    annotations = [one for one, other in zip(coco.annotations, of_others, strict=True) if not other]
    return replace(coco, images=images, annotations=annotations)


def crowd_warning(coco: CocoFile) -> str | None:
    """Return a warning where annotations with `iscrowd` 1 are probably single objects, else None.

    CVAT writes `iscrowd` 1 for every brush mask (https://docs.cvat.ai/docs/manual/advanced/formats/format-coco/).
    """
    crowds = [annotation for annotation in coco.annotations if annotation.get("iscrowd")]
    per_class = Counter(f"{annotation.get('image_id')} {annotation.get('category_id')}" for annotation in crowds)
    if len(crowds) < USUAL_CROWDS * len(coco.annotations) or max(per_class.values(), default=0) < 2:
        return None
    return (
        f"{len(crowds):,} of {len(coco.annotations):,} annotations have iscrowd 1, so they are not trained on and are "
        "ignored in evaluation (CVAT writes it for each brush mask); if each is one object, set "
        "dataset.use_iscrowd=false"
    )


def group_by_image(coco: CocoFile, label: dict[int, int], dropped: Counter[str]) -> dict[int, list[Entry]]:
    """Return the annotations of known categories by image id; count all others in `dropped`."""
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
    """Cleans annotations and counts them by drop reason (None if there is none) and by whether they have a mask."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str | None, bool]] = Counter()
        self._per_image: list[tuple[int, int]] = []  # usable objects, and those with a mask

    def add(self, annotations: list[Entry], image: Entry) -> list[Entry]:
        """Return the cleaned annotations of one more image."""
        entries = [_cleaned(annotation, image) for annotation in annotations]
        counts = Counter(
            (drop_reason(entry, image["height"], image["width"]), "segmentation" in entry) for entry in entries
        )
        self.counts.update(counts)
        self._per_image.append((counts[None, False] + counts[None, True], counts[None, True]))
        return entries

    def usable(self, *, masks: bool) -> NDArray[np.int64]:
        """Return the number of usable objects per image, for heads with or without masks."""
        return np.array(self._per_image, dtype=np.int64).reshape(-1, 2)[:, int(masks)]

    def dropped(self, ignored: str, *, masks: bool) -> Counter[str]:
        """Return the number of annotations that are not trained on by reason; `ignored` is the reason of crowds."""
        dropped = Counter({"no usable mask": self.counts[None, False]} if masks else {})
        for (error, _), count in self.counts.items():
            if error:
                dropped[ignored if error == IGNORED else error] += count
        return dropped


def _cleaned(annotation: Entry, image: Entry) -> Entry:
    """Return the keys of an annotation that training and evaluation use.

    `bbox` is None unless it is four finite numbers; a missing `id` becomes 0, pycocotools' "no match".
    """
    height, width = image["height"], image["width"]
    number = annotation.get("id", 0)
    entry: Entry = {
        "id": number if is_integer(number) else 0,
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
    """Return the area of the mask or else of the box, in pixels, for COCO's small, medium and large objects."""
    if "segmentation" in entry:
        return float(coco_mask.area(to_rle(entry["segmentation"], height, width)))
    return entry["bbox"][2] * entry["bbox"][3] if entry["bbox"] else 0.0


def drop_reason(entry: Entry, height: int, width: int) -> str | None:
    """Return why an annotation is not trained on, or None; masks are not considered."""
    return IGNORED if entry["iscrowd"] else validate_box(entry["bbox"], height, width)


def is_training_object(entry: Entry, height: int, width: int, *, masks: bool) -> bool:
    """Return whether heads with or without masks are trained on a cleaned annotation."""
    return not drop_reason(entry, height, width) and ("segmentation" in entry or not masks)


def to_ground_truth(entry: Entry, height: int, width: int, *, masks: bool, crowds: bool = True) -> Entry:
    """Return an annotation for evaluation: `iscrowd` marks what is neither hit nor miss, as training drops it.

    Objects that are ignored but no crowd have `ignore`; with `crowds=False`, all ignored objects do. Boxes that exceed
    the image are clipped, as in training. An object that is ignored for lack of a mask gets its box as mask.
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
