"""Export the dense part of a trained model to ONNX or torch.export.

    images -> normalization -> backbone with adapters -> output norms -> neck [-> scores of a segmenter]

A detector's proposals, NMS and RoI heads are not exported, as their sizes depend on the image, which
exporters do not support.
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

METADATA_NAME = "e3va"  # of the JSON in the file
INPUT, BATCH = "images", "batch"
TRACE_BATCH_SIZE = 2  # exporters treat a batch size of 1 as static
MAX_ONNX_BYTES = 2**31  # protobuf's limit
PARITY_BATCH_SIZES = (1, 3)  # of the comparison with PyTorch


class ExportModule(nn.Module):
    """Compute the feature pyramid of a detector, finest level first, or the scores of a segmenter."""

    def __init__(self, model: DenseModel) -> None:
        super().__init__()
        head: Any = model.head
        self.extractor, self.rescale, self.mean, self.std = model.extractor, model.rescale, model.mean, model.std
        self.segmenter = head if "semantic" in head.target_types else None
        self.neck = None if self.segmenter else head.neck  # not the whole head, whose weights would be exported

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Compute levels (B, C, H_s, W_s) or scores (B, K, H / 4, W / 4) of float32 RGB in 0..255, (B, 3, H, W)."""
        features = self.rescale(self.extractor((images - self.mean) / self.std))
        if self.segmenter is not None:
            return (self.segmenter.scores(features),)
        return tuple(build_pyramid(self.neck, features).values())

    def output_names(self, outputs: Sequence[Tensor]) -> list[str]:
        """Return the names of the outputs."""
        return ["scores"] if self.segmenter is not None else [f"pyramid_{level}" for level in range(len(outputs))]


class ParityError(Exception):
    """The outputs of an exported file differ from PyTorch's."""


@dataclass(frozen=True)
class ExportResult:
    """An exported file that was compared with PyTorch.

    Attributes:
        outputs: shape of each output for a batch of one image, by name.
        max_difference: largest absolute difference from PyTorch, over all outputs.
        max_magnitude: largest absolute value of PyTorch's outputs.
    """

    outputs: dict[str, tuple[int, ...]]
    max_difference: float
    max_magnitude: float


@dataclass(frozen=True)
class Format:
    """An export format.

    Attributes:
        packages: optional dependencies that it needs.
        write: writes (module, example images, output names, metadata as JSON, path).
        load: returns a function of images that runs the file.
    """

    packages: tuple[str, ...]
    write: Callable[[ExportModule, Tensor, list[str], str, Path], None]
    load: Callable[[Path], Callable[[Tensor], Sequence[Tensor]]]


def write_onnx(module: ExportModule, images: Tensor, names: list[str], metadata: str, path: Path) -> None:
    """Write one ONNX file, weights included, with a dynamic batch size.

    Raises:
        UserError: the file would exceed protobuf's limit of 2 GiB.
    """
    too_large = UserError(
        "output: the model exceeds 2 GiB, the limit of ONNX files (protobuf); export to .pt2, or use a smaller "
        "image_size, as attention masks of its size are stored in the file"
    )
    if sum(value.nbytes for value in module.state_dict().values()) >= MAX_ONNX_BYTES:
        raise too_large
    program = torch.onnx.export(
        module,
        (images,),
        dynamo=True,
        input_names=[INPUT],
        output_names=names,
        dynamic_shapes={INPUT: {0: BATCH}},
        verbose=False,
    )
    assert program is not None
    for node in program.model.graph:
        node.metadata_props.clear()  # source lines, with paths of this machine
    program.model.metadata_props[METADATA_NAME] = metadata
    try:
        content = program.model_proto.SerializeToString()
    except (ValueError, import_module("google.protobuf.message").EncodeError):  # depends on the version of protobuf
        raise too_large from None
    path.write_bytes(content)


def load_onnx(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """Load an ONNX file in onnxruntime, on the CPU."""
    session = import_module("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {INPUT: images.numpy()})]


def write_torch_export(module: ExportModule, images: Tensor, names: list[str], metadata: str, path: Path) -> None:
    """Write a `torch.export` program with a dynamic batch size; its outputs have no names."""
    shapes = {INPUT: {0: torch.export.Dim(BATCH)}}
    program = torch.export.export(module, (images,), dynamic_shapes=shapes, strict=False)
    program.example_inputs = None  # larger than the weights of a small model
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA_NAME: metadata})


