"""Exported adapters: folders of safetensors, JSON and a model card. Reading one never unpickles."""

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
from e3va_cli.export.adapter_config import FORMAT, VERSION, config_digest, read_raw_config
from e3va_cli.export.model_card import build_model_card
from e3va_cli.runs.folder import ADAPTER_CARD, ADAPTER_CONFIG, ADAPTER_WEIGHTS
from e3va_cli.utils.files import UnwritableError, atomic_write, write_json

CONFIG_DIGEST_KEY = "config_sha256"  # in the metadata of the safetensors file: digest of its `adapter_config.json`


def write_adapter(folder: Path, state_dict: dict[str, Tensor], config: dict[str, Any], precision: str) -> None:
    """Write the whole folder or nothing.

    Args:
        folder: one that does not exist or is empty.
        state_dict: the trained weights.
        config: of `build_adapter_config`.
        precision: fp32 for the tensors unchanged, fp16 to cast floating-point tensors.

    Raises:
        UserError: the folder is not empty or not writable, or a weight is out of the range of fp16.
    """
    tensors = {name: _cast(name, value, precision) for name, value in state_dict.items()}
    check_output_folder(folder)
    try:
        with _atomic_folder(folder) as temporary:
            weights = temporary / ADAPTER_WEIGHTS
            metadata = {"format": FORMAT, "format_version": str(VERSION), CONFIG_DIGEST_KEY: config_digest(config)}
            save_file(tensors, weights, metadata=metadata)
            file_info = {"sha256": _sha256(weights), "bytes": weights.stat().st_size, "precision": precision}
            config = {**config, "weights": file_info}
            write_json(temporary / ADAPTER_CONFIG, config)
            _check_readable(temporary, folder)
            with atomic_write(temporary / ADAPTER_CARD) as file:
                file.write_text(build_model_card(config, folder.resolve().name), encoding="utf-8")
            weights.chmod(
                (temporary / ADAPTER_CONFIG).stat().st_mode
            )  # safetensors makes it readable by its owner only
    except (OSError, SafetensorError, UnwritableError) as error:
        reason = error.reason if isinstance(error, UnwritableError) else first_line(error)
        raise UserError(f"output={folder}: cannot be written ({reason})") from None


def check_output_folder(folder: Path) -> None:
    """Check that `folder` does not exist or is empty.

    Raises:
        UserError: it is a file, or a folder with files.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"output={folder}: exists already; use the name of a new folder")


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read and check a folder; return the content of `adapter_config.json` and the state dict.

    Raises:
        UserError: a file is missing or damaged, or the files are of different exports.
    """
    config = read_raw_config(folder)
    path, expected = folder / ADAPTER_WEIGHTS, config["weights"]
    if not path.is_file():
        raise UserError(f"{folder}: {ADAPTER_WEIGHTS} is missing; copy the whole exported folder")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise UserError(f"{path}: has {size:,} bytes instead of {expected['bytes']:,}; copy the folder again")
    if _sha256(path) != expected["sha256"]:
        raise UserError(f"{path}: damaged or replaced: wrong checksum; copy the folder again")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a safetensors file ({first_line(error)}); export the adapter again") from None
    if metadata.get("format") != FORMAT or metadata.get(CONFIG_DIGEST_KEY) != config_digest(config):
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: changed after the export, or not exported with {ADAPTER_WEIGHTS}; "
            "export the adapter again"
        )
    return metadata_in_current_names(config), state_dict


def _check_readable(temporary: Path, folder: Path) -> None:
    try:
        read_adapter(temporary)
    except UserError as error:
        raise UserError(f"output={folder}: not written, as it could not be read again: {error}") from None


def _cast(name: str, value: Tensor, precision: str) -> Tensor:
    """Return a contiguous copy on the CPU, which safetensors requires to share no storage."""
    assert precision in EXPORT_PRECISIONS
    copy = value.detach().cpu().contiguous().clone()
    if precision == "fp32" or not copy.is_floating_point():
        return copy
    half = copy.to(torch.float16)
    if not torch.equal(half.isfinite(), copy.isfinite()):
        raise UserError(f"precision=fp16: {name} has values out of the range of fp16 (65,504); use precision=fp32")
    return half


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which is renamed to `folder` at the end, and deleted after an error."""
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
