"""Warning about images with more objects than `detections_per_image`."""

from __future__ import annotations

import numpy as np

from e3va_cli.components.options import walk
from e3va_cli.data import DenseDataset
from e3va_cli.models.heads import HeadOptions

OPTION = "detections_per_image"


def detection_limit_warning(dataset: DenseDataset, head: HeadOptions) -> str | None:
    """Return how the head's `detections_per_image` limits AP; None if no image has more objects."""
    objects = getattr(dataset, "objects_per_image", None)
    name, limit = next(((key, value) for key, value, one in walk(head, "head.") if one.name == OPTION), ("", None))
    if objects is None or limit is None or objects.max(initial=0) <= limit:
        return None
    recall = np.minimum(objects, limit).sum() / objects.sum()
    return (
        f"{int((objects > limit).sum()):,} of {len(objects):,} images have more than {name}={limit} objects (up to "
        f"{objects.max():,}), so recall is at most {100 * recall:.1f} % and AP is limited; set {name}={objects.max()}"
    )
