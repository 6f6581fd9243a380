"""Pre-training goes on exactly where it was stopped, learns, and leaves weights that the package's loader takes."""

import json
import signal
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from scripts import pretrain
from scripts.batch_augmentation import Augmentation, resize
from scripts.labeled_images import find_images, load_images
from tests.components import build_backbone
from tests.conftest import NANO

SIDE = 24


def image(label: int, rng: np.random.Generator) -> bytes:
    """Noise of the color of its class."""
    pixels = rng.integers(0, 80, (SIDE, SIDE, 3), dtype=np.uint8)
    pixels[..., label] += 150
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """200 training images of 2 classes, half of them in a folder and half in a zip file, and 40 for validation."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(root / "more.zip", "w") as archive:
        for number in range(200):
            name, content = f"train/class{number % 2}/{number:03}.png", image(number % 2, rng)
            if number < 100:
                archive.writestr(f"anything/{name}", content)
            else:
                path = root / "folder" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for number in range(40):
            archive.writestr(f"val/class{number % 2}/{number:03}.png", image(number % 2, rng))
    return [root / "folder", root / "more.zip"]


def words(data, output, *more):
    fixed = ["--sizes", "32", "64", "--val-sizes", "32", "--batch-size", "25", "--workers", "1", "--accelerator", "cpu"]
    return ["--data", *map(str, data), "--output", str(output), *fixed, "--color", "0", *more]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    output = tmp_path_factory.mktemp("finished")
    assert pretrain.main(words(data, output, "--epochs", "2", "--evaluate-every", "1")) == 0
    return output


def test_it_learns_and_writes_weights_that_the_package_loads(finished):
    results = json.loads((finished / "metrics.json").read_text())
    weights = finished / "swin_nano.safetensors"
    assert weights.stat().st_size < 5e6
    assert results["top1"]["32"] >= 75
    assert [row["step"] for row in results["evaluations"]] == [8, 16]
    _, identity = build_backbone(**NANO, pretrained=False, weights=str(weights), seed=0)
    assert results["fingerprint"] == identity.fingerprint
    assert identity.fingerprint in (finished / "swin_nano.md").read_text()


def test_stopped_and_resumed_equals_uninterrupted(data, finished, tmp_path, monkeypatch):
    options = words(data, tmp_path, "--epochs", "2", "--evaluate-every", "1")
    step = pretrain.Pretraining.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == 5:
            signal.raise_signal(signal.SIGTERM)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(pretrain.Pretraining, "training_step", interrupted)
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(options)
    assert stopped.value.code == 128 + signal.SIGTERM
    monkeypatch.setattr(pretrain.Pretraining, "training_step", step)
    assert pretrain.main([*options, "--lr", "0.1"]) == 2
    assert pretrain.main(options) == 0
    assert pretrain.main(options) == 0  # already complete
    first, second = (torch.load(place / "last.ckpt", weights_only=False) for place in (finished, tmp_path))
    assert first["global_step"] == second["global_step"] == 16
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_minutes_end_in_time(data, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "STARTED", pretrain.time.monotonic())
    assert pretrain.main(words(data, tmp_path, "--minutes", "0.05")) == 0
    rows = json.loads((tmp_path / "metrics.json").read_text())["evaluations"]
    assert rows[-1]["seconds"] >= 3 and rows[-1]["step"] > 0


def test_folders_and_zip_files_are_combined(data):
    files = find_images(data, "train")
    loaded = load_images(files, 16, workers=1)
    assert loaded.images.shape == (200, 3, 16, 16) and loaded.classes == ["class0", "class1"]
    assert loaded.labels.bincount().tolist() == [100, 100]
    assert torch.equal(loaded.images.float().mean((2, 3)).argmax(1), loaded.labels)


def test_invalid_data_is_one_line(data, tmp_path, capsys):
    assert pretrain.main(words([tmp_path], tmp_path / "out", "--epochs", "1")) == 2
    assert "no images train/CLASS" in capsys.readouterr().err
    broken = tmp_path / "train" / "class0" / "a.png"
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"no image")
    assert pretrain.main(words([tmp_path, *data], tmp_path / "out", "--epochs", "1")) == 2
    assert "a.png cannot be decoded" in capsys.readouterr().err


def test_a_whole_unflipped_crop_is_a_resize(monkeypatch):
    images = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    monkeypatch.setattr("scripts.batch_augmentation.ASPECT", 1.0)
    whole = Augmentation(least_area=1.0, color=0.0)(images, 20)
    for out, expected in zip(whole, resize(images, 20), strict=True):
        same = [torch.allclose(out, other, atol=1e-5) for other in (expected, expected.flip(-1))]
        assert any(same)
