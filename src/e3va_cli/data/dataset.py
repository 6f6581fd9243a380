"""What every data set yields, whichever format it was read from."""

from collections import Counter
from collections.abc import Collection
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torchvision import tv_tensors

from e3va_cli.data.fingerprint import Fingerprint
from e3va_cli.errors import UserError

Target = dict[str, Any]
"""What is to be found in one image of H x W pixels with N objects. Always:

image_id        int, the data set's own
original_size   (H, W) of the file in pixels; transforms leave it as it is

For detection:

boxes           tv_tensors.BoundingBoxes, XYXY in pixels, float32 [N, 4], inside the image
labels          int64 [N], 1..K without gaps; 0 is left to the heads for the background
masks           tv_tensors.Mask, uint8 [N, H, W], 0 or 1; no such key where the data set has no masks. `EncodedMasks`
                until training has resized the image, and in evaluation, which compares with the annotations

For semantic segmentation:

semantic        tv_tensors.Mask, int16 [H, W], the class of each pixel, 1..K; 0 where it is not labelled
"""


DETECTION = frozenset({"boxes", "masks"})  # what targets for detection can hold


class DenseDataset(Protocol):
    """A map-style data set of `(image, target)`, the image a tv_tensors.Image, uint8 [3, H, W], RGB."""

    classes: list[str]
    """Name of label k at index k - 1."""

    category_ids: list[int]
    """The data set's own id of label k at index k - 1; results are written with it."""

    dropped: dict[str, int]
    """Annotations left out of training: how many, by reason."""

    num_filtered_images: int
    """Images without anything to train on that were left out."""

    target_types: frozenset[str]
    """What targets hold: of boxes, masks and semantic."""

    notes: list[str]
    """What a user may not expect of it, each a line, worth a warning before a run."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, Target]: ...

    def fingerprint(self) -> Fingerprint:
        """What the split holds, in a few bytes."""
        ...


class DetectionDataset(DenseDataset, Protocol):
    """Images with boxes, and perhaps masks."""

    objects_per_image: NDArray[np.int64]
    """How many are to be found in each image, at most."""

    def ground_truth(self, targets: Collection[str] | None = None) -> dict[str, Any]:
        """`images`, `annotations` and `categories` in COCO's format: what evaluation compares with.

        `iscrowd` marks what an evaluation ignores: crowds, and what training leaves out where `targets`, of boxes and
        masks, are wanted (None for those that the data set was opened for). What training takes has a mask if masks
        are wanted.
        """
        ...


def check_same_classes(train: DenseDataset, val: DenseDataset) -> None:
    """Raises UserError naming the difference, unless both splits number the same classes the same way."""
    ours = Counter(zip(train.category_ids, train.classes, strict=True))
    theirs = Counter(zip(val.category_ids, val.classes, strict=True))
    if ours == theirs:
        return
    difference = [
        f"only in {split}: {', '.join(f'{name} (id {number})' for number, name in sorted(only))}"
        for split, only in (("train", ours - theirs), ("val", theirs - ours))
        if only
    ]
    raise UserError(f"the classes of train and val differ; {'; '.join(difference)}")
