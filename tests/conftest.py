"""What tests share: a small Swin, a small configuration, and the `e3va` command in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from e3va_cli.config.composition import load_config
from e3va_cli.models.backbones import ResidualBackbone
from tests.command import Output, run_command
from tests.components import build_backbone

NANO = {
    "name": "swin_nano",
    "timm_name": "swin_tiny_patch4_window7_224",
    "model_args": {"embed_dim": 32, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)},
}

# The shortest run that goes through everything.
QUICK = [
    "dataset.train_images=8",
    "dataset.val_images=4",
    "data.batch_size=2",
    "data.val_batch_size=2",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "trainer.tensorboard=false",
    "trainer.accelerator=cpu",
]


@pytest.fixture
def nano() -> ResidualBackbone:
    """The smallest backbone, random."""
    backbone, _ = build_backbone(**NANO, pretrained=False, weights=None, seed=0)
    return backbone


@pytest.fixture
def config() -> Callable[..., Any]:
    """The configuration of a command under overrides."""

    def build(*overrides: str, command: str = "train") -> Any:
        return load_config(command, overrides)

    return build


@pytest.fixture
def e3va(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `e3va WORDS` from an empty folder."""

    def run(
        *words: str, expect: int = 0, cwd: Path = tmp_path, output: Output = "file"
    ) -> subprocess.CompletedProcess[str]:
        done = run_command(words, cwd, output)
        assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert expect == 1 or "Traceback" not in done.stderr, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch on eight images, by the real command; nobody may change it."""
    folder = tmp_path_factory.mktemp("short_run") / "first"
    done = run_command(["train", *QUICK, f"hydra.run.dir={folder}"], folder.parent)
    assert done.returncode == 0, done.stderr
    return folder


torch.set_num_threads(1)  # the tests' networks are small, and what shares the machine disturbs one thread least


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# Small pieces of public data sets.
DATA = Path(os.environ.get("E3VA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
CONTENT = "coco_tiny (COCO 2017), bccd (VOC), camvid_small (CamVid), ade_sample (ADE20K) and kangaroo"
NO_DATA = "no real data: "


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Return a file or folder of real data by name; skip the test if it does not exist."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"{NO_DATA}{DATA / name}")
        return DATA / name

    return find


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report tests that were skipped for lack of real data."""
    reports = [report for report in terminalreporter.stats.get("skipped", []) if NO_DATA in str(report.longrepr)]
    if reports:
        terminalreporter.write_line(
            f"{len(reports)} tests on real data were skipped: set E3VA_TEST_DATA to a folder that contains {CONTENT}"
        )


@pytest.fixture
def coco_tiny(real_data: Callable[[str], Path]) -> Path:
    return real_data("coco_tiny")


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
