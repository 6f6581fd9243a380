"""Images of more than 8 bits: the same pixels in training, evaluation and prediction, and those that NumPy computes."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from e3va_cli.config.composition import validate_overrides
from e3va_cli.data.formats.coco import open_coco
from e3va_cli.data.images.intensity import IntensityScaling
from e3va_cli.data.images.reading import read_image, read_raw
from e3va_cli.data.validation.coco import check_coco_file
from e3va_cli.data.validation.image_survey import survey_images
from e3va_cli.data.validation.images import pixel_notes, pixel_problems
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import read_checkpoint_or_adapter
from e3va_cli.inference.images import to_image
from e3va_cli.inference.predictor import load_adapter, load_adapters
from tests.components import options_of
from tests.export.crafted_runs import craft

# A scene of 12 bits, as microscopes write it into 16: what a shift by 8 bits turns into 0..15.
SCENE = np.random.default_rng(0).integers(100, 4000, (30, 40), dtype=np.uint16)
Write = Callable[..., tuple[Path, Path]]
Annotate = Callable[..., dict[str, Any]]


def scaled(values: np.ndarray, black: float, white: float) -> np.ndarray:
    return np.clip(np.rint((values.astype(np.float64) - black) * 255 / (white - black)), 0, 255).astype(np.uint8)


def color_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png", "tif", "int32", "float"])
def test_a_range_is_that_of_numpy(tmp_path: Path, kind: str) -> None:
    values = SCENE.astype({"int32": np.int32, "float": np.float32}.get(kind, np.uint16))
    path = tmp_path / f"a.{'png' if kind == 'png' else 'tif'}"
    Image.fromarray(values).save(path)
    image = read_image(path, IntensityScaling((0, 4095)))
    assert image.dtype == torch.uint8 and image.shape == (3, 30, 40)
    for channel in image.numpy():
        assert np.array_equal(channel, scaled(SCENE, 0, 4095))


def test_percentiles_are_those_of_numpy(tmp_path: Path) -> None:
    Image.fromarray(SCENE).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", IntensityScaling(percentiles=(2, 97)))
    low = np.percentile(SCENE, 2, method="lower")
    high = np.percentile(SCENE, 97, method="higher")
    assert np.array_equal(image[0].numpy(), scaled(SCENE, low, high))
    assert read_image(tmp_path / "a.png").float().std() > 60, "not nearly black, without any option"


def test_color_of_16_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 4096, (6, 5, 3), dtype=np.uint16)
    (tmp_path / "a.png").write_bytes(color_png(values))
    raw = read_raw(tmp_path / "a.png")
    assert raw.is_16bit_color and np.array_equal(raw.pixels.permute(1, 2, 0).numpy(), values >> 8)
    assert [kind for kind, _ in pixel_problems(raw, (6, 5), IntensityScaling())] == ["almost black image"]
    assert [kind for kind, _ in pixel_notes(raw, (6, 5), IntensityScaling())] == ["16-bit color image"]
    (tmp_path / "a.png").write_bytes(color_png(values << 4))
    assert pixel_problems(read_raw(tmp_path / "a.png"), (6, 5), IntensityScaling()) == []
    survey = survey_images(1, lambda _: (tmp_path / "a.png", (6, 5)))
    assert "the upper 8 bits are read" in survey.notes("x", IntensityScaling())[0]


@pytest.mark.parametrize("value", [0, 40_000])
def test_an_image_of_one_value(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((4, 5), value, np.uint16)).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png") == 0).all()


def test_nan_is_black(tmp_path: Path) -> None:
    values = np.array([[0, 1, np.nan, 2, np.inf]], np.float32)
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0].tolist() == [[0, 128, 0, 255, 255]]


def deep(write_coco: Write, annotate: Annotate) -> tuple[Path, Path]:
    folder, file = write_coco([annotate(1, [2, 3, 10, 20]), annotate(2, [2, 3, 9, 9], image_id=5, category_id=7)])
    content = json.loads(file.read_text())
    content["images"][1]["file_name"] = "b.png"
    file.write_text(json.dumps(content))
    for name in ("a.png", "b.png"):
        Image.fromarray(SCENE).save(folder / name)
    (folder / "sub" / "b.jpg").unlink()
    return folder, file


def test_check_data_and_train_warn(write_coco: Write, annotate: Annotate) -> None:
    folder, file = deep(write_coco, annotate)
    assert "dataset.intensity_range=[0,4095]" in open_coco(folder, file).notes[0]
    report = check_coco_file(folder, file)
    [note] = report.notes
    assert report.ok and note.type == "image of more than 8 bits" and note.count == 2
    assert f"values {SCENE.min()} to {SCENE.max()}" in str(note.locations[0])

    wide = IntensityScaling((0, 65_535))
    assert open_coco(folder, file, scaling=wide).notes == []
    [problem] = check_coco_file(folder, file, scaling=wide).problems
    assert problem.type == "almost black image" and problem.count == 2
    assert check_coco_file(folder, file, scaling=IntensityScaling((0, 4095))).ok


RETINANET = [
    "dataset=coco",
    "head=retinanet",
    "head.fpn_channels=32",
    "head.score_threshold=0.005",
    "backbone=swin_nano",
]
RETINANET += ["dataset.val_short_side=30", "dataset.max_size=40", "dataset.num_classes=3"]


def seen_by(predictor: Any, given: Any) -> Tensor:
    """The pixels that a model gets, of 32 x 64 with padding."""
    seen: list[Tensor] = []
    predict = predictor.adapter.model.predict
    predictor.adapter.model.predict = lambda images, sizes: (seen.append(images.clone()), predict(images, sizes))[1]
    predictor.predict(given)
    predictor.adapter.model.predict = predict
    return seen[0][0, :, :30, :40]


def test_training_evaluation_and_prediction_see_the_same(tmp_path: Path, write_coco: Write, annotate: Annotate) -> None:
    folder, _ = deep(write_coco, annotate)
    words = [*RETINANET, f"dataset.root={tmp_path}", "dataset.intensity_range=[200,3000]", "dataset.flip=0"]
    words += ["dataset.train_short_sides=[30]"]
    run = craft(tmp_path / "run", *words)
    files = {f"{split}_images": "images" for split in ("train", "val")}
    files |= {f"{split}_annotations": "instances.json" for split in ("train", "val")}
    source = replace(read_checkpoint_or_adapter(str(run), "checkpoint").config.dataset, **files)
    expected = np.stack([scaled(SCENE, 200, 3000)] * 3)
    for split, steps in (("train", source.train_transforms()), ("val", source.val_transforms())):
        assert np.array_equal(source.open(split, steps)[0][0].numpy(), expected), split
    predictor = load_adapter(run)
    for given in (folder / "a.png", str(folder / "a.png"), read_raw(folder / "a.png"), Image.fromarray(SCENE), SCENE):
        assert np.array_equal(seen_by(predictor, given).numpy(), expected), type(given)
    [found] = predictor.predict([folder / "a.png"])
    assert np.asarray(found.draw()).max() > 200


def test_adapters_of_other_ranges_do_not_share_a_pass(tmp_path: Path) -> None:
    for name, limits in (("a", "[0,4095]"), ("b", "[0,4095]"), ("c", "[0,255]"), ("d", "null")):
        craft(tmp_path / name, *RETINANET, "dataset.root=x", f"dataset.intensity_range={limits}")
    together = load_adapters([tmp_path / name for name in "abcd"])
    assert [[adapter.name for adapter in shared] for shared in together.passes] == [["a", "b"], ["c"], ["d"]]
    together.predict(SCENE)


def test_an_adapter_from_before_the_option_keeps_its_eight_bits(tmp_path: Path) -> None:
    run = craft(tmp_path / "run", *RETINANET, "dataset.root=x")
    path = run / "checkpoints" / "last.ckpt"
    content = torch.load(path)
    for key in ("intensity_range", "intensity_percentiles"):
        del content["e3va"]["config"]["dataset"][key]
    torch.save(content, path)
    assert load_adapter(run).adapter.scaling == IntensityScaling((0.0, 65_535.0))


@pytest.mark.parametrize("word", ["intensity_range=[1]", "intensity_range=[9,9]", "intensity_percentiles=[5,101]"])
def test_invalid_ranges(word: str) -> None:
    with pytest.raises(UserError, match=word.partition("=")[0]):
        validate_overrides("train", ["dataset=coco", "dataset.root=x", f"dataset.{word}"])


def test_a_data_set_without_files_has_the_usual_scaling() -> None:
    assert options_of("dataset", name="shapes").scaling == IntensityScaling()
    assert torch.equal(to_image(SCENE), IntensityScaling()(torch.from_numpy(SCENE.astype(np.float32))[None]))
