import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from e3va_cli.data.dataset import check_same_classes
from e3va_cli.data.images.formats import FORMATS, IMAGE_SUFFIXES
from e3va_cli.data.images.reading import read_image
from e3va_cli.errors import UserError

RAMP = np.linspace(0, 255, 12).astype(np.uint8).reshape(3, 4)


def test_rgb_keeps_its_pixels(tmp_path: Path) -> None:
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert type(image) is tv_tensors.Image
    assert image.dtype == torch.uint8
    assert image.is_contiguous()
    assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16"])
def test_other_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        picture = Image.fromarray(RAMP.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(RAMP).convert(mode)
    picture.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode == mode
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 3, 4)
    for channel in image:
        assert np.array_equal(channel.numpy(), RAMP)


def test_black_and_white(tmp_path: Path) -> None:
    Image.fromarray(RAMP > 100).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png")[1].numpy(), (RAMP > 100) * 255)


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), (200, 30, 60)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    color = read_image(tmp_path / "a.jpg").float().mean((1, 2))
    assert torch.allclose(color, torch.tensor([200.0, 30.0, 60.0]), atol=3)


def test_transparent_palette_does_not_warn(tmp_path: Path) -> None:
    Image.fromarray(RAMP).convert("P").save(tmp_path / "a.png", transparency=bytes(range(0, 256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(tmp_path / "a.png").shape == (3, 3, 4)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_truncated_image(tmp_path: Path, suffix: str, kept: float) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(UserError, match="cannot read the image") as caught:
        read_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_image_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="cannot read"):
        read_image(tmp_path)
    (tmp_path / "a.jpg").write_text("an HTML page, say")
    with pytest.raises(UserError, match="not an image"):
        read_image(tmp_path / "a.jpg")


def split(*classes: tuple[int, str]) -> SimpleNamespace:
    return SimpleNamespace(category_ids=[i for i, _ in classes], classes=[name for _, name in classes])


def test_classes_of_the_splits() -> None:
    check_same_classes(split((1, "cat"), (5, "dog")), split((1, "cat"), (5, "dog")))
    with pytest.raises(UserError) as caught:
        check_same_classes(split((1, "cat"), (5, "dog")), split((1, "cat"), (5, "cow"), (6, "owl")))
    line = str(caught.value)
    assert "only in train: dog (id 5); only in val: cow (id 5), owl (id 6)" in line
    assert "cat" not in line
    with pytest.raises(UserError, match=r"only in val: dog \(id 5\)"):
        check_same_classes(split((1, "cat")), split((1, "cat"), (5, "dog")))


def test_suffixes_are_those_of_the_supported_formats() -> None:
    Image.init()
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in IMAGE_SUFFIXES} == set(FORMATS)
