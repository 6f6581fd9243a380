"""Data sets in Pascal VOC's layout (Everingham et al., The Pascal Visual Object Classes Challenge, IJCV 2010)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from e3va_cli.components.options import option
from e3va_cli.data.dataset import DETECTION, Target
from e3va_cli.data.formats.base import DATASET_FORMATS, SPLITS, DatasetFormat, Split
from e3va_cli.data.formats.class_names import read_class_names
from e3va_cli.data.formats.coco import CocoDetection
from e3va_cli.data.formats.coco_file import CocoFile, Entry
from e3va_cli.data.formats.text_encodings import is_encoding
from e3va_cli.data.formats.voc_folder import CLASSES, YEARS, VocImage, find_devkit, read_set, sets_of
from e3va_cli.data.images.intensity import ImageFileOptions
from e3va_cli.data.transforms import DetectionTransforms
from e3va_cli.data.validation.coco import check_coco
from e3va_cli.data.validation.issues import ADVICE, IssueCollector, Place, Report
from e3va_cli.errors import UserError
from e3va_cli.utils.text import more_suffix, truncate_list

NAMES_SHOWN = 10


def as_coco(images: Sequence[VocImage], classes: Sequence[str]) -> tuple[CocoFile, Counter[str]]:
    """Images as a COCO file, numbered from 1 as the classes are, and how many objects it leaves out, by reason.

    Difficult objects have `iscrowd` set, which has the same meaning: not trained on, neither a hit nor a miss.
    """
    numbers = {name: number for number, name in enumerate(classes, start=1)}
    entries: list[Entry] = []
    annotations: list[Entry] = []
    left_out: Counter[str] = Counter()
    for image_id, image in enumerate(images, start=1):
        if image.fault:
            continue
        entries.append(
            {"id": image_id, "file_name": image.file_name, "height": image.height, "width": image.width},
        )
        for name, box, difficult in image.objects:
            if name not in numbers:
                left_out["unlisted class" if name else "object without a name"] += 1
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
    return CocoFile(entries, annotations, categories), left_out


@DATASET_FORMATS.register("voc")
@dataclass
class VocFormat(ImageFileOptions, DetectionTransforms, DatasetFormat):
    """Both splits of VOC2007, VOC2012 or both together."""

    target_types: ClassVar[frozenset[str]] = frozenset({"boxes"})
    usual_classes: ClassVar[int] = len(CLASSES)

    root: str = option(
        help="the folder that holds VOC2007, VOC2012 or both, which are taken together, or their VOCdevkit"
    )
    train_set: str | None = option(
        None, help="of ImageSets/Main; null: trainval where VOC2007 has a test set, else train"
    )
    val_set: str | None = option(None, help="null: VOC2007's test set, else val")
    classes: Any = option(
        None, help="names, or a text file of them; null: VOC's 20, or those that the annotations have instead"
    )
    encoding: str | None = option(
        None, help="of XML files that are not UTF-8 and declare none, such as gbk or cp1251", before="latin-1"
    )
    filter_empty: bool = option(
        False,
        help="true: images without objects, or with difficult ones alone, are left out of training",
        before=False,
        of_training=True,
    )

    def errors(self, at: str) -> Iterator[str]:
        """Yield what is wrong with the encoding."""
        if self.encoding is not None and not is_encoding(self.encoding):
            yield f"{at}.encoding={self.encoding}: no encoding of text, such as gbk, cp1251 or latin-1"

    def open(
        self,
        split: Split,
        transforms: Callable[..., tuple[Any, Target]] | None = None,
        *,
        targets: Collection[str] = DETECTION,
    ) -> CocoDetection:
        """The images of a split with their boxes.

        Raises:
            UserError: the layout or an XML file cannot be read, or nothing in it is of use.
        """
        name, images, classes = self._name(split), self._images(split), self._classes
        faults: dict[str, list[str]] = defaultdict(list)
        for image in images:
            if image.fault:
                kind, details = image.fault
                faults[kind].append(f"{self._devkit / image.annotation}: {kind}: {details}")
        if faults:
            raise UserError(*(f"{found[0]}{more_suffix(found)}; {ADVICE}" for found in faults.values()))
        coco, left_out = as_coco(images, classes)
        if left_out["unlisted class"] and not coco.annotations:
            raise UserError(
                f"dataset.classes: no object in {name} is called {truncate_list(classes, NAMES_SHOWN)}; "
                f"they are called {truncate_list(_names_in(images), NAMES_SHOWN)}"
            )
        dataset = CocoDetection(
            coco,
            self._devkit,
            name=name,
            ignored="difficult",
            left_out=left_out,
            targets=targets,
            scaling=self.scaling,
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
        """Look at every XML file and decode every image of a split."""
        images = self._images(split)
        coco, _ = as_coco(images, self._classes)
        problems, notes = self._findings(split, images)
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
        """The splits that were read, so that each XML file is parsed once."""
        return {}

    def _images(self, split: Split) -> list[VocImage]:
        if split not in self._read:
            self._read[split] = [
                image for year, name in self._sets(split) for image in read_set(self._devkit, year, name, self.encoding)
            ]
        return self._read[split]

    def _images_if_any(self, split: Split) -> list[VocImage]:
        """No images where they cannot be listed: an evaluation does without those for training."""
        try:
            return self._images(split)
        except UserError:
            return []

    def _sets(self, split: Split) -> list[tuple[str, str]]:
        """The years that a split consists of, and the name of the set."""
        available = {year: sets_of(self._devkit, year) for year in YEARS}
        has_test = "test" in available["VOC2007"]
        if split == "val":
            wanted = self.val_set or ("test" if has_test else "val")
            years = YEARS if self.val_set or not has_test else ("VOC2007",)
        else:
            wanted = self.train_set or ("trainval" if has_test and self.val_set in (None, "test") else "train")
            years = YEARS
        found = [(year, wanted) for year in years if wanted in available[year]]
        if not found:
            there = "; ".join(
                f"{year} has {truncate_list(names, NAMES_SHOWN)}" for year, names in available.items() if names
            )
            raise UserError(
                f"no ImageSets/Main/{wanted}.txt in {self._devkit}; {there or 'there is no such list'}; "
                f"set dataset.{split}_set"
            )
        return found

    def _name(self, split: Split) -> str:
        """What a split is called in messages."""
        return f"{self._devkit} ({', '.join(' '.join(found) for found in self._sets(split))})"

    @cached_property
    def _classes(self) -> list[str]:
        if self.classes is not None:
            return read_class_names(self.classes)
        names = {name for split in SPLITS for name in _names_in(self._images_if_any(split))}
        return sorted(names) if names - set(CLASSES) else list(CLASSES)

    def _findings(self, split: Split, images: Sequence[VocImage]) -> tuple[IssueCollector, IssueCollector]:
        """Problems and notes that a COCO file cannot tell of."""
        problems, notes = IssueCollector(), IssueCollector()
        trained_on = {image.file_name for image in self._images_if_any("train")} if split == "val" else set()
        for number, image in enumerate(images, start=1):
            if image.fault:
                kind, details = image.fault
                problems.add(kind, Place(image.annotation, detail=details))
            elif not image.sized:
                notes.add("image size taken from the image file", Place(image.annotation, number))
            if image.file_name in trained_on:
                notes.add("image that the training set lists too", Place(image.file_name, number))
            for position, found in enumerate(image.objects, start=1):
                if found.name is None:
                    problems.add("object without a name", Place(image.annotation, number, detail=f"object {position}"))
                elif found.name not in self._classes:
                    notes.add("object of an unlisted class", Place(image.annotation, number, detail=found.name))
        return problems, notes


def _names_in(images: Sequence[VocImage]) -> list[str]:
    return sorted({found.name for image in images for found in image.objects if found.name})
