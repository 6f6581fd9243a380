"""A trained model's dense part as one file for other runtimes: ONNX, or a program of `torch.export`.

    images -> normalisation -> backbone under its tuning method -> output norms -> neck [-> scores of a segmenter]

What of a detector depends on what is found (proposals, NMS, regions) is not in it: no exporter takes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from e3va_cli.data.collate import SIZE_DIVISOR
from e3va_cli.errors import UserError, first_line
from e3va_cli.models.model import DenseModel
from e3va_cli.models.necks.fpn import build_pyramid
from e3va_cli.utils.files import UnwritableError, atomic_write

ABOUT = "e3va"  # what the file calls the JSON on its use
INPUT, BATCH = "images", "batch"
TRACED = 2  # images: of one, an exporter would take the batch for fixed
ONNX_BYTES = 2**31  # protobuf's limit of a message
CHECKED = (1, 3)  # images at once when a file is compared with PyTorch


class ExportModule(nn.Module):
    """Images to the feature pyramid of a detector, finest level first, or to the scores of a segmenter."""

    def __init__(self, model: DenseModel) -> None:
        super().__init__()
        head: Any = model.head
        self.extractor, self.rescale, self.mean, self.std = model.extractor, model.rescale, model.mean, model.std
        self.segmenter = head if "semantic" in head.target_types else None
        self.neck = None if self.segmenter else head.neck  # and no more of a detector, or its weights would be kept

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """RGB of 0..255, float32 (B, 3, H, W), to levels (B, C, H_s, W_s), or to scores (B, K, H / 4, W / 4)."""
        features = self.rescale(self.extractor((images - self.mean) / self.std))
        if self.segmenter is not None:
            return (self.segmenter.scores(features),)
        return tuple(build_pyramid(self.neck, features).values())

    def names(self, outputs: Sequence[Tensor]) -> list[str]:
        """What the file calls its outputs."""
        return ["scores"] if self.segmenter is not None else [f"pyramid_{level}" for level in range(len(outputs))]


class ParityError(Exception):
    """A written file computes something else than PyTorch."""


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        outputs: the shape of each for one image.
        difference: the largest from PyTorch's results, over all outputs.
        largest: magnitude among PyTorch's results.
    """

    outputs: dict[str, tuple[int, ...]]
    difference: float
    largest: float


@dataclass(frozen=True)
class Format:
    """How a kind of file is written and run.

    Attributes:
        packages: the optional ones that it takes.
        write: the part, images to trace it with, names of its outputs, the text on its use, and the file.
        load: from the file, a function of images.
    """

    packages: tuple[str, ...]
    write: Callable[[ExportModule, Tensor, list[str], str, Path], None]
    load: Callable[[Path], Callable[[Tensor], Sequence[Tensor]]]


def write_onnx(part: ExportModule, images: Tensor, names: list[str], about: str, path: Path) -> None:
    """Write ONNX: one file, weights included; the batch is free.

    Raises:
        UserError: it would be larger than such a file can be.
    """
    too_large = UserError(
        "output: more than 2 GiB, which protobuf, and so an ONNX file, cannot hold; write a .pt2, or give a smaller "
        "image_size, of which the masks of shifted windows are a part of the file"
    )
    if sum(value.nbytes for value in part.state_dict().values()) >= ONNX_BYTES:
        raise too_large
    program = torch.onnx.export(
        part,
        (images,),
        dynamo=True,
        input_names=[INPUT],
        output_names=names,
        dynamic_shapes={INPUT: {0: BATCH}},
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # the lines of source that made it, with the paths of this machine
    program.model.metadata_props[ABOUT] = about
    try:
        content = program.model_proto.SerializeToString()
    except (ValueError, import_module("google.protobuf.message").EncodeError):  # by release of protobuf
        raise too_large from None
    path.write_bytes(content)


def load_onnx(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """The file in onnxruntime, on the CPU."""
    session = import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]


def write_program(part: ExportModule, images: Tensor, names: list[str], about: str, path: Path) -> None:
    """Write a program of `torch.export`, whose outputs have no names; the batch is free."""
    shapes = {INPUT: {0: torch.export.Dim(BATCH)}}
    program = torch.export.export(part, (images,), dynamic_shapes=shapes, strict=False)
    program.example_inputs = None  # they would be most of a small model's file
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={ABOUT: about})


