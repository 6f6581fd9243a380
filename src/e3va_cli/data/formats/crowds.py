"""Annotations with `iscrowd` 1: groups that nobody took apart in COCO, single objects in what some tools export.

COCO has at most a few in a hundred, and hardly ever two of one class in an image. CVAT writes `iscrowd` 1 for each mask
that was drawn with its brush (https://docs.cvat.ai/docs/manual/advanced/formats/format-coco/).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from e3va_cli.data.formats.coco_file import CocoFile

USUAL = 0.1  # of the annotations at most


def crowds_as_objects(coco: CocoFile) -> CocoFile:
    """The same annotations, none of them a crowd."""
    return replace(coco, annotations=[{**annotation, "iscrowd": 0} for annotation in coco.annotations])


def crowd_warning(coco: CocoFile) -> str | None:
    """What to say where crowds may well be single objects."""
    crowds = [annotation for annotation in coco.annotations if annotation.get("iscrowd")]
    in_one = Counter(f"{annotation.get('image_id')} {annotation.get('category_id')}" for annotation in crowds)
    if len(crowds) < USUAL * len(coco.annotations) or max(in_one.values(), default=0) < 2:
        return None
    return (
        f"{len(crowds):,} of {len(coco.annotations):,} annotations have iscrowd 1: they are not trained on, and "
        "evaluation ignores them; CVAT writes it for each brush mask; if each is one object: dataset.use_iscrowd=false"
    )
