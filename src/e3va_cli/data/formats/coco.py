"""Data sets in COCO's format for detection and instance segmentation (https://cocodataset.org/#format-data)."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from e3va_cli.components.options import option
from e3va_cli.data.dataset import DETECTION, Target
from e3va_cli.data.encoded_masks import EncodedMasks
from e3va_cli.data.file_names import resolve_names
from e3va_cli.data.fingerprint import Fingerprint, digest, sample_file_sizes
from e3va_cli.data.formats.base import DATASET_FORMATS, DatasetFormat, Split
from e3va_cli.data.formats.coco_file import (
    CocoFile,
    check_entries,
    clip_box,
    coco_paths,
    read_coco,
    rename_images,
)
from e3va_cli.data.formats.coco_objects import (
    ObjectCounts,
    crowd_warning,
    crowds_as_objects,
    group_by_image,
    is_training_object,
    to_ground_truth,
    with_images,
)
from e3va_cli.data.formats.held_back import HeldBackOptions
from e3va_cli.data.images.formats import KNOWN_SUFFIXES, describe_unsupported, unsupported_format
from e3va_cli.data.images.intensity import ImageFileOptions, IntensityScaling
from e3va_cli.data.images.reading import DEFAULT_SCALING, read_image
from e3va_cli.data.paths import safe_join
from e3va_cli.data.serialized_list import SerializedList
from e3va_cli.data.transforms import DetectionTransforms, ResizeFirst
from e3va_cli.data.validation.coco import check_coco_file
from e3va_cli.data.validation.image_survey import survey_images
from e3va_cli.data.validation.issues import ADVICE, Progress, Report
from e3va_cli.errors import UserError


class CocoDetection(Dataset[tuple[tv_tensors.Image, Target]]):
    """Images with boxes, labels and, if the file has any, masks; see `dataset.Target`.

    Labels number the categories by ascending id, from 1. Crowds, invalid boxes and, for heads with masks, objects
    without a mask are dropped from the targets and counted in `dropped`; images without objects stay. An object without
    a box gets that of its mask.

    Args:
        coco: the annotations.
        images: the folder that file names are relative to.
        name: of the annotations in messages.
        ignored: key in `dropped` of objects with `iscrowd`.
        dropped: further annotations that are not trained on, by reason.
        targets: what the head needs of boxes and masks.
        scaling: of images of more than 8 bits.
        transforms: of (image, target) pairs.

    Raises:
        UserError: the folder or an image is missing, or no object can be trained on. On access to an item: its image is
            corrupt, or of another size than annotated.
    """

    def __init__(
        self,
        coco: CocoFile,
        images: Path,
        *,
        name: str,
        ignored: str = "crowd",
        dropped: Mapping[str, int] | None = None,
        targets: Collection[str] = DETECTION,
        scaling: IntensityScaling = DEFAULT_SCALING,
        transforms: Callable[[tv_tensors.Image, Target], tuple[Any, Target]] | None = None,
    ) -> None:
        if not images.is_dir():
            raise UserError(f"no such folder of images: {images}")
        check_entries(coco, images, name)
        coco = _with_files(coco, images, name)
        self.images = images
        self._has_crowds = ignored == "crowd"  # what `iscrowd` marks
        self.transforms, self.scaling = transforms, scaling
        self.num_filtered_images = 0
        categories = sorted(coco.categories, key=lambda category: category["id"])
        self.classes: list[str] = [category["name"] for category in categories]
        self.category_ids: list[int] = [category["id"] for category in categories]
        self._label = {number: label for label, number in enumerate(self.category_ids, start=1)}
        self._image_ids = np.array([image["id"] for image in coco.images])
        self._sizes = np.array([(image["height"], image["width"]) for image in coco.images])
        self._file_names = SerializedList(image["file_name"] for image in coco.images)

        reasons: Counter[str] = Counter(dropped)
        by_image = group_by_image(coco, self._label, reasons)
        counts = ObjectCounts()
        self._objects = SerializedList(counts.add(by_image.pop(image["id"]), image) for image in coco.images)
        self.target_types = frozenset(DETECTION if counts.counts[None, True] else {"boxes"})
        self._targets = self.target_types & set(targets)
        masks = "masks" in self._targets
        self.objects_per_image = counts.usable(masks=masks)
        reasons += counts.dropped(ignored, masks=masks)
        self.dropped: dict[str, int] = dict(reasons.most_common())
        if not self.objects_per_image.any():
            listed = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
            raise UserError(f"{name} has no usable object ({listed or 'no annotations'}); {ADVICE}")
        self.notes: list[str] = []
        if without := reasons["no usable mask"]:
            objects = without + int(self.objects_per_image.sum())
            self.notes.append(
                f"{name}: {without:,} of {objects:,} objects have no mask and are ignored in training and "
                "evaluation; head=retinanet needs no masks and uses all of them"
            )
        survey = survey_images(len(self), self._file_and_size)
        self._orient_ambiguous = survey.orient_ambiguous
        self.notes += survey.notes(name, scaling)
        if ignored == "crowd" and (warning := crowd_warning(coco)):
            self.notes.append(f"{name}: {warning}")

    def __len__(self) -> int:
        return len(self._file_names)

    def _file_and_size(self, index: int) -> tuple[Path, tuple[int, int]]:
        """Return the path of an image, and the (H, W) that is annotated."""
        path = safe_join(self.images, self._file_names[index])
        assert path is not None
        return path, self.image_size(index)

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]:
        path, (height, width) = self._file_and_size(index)
        number = int(self._image_ids[index])
        try:
            image = read_image(path, self.scaling, (height, width), orient_ambiguous=self._orient_ambiguous)
        except UserError as error:
            raise UserError(f"{error} (image {number}); {ADVICE}") from error
        if image.shape[1:] != (height, width):
            size = f"{image.shape[2]}x{image.shape[1]}"
            raise UserError(f"{path} (image {number}) has {size} pixels, but {width}x{height} are annotated; {ADVICE}")
        target = self._target(index, height, width)
        if "masks" in target and not isinstance(self.transforms, ResizeFirst):
            target["masks"] = target["masks"].at((height, width))
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def fingerprint(self) -> Fingerprint:
        """See `DenseDataset`."""
        sizes = sample_file_sizes(len(self), lambda index: self._file_and_size(index)[0])
        objects = (
            (number, *size, entries)
            for number, size, entries in zip(self._image_ids.tolist(), self._sizes.tolist(), self._objects, strict=True)
        )
        return Fingerprint(len(self), digest(self._file_names, sizes), digest(objects))

    def image_size(self, index: int) -> tuple[int, int]:
        """Return the annotated (H, W) in pixels."""
        height, width = self._sizes[index].tolist()
        return height, width

    def ground_truth(self, targets: Collection[str] | None = None) -> dict[str, Any]:
        """See `DetectionDataset`; annotations get new ids where theirs are not unique, or 0."""
        images = [
            {"id": number, "file_name": self._file_names[i], "height": height, "width": width}
            for i, (number, (height, width)) in enumerate(
                zip(self._image_ids.tolist(), self._sizes.tolist(), strict=True)
            )
        ]
        masks = "masks" in (self._targets if targets is None else self.target_types & set(targets))
        annotations = [
            to_ground_truth(entry, image["height"], image["width"], masks=masks, crowds=self._has_crowds)
            for objects, image in zip(self._objects, images, strict=True)
            for entry in objects
            if entry["bbox"] is not None
        ]
        if 0 in (ids := {entry["id"] for entry in annotations}) or len(ids) < len(annotations):
            for number, entry in enumerate(annotations, start=1):
                entry["id"] = number
        categories = [
            {"id": number, "name": name} for number, name in zip(self.category_ids, self.classes, strict=True)
        ]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}

    def filter_empty(self) -> None:
        """Keep only images with objects to train on; count the others in `num_filtered_images`."""
        kept = [index for index in range(len(self)) if self._training_objects(index)]
        self.num_filtered_images += len(self) - len(kept)
        self._image_ids, self._sizes = self._image_ids[kept], self._sizes[kept]
        self.objects_per_image = self.objects_per_image[kept]
        self._file_names = SerializedList(self._file_names[index] for index in kept)
        self._objects = SerializedList(self._objects[index] for index in kept)

    def _training_objects(self, index: int) -> list[dict[str, Any]]:
        """Return the objects in the target of an image."""
        size, masked = self.image_size(index), "masks" in self._targets
        return [entry for entry in self._objects[index] if is_training_object(entry, *size, masks=masked)]

    def _target(self, index: int, height: int, width: int) -> Target:
        masked = "masks" in self._targets
        objects = self._training_objects(index)
        corners = [clip_box(entry["bbox"], height, width) for entry in objects]
        target: Target = {
            "image_id": int(self._image_ids[index]),
            "boxes": tv_tensors.BoundingBoxes(
                torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
                format=tv_tensors.BoundingBoxFormat.XYXY,
                canvas_size=(height, width),
            ),
            "labels": torch.tensor([self._label[entry["category_id"]] for entry in objects], dtype=torch.int64),
            "original_size": (height, width),
        }
        if masked:
            target["masks"] = EncodedMasks([entry["segmentation"] for entry in objects], (height, width))
        return target


def _with_files(coco: CocoFile, images: Path, name: str) -> CocoFile:
    """Return the annotations with file names as on disk.

    Raises:
        UserError: images are missing, or of formats that cannot be read.
    """
    found = resolve_names(images, (image["file_name"] for image in coco.images), KNOWN_SUFFIXES)
    if found.missing:
        raise UserError(
            f"{name}: no such image: {len(found.missing):,} of {len(coco.images):,} are not in {images}: "
            f"{found.describe_missing()}; {ADVICE}"
        )
    coco = rename_images(coco, found.resolved)
    files = (image["file_name"] for image in coco.images)
    unread = [file for file in files if describe_unsupported([file]) and unsupported_format(images / file)]
    if unread:
        raise UserError(f"{name}: lists {describe_unsupported(unread)}; {ADVICE}")
    return coco


def open_coco(
    images: Path,
    annotations: Path,
    *,
    targets: Collection[str] = DETECTION,
    scaling: IntensityScaling = DEFAULT_SCALING,
    use_iscrowd: bool = True,
    select: Callable[[list[Any]], list[Any]] = list,
    transforms: Callable[..., tuple[Any, Target]] | None = None,
) -> CocoDetection:
    """Open a folder of images with the annotations in a JSON file.

    Args:
        images: folder.
        annotations: file.
        targets: what the head needs of boxes and masks.
        scaling: of images of more than 8 bits.
        use_iscrowd: whether annotations with `iscrowd` 1 are crowds, else they are objects.
        select: returns those of the image entries that belong to the split; all by default.
        transforms: of (image, target) pairs.

    Raises:
        UserError: the file is not in COCO's format, or see `CocoDetection`.
    """
    name, coco = str(annotations), read_coco(annotations)
    if not use_iscrowd:
        coco = crowds_as_objects(coco)
    coco = with_images(coco, select(coco.images))
    return CocoDetection(coco, images, name=name, targets=targets, scaling=scaling, transforms=transforms)


@DATASET_FORMATS.register("coco")
@dataclass
class CocoFormat(HeldBackOptions, ImageFileOptions, DetectionTransforms, DatasetFormat):
    """Images in folders and COCO annotation files, relative to `root`."""

    target_types: ClassVar[frozenset[str]] = DETECTION
    usual_classes: ClassVar[int] = 80

    root: str = option(help="folder that contains the four below")
    train_images: str = option(help="folder")
    train_annotations: str = option(help="file")
    val_images: str = option(help="folder")
    val_annotations: str = option(help="file")
    use_iscrowd: bool = option(
        True,
        help="iscrowd 1 marks crowds, which are ignored; false: they are objects, such as CVAT's brush masks",
        legacy_value=True,
    )
    filter_empty: bool = option(
        False, help="train without images that have no objects", legacy_value=False, training_only=True
    )

    def _paths(self, split: Split) -> tuple[Path, Path]:
        if self.source_of(split) == "train":
            return coco_paths(Path(self.root), self.train_images, self.train_annotations)
        return coco_paths(Path(self.root), self.val_images, self.val_annotations)

    def open(
        self, split: Split, transforms: Callable[..., Any] | None = None, *, targets: Collection[str] = DETECTION
    ) -> CocoDetection:
        """Open a split; `filter_empty` applies to training only."""
        images, annotations = self._paths(split)
        dataset = open_coco(
            images,
            annotations,
            targets=targets,
            scaling=self.scaling,
            use_iscrowd=self.use_iscrowd,
            select=partial(self.select, split),
            transforms=transforms,
        )
        if self.filter_empty and split == "train":
            dataset.filter_empty()
        return dataset

    def check(self, split: Split, progress: Progress | None = None, *, targets: Collection[str] = DETECTION) -> Report:
        """Check every annotation and decode every image."""
        images, annotations = self._paths(split)
        return check_coco_file(
            images,
            annotations,
            targets=targets,
            scaling=self.scaling,
            use_iscrowd=self.use_iscrowd,
            progress=progress,
        )
