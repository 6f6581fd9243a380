"""Findings in COCO's results format: https://cocodataset.org/#format-results."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from e3va_cli.utils.files import atomic_write


def write_detections(results: Iterable[dict[str, Any]], path: Path) -> None:
    """Write findings as they come, so that their text is never in memory as a whole.

    Args:
        results: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels), `score` and, for masks,
            `segmentation`, as pycocotools encodes it.
        path: of the JSON file.
    """
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write("[")
        for index, result in enumerate(results):
            mask = result.get("segmentation")
            if mask is not None:
                size, counts = mask["size"], mask["counts"]
                text = counts.decode("ascii") if isinstance(counts, bytes) else counts
                result = {**result, "segmentation": {"size": size, "counts": text}}
            file.write(f"{',' if index else ''}\n{json.dumps(result, allow_nan=False)}")
        file.write("\n]\n")