def load_torch_export(path: Path) -> Callable[[Tensor], Sequence[Tensor]]:
    """Load a `torch.export` program."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


FORMATS = {
    ".onnx": Format(("onnx", "onnxscript", "onnxruntime"), write_onnx, load_onnx),
    ".pt2": Format((), write_torch_export, load_torch_export),
}


def check_export_options(path: Path, image_size: Sequence[int] | None) -> tuple[int, int]:
    """Check the options before the model is loaded; return (height, width).

    Raises:
        UserError: the suffix is unknown, the file exists, a package is missing, or the image size is missing or not
            divisible by 32.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"output={path}: unknown format; use a name that ends in {' or '.join(FORMATS)}")
    if path.exists():
        raise UserError(f"output={path}: exists already; use the name of a new file")
    if image_size is None:
        raise UserError(
            f"image_size: required; set it to [height,width] in multiples of {SIZE_DIVISOR} pixels, to which images "
            "are resized and padded; dynamic sizes are not supported (docs/deployment.md)"
        )
    if any(side % SIZE_DIVISOR for side in image_size):
        raise UserError(f"image_size={list(image_size)}: must be multiples of {SIZE_DIVISOR} pixels")
    for package in FORMATS[path.suffix].packages:
        try:
            import_module(package)
        except ImportError as error:
            raise UserError(
                f"output={path}: requires {', '.join(FORMATS[path.suffix].packages)} ({first_line(error)}); run "
                "`pip install '.[onnx]'` in a clone of e3va, or export to .pt2, which requires only PyTorch"
            ) from None
    return image_size[0], image_size[1]


@torch.no_grad()
def export_model(
    model: DenseModel, path: Path, image_size: tuple[int, int], *, tolerance: float, metadata: dict[str, Any]
) -> ExportResult:
    """Write the dense part of a model, compare the file with PyTorch, and delete it if they differ.

    Args:
        model: in eval mode on the CPU.
        path: of the file; its suffix selects the format.
        image_size: (height, width) of the input in pixels, static in the file.
        tolerance: largest accepted absolute difference from PyTorch.
        metadata: stored in the file as JSON, with the names of the outputs.

    Raises:
        ParityError: an output differs by more than `tolerance`.
        UserError: the file cannot be written.
    """
    module, file_format = ExportModule(model).eval(), FORMATS[path.suffix]
    expected = [module(_random_images(batch_size, image_size)) for batch_size in PARITY_BATCH_SIZES]
    names = module.output_names(expected[0])
    metadata_json = json.dumps({**metadata, "outputs": names})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary:
            file_format.write(module, _random_images(TRACE_BATCH_SIZE, image_size), names, metadata_json, temporary)
            difference = _max_difference(file_format.load(temporary), expected, image_size)
            if not difference <= tolerance:  # true for NaN
                raise ParityError(
                    f"{path} not written: its outputs differ from PyTorch's by up to {difference:.2g}, more than "
                    f"tolerance={tolerance:g}"
                )
    except (OSError, UnwritableError) as error:
        reason = error.reason if isinstance(error, UnwritableError) else first_line(error)
        raise UserError(f"output={path}: cannot be written ({reason})") from None
    shapes = dict(zip(names, (tuple(output.shape) for output in expected[0]), strict=True))
    return ExportResult(shapes, difference, max(float(o.abs().max()) for outputs in expected for o in outputs))


def _max_difference(
    run: Callable[[Tensor], Sequence[Tensor]], expected: Sequence[Sequence[Tensor]], image_size: tuple[int, int]
) -> float:
    """Return the largest absolute difference on the parity batches; NaN if any is NaN."""
    differences = []
    for batch_size, outputs in zip(PARITY_BATCH_SIZES, expected, strict=True):
        actual = run(_random_images(batch_size, image_size))
        differences += [(one - other).abs().max() for one, other in zip(actual, outputs, strict=True)]
    return float(torch.stack(differences).max())


def _random_images(batch_size: int, image_size: tuple[int, int]) -> Tensor:
    """Return deterministic noise, float32 (batch_size, 3, H, W) of integers in 0..255."""
    generator = torch.Generator().manual_seed(batch_size)
    return torch.randint(256, (batch_size, 3, *image_size), generator=generator).float()
