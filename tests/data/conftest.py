import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

TINY = Path(__file__).parents[2].parent / "shared" / "data" / "coco_tiny"


@pytest.fixture
def coco_tiny() -> Path:
    if not TINY.is_dir():
        pytest.skip(f"no {TINY}")
    return TINY


@pytest.fixture
def write_coco(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes a data set: two images of 40 x 30 random pixels, the categories 7 (cat) and 3 (dog)."""

    def write(annotations: list[dict[str, Any]], **lists: Any) -> tuple[Path, Path]:
        content = {
            "images": [
                {"id": 11, "file_name": "a.png", "width": 40, "height": 30},
                {"id": 5, "file_name": "sub/b.jpg", "width": 40, "height": 30},
            ],
            "annotations": annotations,
            "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}],
            **lists,
        }
        folder = tmp_path / "images"
        (folder / "sub").mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for name in ("a.png", "sub/b.jpg"):
            Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / name)
        file = tmp_path / "instances.json"
        file.write_text(json.dumps(content))
        return folder, file

    return write


@pytest.fixture
def annotate() -> Callable[..., dict[str, Any]]:
    """An annotation with a box (x, y, w, h) and a polygon around it, by default of a dog in image 11."""

    def make(number: int, box: list[float], **keys: Any) -> dict[str, Any]:
        x, y, w, h = box
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        entry = {
            "id": number,
            "image_id": 11,
            "category_id": 3,
            "bbox": box,
            "area": w * h,
            "iscrowd": 0,
            "segmentation": [polygon],
            **keys,
        }
        return {key: value for key, value in entry.items() if value is not None}

    return make
