"""Load images from one folder per class, in folders or zip files, into one uint8 tensor."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path, PurePosixPath

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional as F  # noqa: N812 (torchvision's own alias)

from e3va_cli.errors import UserError, first_line

CHUNK = 256  # images per task of a process
MEMORY_FRACTION = 0.6  # of the machine's memory for decoded images


@dataclass(frozen=True)
class LabeledImages:
    """Decoded images of one split.

    Attributes:
        images: (N, 3, S, S), uint8.
        labels: (N,), int64, indices into `classes`.
        classes: sorted names of the class folders.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]

    def to(self, device: torch.device) -> LabeledImages:
        """Move to `device` if it takes at most half of the free memory."""
        if device.type == "cuda" and self.images.numel() > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return LabeledImages(self.images.to(device), self.labels.to(device), self.classes)


@dataclass(frozen=True)
class ImageFile:
    """A file `split/CLASS/.../NAME` in `source`, a folder or a zip file."""

    source: Path
    name: str
    class_name: str


def find_images(sources: Sequence[Path], split: str) -> list[ImageFile]:
    """List the images of `split` in all sources, sorted by class and name.

    Raises:
        UserError: a source is neither a folder nor a zip file, or there are no images.
    """
    found = []
    for source in sources:
        for name in names_in(source, split):
            parts = PurePosixPath(name).parts
            after = parts[parts.index(split) + 1 :] if split in parts else ()
            if len(after) > 1 and name.lower().endswith(IMG_EXTENSIONS):
                found.append(ImageFile(source, name, after[0]))
    if not found:
        raise UserError(f"--data: no images {split}/CLASS/NAME.jpg (or .png, .webp) in {', '.join(map(str, sources))}")
    return sorted(found, key=lambda file: (file.class_name, file.name))


def names_in(source: Path, split: str) -> Iterator[str]:
    """Yield the names of all files in a zip file, or below `split` in a folder."""
    if source.is_dir():
        yield from (path.relative_to(source).as_posix() for path in (source / split).rglob("*"))
        return
    try:
        with zipfile.ZipFile(source) as archive:
            yield from archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data: {source} is neither a folder nor a zip file ({first_line(error)})") from None


def load_images(files: Sequence[ImageFile], side: int, workers: int) -> LabeledImages:
    """Decode all images to (3, side, side): the shorter side is resized, the center cropped.

    Raises:
        UserError: an image cannot be decoded, or the images do not fit into memory.
    """
    size = len(files) * 3 * side * side
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > MEMORY_FRACTION * memory:
        raise UserError(
            f"--data: {len(files):,} images of {side}x{side} need {size / 2**30:.1f} GiB, this machine has "
            f"{memory / 2**30:.1f} GiB; use smaller --sizes or fewer images"
        )
    classes = sorted({file.class_name for file in files})
    index = {name: number for number, name in enumerate(classes)}
    images = torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    with ProcessPoolExecutor(max(1, min(workers, len(chunks)))) as pool:
        decoded = pool.map(decode_all, chunks, [side] * len(chunks))
        for start, some in zip(range(0, len(files), CHUNK), decoded, strict=True):
            images[start : start + CHUNK] = torch.frombuffer(bytearray(some), dtype=torch.uint8).view(-1, 3, side, side)
    return LabeledImages(images, torch.tensor([index[file.class_name] for file in files]), classes)


def decode_all(files: Sequence[ImageFile], side: int) -> bytes:
    """Return the bytes of a (N, 3, side, side) tensor of decoded images, which are cheap to send to another process."""
    torch.set_num_threads(1)
    return torch.stack([decode(file, side) for file in files]).numpy().tobytes()


def decode(file: ImageFile, side: int | None = None) -> Tensor:
    """Decode one image to (3, side, side), or to its own size.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        image = F.pil_to_tensor(Image.open(BytesIO(read(file))).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, zipfile.BadZipFile) as error:
        raise UserError(f"{file.source}: {file.name} cannot be decoded ({first_line(error)})") from None
    if side is not None and image.shape[-2:] != (side, side):
        image = F.center_crop(F.resize(image, [side], antialias=True), [side])
    return image


def read(file: ImageFile) -> bytes:
    """Return the bytes of a file in a folder or a zip file."""
    if file.source.is_dir():
        return (file.source / file.name).read_bytes()
    return opened(file.source, os.getpid()).read(file.name)


@cache
def opened(archive: Path, process: int) -> zipfile.ZipFile:
    """Open an archive once per process; forked processes share the position of an open file."""
    return zipfile.ZipFile(archive)
