"""An exported adapter: a folder of safetensors, JSON and a card. Nothing of it is ever unpickled."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from e3va_cli.config.run_config import EXPORT_PRECISIONS, metadata_in_current_names
from e3va_cli.errors import UserError, first_line
from e3va_cli.export.adapter_config import FORMAT, VERSION, config_digest, read_written
from e3va_cli.export.model_card import card
from e3va_cli.runs.folder import ADAPTER_CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS
from e3va_cli.utils.files import UnwritableError, atomic_write, write_json

OF_CONFIG = "config_sha256"  # in the safetensors file: the digest of the configuration that it was written with


def write_adapter(folder: Path, state: dict[str, Tensor], description: dict[str, Any], precision: str) -> None:
    """Make the folder, all of it or nothing.

    Args:
        folder: a new one, or an empty one.
        state: the trained weights.
        description: of `describe`.
        precision: fp32 keeps every tensor as it is, fp16 halves those of floating point.

    Raises:
        UserError: the folder is not empty, cannot be written, or the precision is too narrow for a weight.
    """
    tensors = {name: _narrowed(name, value, precision) for name, value in state.items()}
    require_new(folder)
    try:
        with _whole(folder) as temporary:
            weights = temporary / ADAPTER_WEIGHTS
            marks = {"format": FORMAT, "format_version": str(VERSION), OF_CONFIG: config_digest(description)}
            save_file(tensors, weights, metadata=marks)
            written = {"sha256": _sha256(weights), "bytes": weights.stat().st_size, "precision": precision}
            config = {**description, "weights": written}
            write_json(temporary / ADAPTER_CONFIG, config)
            _require_readable(temporary, folder)
            with atomic_write(temporary / ADAPTER_CARD) as file:
                file.write_text(card(config, folder.resolve().name), encoding="utf-8")
            weights.chmod((temporary / ADAPTER_CONFIG).stat().st_mode)  # safetensors lets nobody else read it
    except (OSError, SafetensorError, UnwritableError) as error:
        reason = error.reason if isinstance(error, UnwritableError) else first_line(error)
        raise UserError(f"output={folder}: cannot be written ({reason})") from None


def require_new(folder: Path) -> None:
    """Raises UserError if there is something at `folder` already."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"output={folder}: there is something already; give the name of a new folder")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The checked content of `adapter_config.json`, and the weights.

    Raises:
        UserError: a file is missing, cut, damaged, or not the one that the other was written with.
    """
    config = read_written(folder)
    path, written = folder / ADAPTER_WEIGHTS, config["weights"]
    if not path.is_file():
        raise UserError(f"{folder}: no {ADAPTER_WEIGHTS} in it; copy the whole exported folder")
    size = path.stat().st_size
    if size != written["bytes"]:
        raise UserError(f"{path}: {size:,} bytes, but {written['bytes']:,} were written; copy the folder again")
    if _sha256(path) != written["sha256"]:
        raise UserError(f"{path}: damaged or exchanged, its checksum is not the one written; copy the folder again")
    try:
        with safe_open(path, framework="pt") as file:
            marks = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a safetensors file ({first_line(error)}); export the adapter again") from None
    if marks.get("format") != FORMAT or marks.get(OF_CONFIG) != config_digest(config):
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: changed after the export, or of other weights than {ADAPTER_WEIGHTS}; "
            "export the adapter again"
        )
    return metadata_in_current_names(config), state


def _require_readable(temporary: Path, folder: Path) -> None:
    try:
        read_adapter(temporary)
    except UserError as error:
        raise UserError(f"output={folder}: not made, as nobody could read it: {error}") from None


def _narrowed(name: str, value: Tensor, precision: str) -> Tensor:
    assert precision in EXPORT_PRECISIONS
    own = value.detach().cpu().contiguous().clone()  # a storage of its own, as safetensors wants it
    if precision == "fp32" or not own.is_floating_point():
        return own
    half = own.to(torch.float16)
    if not torch.equal(half.isfinite(), own.isfinite()):
        raise UserError(f"precision=fp16: {name} has weights beyond its range of 65,504; use precision=fp32")
    return half


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder`, renamed to it at the end, removed if anything goes wrong."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
