"""`e3va export`."""

from __future__ import annotations

import sys
from pathlib import Path

from e3va_cli.commands.console import console
from e3va_cli.config.run_config import ExportConfig
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import build_trained_backbone, build_trained_model, read_checkpoint_or_adapter
from e3va_cli.export.onnx import ExportResult, ParityError, check_export_options, export_model

MB = 10**6


def run(config: ExportConfig) -> None:
    """Export the model and print its inputs and outputs; exit code 1 if its results differ from PyTorch's."""
    if not config.output:
        raise UserError("output: the name of a file is needed")
    path = Path(config.output)
    height, width = check_export_options(path, config.image_size)
    checkpoint = read_checkpoint_or_adapter(config.checkpoint, "checkpoint")
    backbone = build_trained_backbone(checkpoint, **vars(config.backbone), offload="none")
    model = build_trained_model(checkpoint, *backbone)
    metadata = {
        "classes": checkpoint.metadata["classes"],
        "category_ids": checkpoint.metadata["category_ids"],
        "padding": model.mean.flatten().tolist(),
    }
    try:
        exported = export_model(model, path, (height, width), tolerance=config.tolerance, metadata=metadata)
    except ParityError as error:
        print(f"e3va: error: {error}", file=sys.stderr)
        sys.exit(1)
    print_summary(path, (height, width), exported)


def print_summary(path: Path, image_size: tuple[int, int], exported: ExportResult) -> None:
    """Print file size, input, outputs and the largest difference from PyTorch."""
    height, width = image_size
    console.print(f"{path}: {path.stat().st_size / MB:,.1f} MB", markup=False)
    console.print(f"  in   images     float32 (batch, 3, {height}, {width}), RGB of 0 to 255")
    for name, (_, *shape) in exported.outputs.items():
        console.print(f"  out  {name:<10} float32 (batch, {', '.join(map(str, shape))})")
    console.print(
        f"Largest difference from PyTorch: {exported.max_difference:.1e}, of values up to {exported.max_magnitude:.1f}"
    )
