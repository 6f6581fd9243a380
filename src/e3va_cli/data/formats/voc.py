"""Data sets in Pascal VOC's layout (Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from e3va_cli.components.options import option
from e3va_cli.data.dataset import DETECTION
from e3va_cli.data.formats.base import DATASET_FORMATS, SPLITS, DatasetFormat, Split
from e3va_cli.data.formats.class_names import read_class_names
from e3va_cli.data.formats.coco import CocoDetection
from e3va_cli.data.formats.coco_file import CocoFile
from e3va_cli.data.formats.coco_values import Entry
from e3va_cli.data.formats.held_back import HeldBackOptions
from e3va_cli.data.formats.text_encodings import is_encoding
from e3va_cli.data.formats.voc_folder import CLASSES, YEARS, VocImage, find_devkit, list_image_sets, read_image_set
from e3va_cli.data.images.intensity import ImageFileOptions
from e3va_cli.data.transforms import DetectionTransforms
from e3va_cli.data.validation.coco import check_coco
from e3va_cli.data.validation.issues import ADVICE, IssueCollector, Location, Progress, Report
from e3va_cli.errors import UserError
from e3va_cli.utils.text import more_suffix, truncate_list

NAMES_SHOWN = 10


def to_coco(images: Sequence[VocImage], classes: Sequence[str]) -> tuple[CocoFile, Counter[str]]:
    """Return images as a COCO file, images and classes numbered from 1, and the number of dropped objects by reason.

    Difficult objects have `iscrowd` 1, which has the same meaning: not trained on, neither a hit nor a miss.
    """
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    entries: list[Entry] = []
    annotations: list[Entry] = []
    dropped: Counter[str] = Counter()
    for image_id, image in enumerate(images, start=1):
        if image.error:
            continue
        entries.append(
            {"id": image_id, "file_name": image.file_name, "height": image.height, "width": image.width},
        )
        for name, box, difficult in image.objects:
            if name not in numbers:
                dropped["unlisted class" if name else "object without a name"] += 1
                continue
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": numbers[name],
                    "bbox": box,
                    "iscrowd": int(difficult),
                }
            )
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    return CocoFile(entries, annotations, categories), dropped


@DATASET_FORMATS.register("voc")
@dataclass
class VocFormat(HeldBackOptions, ImageFileOptions, DetectionTransforms, DatasetFormat):
    """VOC2007, VOC2012, or both together."""

    target_types: ClassVar[frozenset[str]] = frozenset({"boxes"})
    usual_classes: ClassVar[int] = len(CLASSES)

    root: str = option(help="folder that contains VOC2007, VOC2012 or both, or that contains VOCdevkit")
    train_set: str | None = option(
        None, help="list in ImageSets/Main; null: trainval if VOC2007 has a test set, else train"
    )
    val_set: str | None = option(None, help="null: VOC2007's test set, else val")
    classes: Any = option(
        None, help="names, or a text file of them; null: VOC's 20, or those in the annotations if there are others"
    )
    encoding: str | None = option(
        None, help="of XML files that are not UTF-8 and declare none, for example gbk or cp1251", legacy_value="latin-1"
    )
    filter_empty: bool = option(
        False,
        help="train without images that have no objects, or only difficult ones",
        legacy_value=False,
        training_only=True,
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield the error of an unknown encoding."""
        if self.encoding is not None and not is_encoding(self.encoding):
            yield f"{at}.encoding={self.encoding}: unknown encoding; set one such as gbk, cp1251 or latin-1"

    def open(
        self, split: Split, transforms: Callable[..., Any] | None = None, *, targets: Collection[str] = DETECTION
    ) -> CocoDetection:
        """Open the images of a split with their boxes.

        Raises:
            UserError: the layout or an XML file cannot be read, or there is no object to train on.
        """
        name, images, classes = self._name(split), self._images(split), self._classes
        errors: dict[str, list[str]] = defaultdict(list)
        for image in images:
            if image.error:
                issue_type, detail = image.error
                errors[issue_type].append(f"{self._devkit / image.annotation}: {issue_type}: {detail}")
        if errors:
            raise UserError(*(f"{one[0]}{more_suffix(one)}; {ADVICE}" for one in errors.values()))
        coco, dropped = to_coco(images, classes)
        if dropped["unlisted class"] and not coco.annotations:
            raise UserError(
                f"dataset.classes: {name} has no object of {truncate_list(classes, NAMES_SHOWN)}; "
                f"its classes are {truncate_list(_names_in(images), NAMES_SHOWN)}"
            )
        dataset = CocoDetection(
            coco,
            self._devkit,
            name=name,
            ignored="difficult",
            dropped=dropped,
            targets=targets,
            scaling=self.scaling,
            transforms=transforms,
        )
        if self.filter_empty and split == "train":
            dataset.filter_empty()
        return dataset

    def check(self, split: Split, progress: Progress | None = None, *, targets: Collection[str] = DETECTION) -> Report:
        """Check every XML file and decode every image of a split."""
        images = self._images(split)
        coco, _ = to_coco(images, self._classes)
        problems, notes = self._issues(split, images)
        return check_coco(
            coco,
            self._devkit,
            name=self._name(split),
            ignored="difficult",
            targets=targets,
            scaling=self.scaling,
            problems=problems,
            notes=notes,
            progress=progress,
        )

    @cached_property
    def _devkit(self) -> Path:
        return find_devkit(self.root)

    @cached_property
    def _read(self) -> dict[Split, list[VocImage]]:
        """Return the splits read so far, so that each XML file is parsed once."""
        return {}

    def _images(self, split: Split) -> list[VocImage]:
        if split not in self._read:
            images = [
                image
                for year, name in self._sets(split)
                for image in read_image_set(self._devkit, year, name, self.encoding)
            ]
            self._read[split] = self.select(split, images)
        return self._read[split]

    def _images_if_any(self, split: Split) -> list[VocImage]:
        """Return no images if they cannot be listed: evaluation does not need the training set."""
        try:
            return self._images(split)
        except UserError:
            return []

    def _sets(self, split: Split) -> list[tuple[str, str]]:
        """Return the years of a split, each with the name of its image set."""
        split = self.source_of(split)
        available = {year: list_image_sets(self._devkit, year) for year in YEARS}
        has_test = "test" in available["VOC2007"]
        if split == "val":
            wanted = self.val_set or ("test" if has_test else "val")
            years = YEARS if self.val_set or not has_test else ("VOC2007",)
        else:
            wanted = self.train_set or ("trainval" if has_test and self.val_set in (None, "test") else "train")
            years = YEARS
        found = [(year, wanted) for year in years if wanted in available[year]]
        if not found:
            listed = "; ".join(
                f"{year} has {truncate_list(names, NAMES_SHOWN)}" for year, names in available.items() if names
            )
            raise UserError(
                f"no ImageSets/Main/{wanted}.txt in {self._devkit}; {listed or 'there is no such list'}; "
                f"set dataset.{split}_set"
            )
        return found

    def _name(self, split: Split) -> str:
        """Return the name of a split in messages."""
        return f"{self._devkit} ({', '.join(' '.join(found) for found in self._sets(split))})"

    @cached_property
    def _classes(self) -> list[str]:
        if self.classes is not None:
            return read_class_names(self.classes)
        names = {name for split in SPLITS for name in _names_in(self._images_if_any(split))}
        return sorted(names) if names - set(CLASSES) else list(CLASSES)

    def _issues(self, split: Split, images: Sequence[VocImage]) -> tuple[IssueCollector, IssueCollector]:
        """Return problems and notes of the XML files, beyond those of a COCO file."""
        problems, notes = IssueCollector(), IssueCollector()
        train_files = {image.file_name for image in self._images_if_any("train")} if split == "val" else set()
        for number, image in enumerate(images, start=1):
            if image.error:
                issue_type, detail = image.error
                problems.add(issue_type, Location(image.annotation, detail=detail))
            elif not image.has_size:
                notes.add("image size taken from the image file", Location(image.annotation, number))
            if image.file_name in train_files:
                notes.add("image that is also in the training set", Location(image.file_name, number))
            for position, one in enumerate(image.objects, start=1):
                if one.name is None:
                    problems.add(
                        "object without a name", Location(image.annotation, number, detail=f"object {position}")
                    )
                elif one.name not in self._classes:
                    notes.add("object of an unlisted class", Location(image.annotation, number, detail=one.name))
        return problems, notes


def _names_in(images: Sequence[VocImage]) -> list[str]:
    return sorted({one.name for image in images for one in image.objects if one.name})
