"""The comparison with pycocotools: random detections, and differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import evaluation_time
from e3va_cli.data.formats.shapes import Shapes
from e3va_cli.evaluation.average_precision import SUMMARY

FEW = ["--images", "5", "--detections", "12", "--repeats", "1", "dataset.val_images=3", "dataset.image_size=64"]


def collected(*arguments: str) -> Any:
    args = evaluation_time.parser().parse_args([*FEW, *arguments])
    return evaluation_time.collect(Shapes("val", images=3, size=64, seed=0), args)


def test_detections_follow_the_seed() -> None:
    def boxes(seed: int) -> list[Any]:
        return [f["bbox"] for found in collected("--seed", str(seed)).predictions.values() for f in found]

    assert boxes(0) == boxes(0) != boxes(1)


def test_detections_are_inside_the_image_and_sorted() -> None:
    target = Shapes("val", images=1, size=64, seed=0)[0][1]
    found = evaluation_time.random_detections(target, 200, 5, torch.Generator().manual_seed(0))
    assert len(found) == 200 and found.masks is not None and found.masks.shape == (200, 1, 28, 28)
    assert (found.scores.diff() <= 0).all() and set(found.labels.tolist()) <= {1, 2, 3, 4, 5}
    assert (found.boxes >= 0).all() and (found.boxes <= 64).all() and (found.boxes[:, 2:] >= found.boxes[:, :2]).all()


def test_an_image_without_objects_has_no_detections() -> None:
    target = Shapes("val", images=1, size=64, seed=0)[0][1]
    empty = {**target, **{key: target[key][:0] for key in ("boxes", "labels", "masks")}}
    assert len(evaluation_time.random_detections(empty, 10, 5, torch.Generator())) == 0


def test_repeated_images_have_new_ids() -> None:
    once = Shapes("val", images=3, size=64, seed=0).ground_truth()
    twice = evaluation_time.repeated(once, 2)
    for key in ("images", "annotations"):
        assert len({entry["id"] for entry in twice[key]}) == 2 * len(once[key])
    known = {image["id"] for image in twice["images"]}
    assert {a["image_id"] for a in twice["annotations"]} <= known
    assert len(collected().predictions) == 5 and set(collected().predictions) <= known


def test_largest_difference() -> None:
    ours: dict[str, Any] = dict.fromkeys(SUMMARY, 0.5)
    theirs = [0.5] * 12
    assert evaluation_time.difference(ours, theirs) == 0
    theirs[SUMMARY["AR100"]] = 0.4
    assert evaluation_time.difference(ours, theirs) == pytest.approx(0.1)
    assert evaluation_time.difference({**ours, "AR100": None}, [*theirs[:8], -1.0, *theirs[9:]]) == 0


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*FEW, "--output", str(tmp_path / "out.json")]
    assert evaluation_time.main(arguments) == 0
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [r["kind"] for r in results] == ["box", "mask"]
    for result in results:
        assert 0.1 < result["ap"] < 0.9 and result["ap"] == pytest.approx(result["pycocotools_ap"], abs=1e-5)
    monkeypatch.setattr(evaluation_time, "reference", lambda *_: [0.0] * 12)
    assert evaluation_time.main(FEW) == 1
