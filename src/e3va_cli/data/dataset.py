"""The target of an image, and the protocols of data sets."""

from collections import Counter
from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torchvision import tv_tensors

from e3va_cli.data.fingerprint import Fingerprint
from e3va_cli.errors import UserError

Target = dict[str, Any]
"""Annotations of one image of H x W pixels with N objects. Always:

image_id        int, as in the annotations
original_size   (H, W) of the file in pixels; not changed by transforms

For detection:

boxes           tv_tensors.BoundingBoxes, XYXY in pixels, float32 [N, 4], inside the image
labels          int64 [N], 1..K without gaps; 0 is the background
masks           tv_tensors.Mask, uint8 [N, H, W], 0 or 1; missing if the data set has no masks. `EncodedMasks` before
                the resize in training, and in evaluation, which uses the annotations

For semantic segmentation:

semantic        tv_tensors.Mask, int16 [H, W], the class of each pixel, 1..K; 0 is unlabeled
"""


DETECTION = frozenset({"boxes", "masks"})  # possible target types of detection


class DenseDataset(Protocol):
    """A map-style data set of `(image, target)`, the image a tv_tensors.Image, uint8 [3, H, W], RGB."""

    classes: list[str]
    """Name of label k at index k - 1."""

    category_ids: list[int]
    """Id of label k in the annotations at index k - 1; results are written with it."""

    dropped: dict[str, int]
    """Number of annotations that are not trained on, by reason."""

    num_filtered_images: int
    """Number of images without objects that were removed."""

    target_types: frozenset[str]
    """What targets have of boxes, masks and semantic."""

    notes: list[str]
    """Warnings to show before a run, one line each."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]: ...

    def fingerprint(self) -> Fingerprint:
        """Return the fingerprint of the split."""
        ...


class DetectionDataset(DenseDataset, Protocol):
    """Images with boxes and, optionally, masks."""

    objects_per_image: NDArray[np.int64]
    """Maximum number of objects in each image."""

    def ground_truth(self, targets: Collection[str] | None = None) -> dict[str, Any]:
        """Return `images`, `annotations` and `categories` in COCO's format, for evaluation.

        `iscrowd` marks what evaluation ignores: crowds, and objects that are not trained on by heads that need
        `targets` (of boxes and masks; None for those that the data set was opened with). All others have a mask if
        masks are needed.
        """
        ...


def check_same_classes(train: DenseDataset, val: DenseDataset) -> None:
    """Raise UserError unless both splits have the same classes with the same ids."""
    in_train = Counter(zip(train.category_ids, train.classes, strict=True))
    in_val = Counter(zip(val.category_ids, val.classes, strict=True))
    if in_train == in_val:
        return
    difference = [
        f"only in {split}: {', '.join(f'{name} (id {number})' for number, name in sorted(only))}"
        for split, only in (("train", in_train - in_val), ("val", in_val - in_train))
        if only
    ]
    raise UserError(f"the classes of train and val differ; {'; '.join(difference)}")