def load_program(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """The file in PyTorch, without the code that made it."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


FORMATS = {
    ".onnx": Format(("onnx", "onnxscript", "onnxruntime"), write_onnx, load_onnx),
    ".pt2": Format((), write_program, load_program),
}


def require_exportable(path: Path, image_size: Sequence[int] | None) -> tuple[int, int]:
    """Check, before anything is loaded, that such a file can be made; return height and width.

    Raises:
        UserError: the name is of no format, something is there already, a package is missing, or the size is not given
            or none that the model sees in use.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"output={path}: a name that ends in {' or '.join(FORMATS)}")
    if path.exists():
        raise UserError(f"output={path}: there is something already; give the name of a new file")
    if image_size is None:
        raise UserError(
            f"image_size: needed as [height,width], multiples of {SIZE_DIVISOR} pixels, as the exporters cannot leave "
            "the size free (docs/deployment.md); images are resized and padded to it"
        )
    if any(side % SIZE_DIVISOR for side in image_size):
        raise UserError(
            f"image_size={list(image_size)}: multiples of {SIZE_DIVISOR} pixels, which images are padded to in use"
        )
    for package in FORMATS[path.suffix].packages:
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(
                f"output={path}: needs {', '.join(FORMATS[path.suffix].packages)} ({first_line(error)}); install them "
                "with `pip install '.[onnx]'` in a clone of e3va, or write a .pt2, which needs PyTorch alone"
            ) from None
    return image_size[0], image_size[1]


@torch.no_grad()
def export_dense(
    model: DenseModel, path: Path, image_size: tuple[int, int], *, tolerance: float, about: dict[str, Any]
) -> Exported:
    """Write the dense part of a model in eval mode on the CPU, run the file beside PyTorch, and only then name it.

    Args:
        model: trained.
        path: the suffix says the format.
        image_size: (height, width) in pixels, the only one that the file takes.
        tolerance: largest absolute difference from PyTorch that is let pass.
        about: what users of the file need to know; kept in it as JSON.

    Raises:
        DifferenceError: the file computes something else than PyTorch; none is left.
        UserError: the file cannot be written.
    """
    part, form = ExportModule(model).eval(), FORMATS[path.suffix]
    expected = [part(images) for images in map(_images, CHECKED, [image_size] * len(CHECKED))]
    names = part.names(expected[0])
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            form.write(part, _images(TRACED, image_size), names, json.dumps({**about, "outputs": names}), temporary)
            difference = _difference(form.load(temporary), expected, image_size)
            if not difference <= tolerance:  # also where it is not a number
                raise ParityError(
                    f"{path} not made: it differs from PyTorch by up to {difference:.2g}, "
                    f"and tolerance={tolerance:g} is let pass"
                )
    except (OSError, UnwritableError) as error:
        reason = error.reason if isinstance(error, UnwritableError) else first_line(error)
        raise UserError(f"output={path}: cannot be written ({reason})") from None
    shapes = dict(zip(names, (tuple(output.shape) for output in expected[0]), strict=True))
    return Exported(shapes, difference, max(float(o.abs().max()) for outputs in expected for o in outputs))


def _difference(
    run: Callable[[Tensor], Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], image_size: tuple[int, int]
) -> float:
    """The largest absolute one on the images that `expected` is of; not a number if any is not."""
    largest = []
    for count, outputs in zip(CHECKED, expected, strict=True):
        found = run(_images(count, image_size))
        largest += [(one - other).abs().max() for one, other in zip(found, outputs, strict=True)]
    return float(torch.stack(largest).max())


def _images(count: int, image_size: tuple[int, int]) -> Tensor:
    """Noise in every pixel, the same for the same arguments: (count, 3, H, W) of whole numbers 0..255."""
    noise = torch.Generator().manual_seed(count)
    return torch.randint(256, (count, 3, *image_size), generator=noise).float()
