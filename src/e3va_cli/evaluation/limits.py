"""Images with more objects than a head gives: none of the others is ever found, however well it learns."""

from __future__ import annotations

import numpy as np

from e3va_cli.components.options import walk
from e3va_cli.data import DenseDataset
from e3va_cli.models.heads import HeadOptions

OPTION = "detections_per_image"


def detection_limit_warning(dataset: DenseDataset, head: HeadOptions) -> str | None:
    """What a head's limit means for a data set; None where no image has more objects.

    Args:
        dataset: of objects, or of anything else, which has no such limit.
        head: its options.
    """
    objects = getattr(dataset, "objects_per_image", None)
    name, limit = next(((key, value) for key, value, one in walk(head, "head.") if one.name == OPTION), ("", None))
    if objects is None or limit is None or objects.max(initial=0) <= limit:
        return None
    reachable = np.minimum(objects, limit).sum() / objects.sum()
    return (
        f"{int((objects > limit).sum()):,} of {len(objects):,} images have more than {name}={limit} objects, up to "
        f"{objects.max():,}: no more are found in an image, at most {100 * reachable:.1f} % of all, which limits AP; "
        f"set {name}={objects.max()}"
    )
