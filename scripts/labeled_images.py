"""Images in one folder per class, in folders or zip files, decoded once into one uint8 tensor."""

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

CHUNK = 256  # images that a process decodes at once
MEMORY_SHARE = 0.6  # of the machine's memory that decoded images may take


@dataclass(frozen=True)
class LabeledImages:
    """Decoded images of one split.

    Attributes:
        images: (N, 3, S, S), uint8.
        labels: (N,), int64, indices into `classes`.
        classes: names of the classes' folders, sorted.
    """

    images: Tensor
    labels: Tensor
    classes: list[str]

    def to(self, device: torch.device) -> LabeledImages:
        """The same on `device`, where it takes at most half of the free memory; else as it is."""
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
    """List the images of `split`, which all sources together hold, in the order of their classes and names.

    Raises:
        UserError: a source that is neither a folder nor a zip file, or no image at all.
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
    """Names of all files in a zip file, or below `split` in a folder."""
    if source.is_dir():
        yield from (path.relative_to(source).as_posix() for path in (source / split).rglob("*"))
        return
    try:
        with zipfile.ZipFile(source) as archive:
            yield from archive.namelist()
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"--data: {source} is neither a folder nor a zip file ({first_line(error)})") from None


def load_images(files: Sequence[ImageFile], side: int, workers: int) -> LabeledImages:
    """Decode all images to (3, side, side): larger ones shrunk by their shorter side and cropped at the center.

    Raises:
        UserError: an image that cannot be decoded, or more of them than fit into memory.
    """
    size = len(files) * 3 * side * side
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > MEMORY_SHARE * memory:
        raise UserError(
            f"--data: {len(files):,} images of {side}x{side} take {size / 2**30:.1f} GiB, and this machine has "
            f"{memory / 2**30:.1f} GiB; give smaller --sizes or fewer images"
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
    """Decode some images, as the bytes of a (N, 3, side, side) tensor, which cost a pipe nothing but their copy."""
    torch.set_num_threads(1)
    return torch.stack([decode(file, side) for file in files]).numpy().tobytes()


def decode(file: ImageFile, side: int | None = None) -> Tensor:
    """Decode one image to (3, side, side), or as large as it is.

    Raises:
        UserError: it cannot be decoded.
    """
    try:
        image = F.pil_to_tensor(Image.open(BytesIO(read(file))).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, zipfile.BadZipFile) as error:
        raise UserError(f"{file.source}: {file.name} is no image that can be read ({first_line(error)})") from None
    if side is not None and image.shape[-2:] != (side, side):
        image = F.center_crop(F.resize(image, [side], antialias=True), [side])
    return image


def read(file: ImageFile) -> bytes:
    """The bytes of a file in a folder or in a zip file."""
    if file.source.is_dir():
        return (file.source / file.name).read_bytes()
    return opened(file.source, os.getpid()).read(file.name)


@cache
def opened(archive: Path, process: int) -> zipfile.ZipFile:
    """An archive, opened once in each process: a position in an open file is shared with the processes forked off."""
    return zipfile.ZipFile(archive)
