"""Any data set in COCO's format, for detection and instance segmentation (https://cocodataset.org/#format-data)."""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
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
from e3va_cli.data.formats.coco_objects import ObjectCounts, group_by_image, is_training_object, to_ground_truth
from e3va_cli.data.formats.crowds import crowd_warning, crowds_as_objects
from e3va_cli.data.images.formats import KNOWN_SUFFIXES, describe_unsupported, unsupported_format
from e3va_cli.data.images.intensity import ImageFileOptions, IntensityScaling
from e3va_cli.data.images.reading import DEFAULT_SCALING, read_image
from e3va_cli.data.paths import safe_join
from e3va_cli.data.serialized_list import SerializedList
from e3va_cli.data.transforms import DetectionTransforms, ResizeFirst
from e3va_cli.data.validation.coco import check_coco_file
from e3va_cli.data.validation.image_survey import survey_images
from e3va_cli.data.validation.issues import ADVICE, Report
from e3va_cli.errors import UserError


class CocoDetection(Dataset[tuple[tv_tensors.Image, Target]]):
    """Images with boxes, labels and, where the file has any, masks; see `targets.Target`.

    Labels count the categories in the order of their ids, from 1. Crowds, unusable boxes and, where masks are wanted
    and the data set has some, objects without a mask are left out of the targets and counted in `dropped`; images
    without objects stay. An object without a box has that of its mask.

    Args:
        coco: the content of the annotations; nothing of it is kept but what items and evaluation need
        images: the folder that the file names refer to; the files in it are looked for when they are read
        name: what the annotations are called in messages
        ignored: the reason that `dropped` gives for objects that an evaluation ignores
        left_out: further annotations that training does without: how many, by reason
        targets: what is wanted of boxes and masks; an object lacks nothing that is not wanted
        scaling: of images of more than 8 bits
        transforms: called with the image and the target, returns both

    Raises:
        UserError: the folder is missing, or the annotations hold nothing to train on. When an item is read: its
            image is missing, broken or of another size than the annotations say.
    """

    def __init__(
        self,
        coco: CocoFile,
        images: Path,
        *,
        name: str,
        ignored: str = "crowd",
        left_out: Mapping[str, int] | None = None,
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

        dropped: Counter[str] = Counter(left_out)
        by_image = group_by_image(coco, self._label, dropped)
        census = ObjectCounts()
        self._objects = SerializedList(census.add(by_image.pop(image["id"]), image) for image in coco.images)
        self.target_types = frozenset(DETECTION if census.kinds[None, True] else {"boxes"})
        self._targets = self.target_types & set(targets)
        masks = "masks" in self._targets
        self.objects_per_image = census.usable(masks=masks)
        dropped += census.left_out(ignored, masks=masks)
        self.dropped: dict[str, int] = dict(dropped.most_common())
        if not self.objects_per_image.any():
            reasons = ", ".join(f"{reason}: {count}" for reason, count in self.dropped.items())
            raise UserError(f"{name} holds no usable object ({reasons or 'no annotations'}); {ADVICE}")
        self.notes: list[str] = []
        if without := dropped["no usable mask"]:
            objects = without + int(self.objects_per_image.sum())
            self.notes.append(
                f"{name}: {without:,} of {objects:,} objects have no mask: left out of training, ignored in "
                "evaluation; head=retinanet, which needs no masks, takes them all"
            )
        survey = survey_images(len(self), self._file_and_size)
        self._orient_ambiguous = survey.orient_ambiguous
        self.notes += survey.notes(name, scaling)
        if ignored == "crowd" and (doubt := crowd_warning(coco)):
            self.notes.append(f"{name}: {doubt}")

    def __len__(self) -> int:
        return len(self._file_names)

    def _file_and_size(self, index: int) -> tuple[Path, tuple[int, int]]:
        """An image, and the (H, W) of its annotations."""
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
            found = f"{image.shape[2]}x{image.shape[1]} pixels"
            raise UserError(f"{path} (image {number}) has {found}, the annotations say {width}x{height}; {ADVICE}")
        target = self._target(index, height, width)
        if "masks" in target and not isinstance(self.transforms, ResizeFirst):
            target["masks"] = target["masks"].at((height, width))
        return (image, target) if self.transforms is None else self.transforms(image, target)

    def fingerprint(self) -> Fingerprint:
        """See `targets.DenseDataset`."""
        sizes = sample_file_sizes(len(self), lambda index: self._file_and_size(index)[0])
        objects = (
            (number, *size, found)
            for number, size, found in zip(self._image_ids.tolist(), self._sizes.tolist(), self._objects, strict=True)
        )
        return Fingerprint(len(self), digest(self._file_names, sizes), digest(objects))

    def image_size(self, index: int) -> tuple[int, int]:
        """(H, W) in pixels, as the annotation file says."""
        height, width = self._sizes[index].tolist()
        return height, width

    def ground_truth(self, targets: Collection[str] | None = None) -> dict[str, Any]:
        """See `targets.DetectionDataset`; gives new ids where pycocotools would mix the annotations up."""
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

    def leave_out_empty(self) -> None:
        """Keep only images with objects to train on; `num_filtered_images` counts the others."""
        kept = [index for index in range(len(self)) if self._trained_on(index)]
        self.num_filtered_images += len(self) - len(kept)
        self._image_ids, self._sizes = self._image_ids[kept], self._sizes[kept]
        self.objects_per_image = self.objects_per_image[kept]
        self._file_names = SerializedList(self._file_names[index] for index in kept)
        self._objects = SerializedList(self._objects[index] for index in kept)

    def _trained_on(self, index: int) -> list[dict[str, Any]]:
        """The objects of an image that are in its target."""
        size, masked = self.image_size(index), "masks" in self._targets
        return [entry for entry in self._objects[index] if is_training_object(entry, *size, masks=masked)]

    def _target(self, index: int, height: int, width: int) -> Target:
        masked = "masks" in self._targets
        objects = self._trained_on(index)
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
    """The annotations with the names that the files have.

    Raises:
        UserError: images are missing; tells of all of them.
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
    transforms: Callable[..., tuple[Any, Target]] | None = None,
) -> CocoDetection:
    """The images in a folder with the annotations in a JSON file; without `use_iscrowd`, crowds are objects.

    Raises:
        UserError: the file is not COCO's, or as `CocoDetection` says.
    """
    name, coco = str(annotations), read_coco(annotations)
    if not use_iscrowd:
        coco = crowds_as_objects(coco)
    return CocoDetection(coco, images, name=name, targets=targets, scaling=scaling, transforms=transforms)


@DATASET_FORMATS.register("coco")
@dataclass
class CocoFormat(ImageFileOptions, DetectionTransforms, DatasetFormat):
    """Both splits of a folder in COCO's layout; names are relative to `root`."""

    target_types: ClassVar[frozenset[str]] = DETECTION
    usual_classes: ClassVar[int] = 80

    root: str = option(help="the folder that holds the four below")
    train_images: str = option(help="folder")
    train_annotations: str = option(help="file")
    val_images: str = option(help="folder")
    val_annotations: str = option(help="file")
    use_iscrowd: bool = option(
        True,
        help="annotations with iscrowd 1 are crowds, which are ignored; false: objects, as CVAT's brush masks",
        before=True,
    )
    filter_empty: bool = option(
        False, help="true: images without objects are left out of training", before=False, of_training=True
    )

    def _paths(self, split: Split) -> tuple[Path, Path]:
        if split == "train":
            return coco_paths(Path(self.root), self.train_images, self.train_annotations)
        return coco_paths(Path(self.root), self.val_images, self.val_annotations)

    def open(
        self, split: Split, transforms: Callable[..., Any] | None = None, *, targets: Collection[str] = DETECTION
    ) -> CocoDetection:
        """Read a split's annotations; training leaves out images without objects if `filter_empty`."""
        images, annotations = self._paths(split)
        dataset = open_coco(
            images,
            annotations,
            targets=targets,
            scaling=self.scaling,
            use_iscrowd=self.use_iscrowd,
            transforms=transforms,
        )
        if self.filter_empty and split == "train":
            dataset.leave_out_empty()
        return dataset

    def check(
        self,
        split: Split,
        progress: Callable[[int, int], None] | None = None,
        *,
        targets: Collection[str] = DETECTION,
    ) -> Report:
        """Look at every annotation and decode every image."""
        images, annotations = self._paths(split)
        return check_coco_file(
            images,
            annotations,
            targets=targets,
            scaling=self.scaling,
            use_iscrowd=self.use_iscrowd,
            progress=progress,
        )
