"""Weights of a backbone: from a local file in timm's or the Swin authors' layout; and their identity."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from e3va_cli.errors import UserError, first_line
from e3va_cli.utils.text import truncate_list

# Classifier and buffers that any model recomputes: no part of a dense feature extractor.
IGNORED_KEYS = re.compile(r"^(head\.|norm\.)|attn_mask$|relative_position_index$")
MAX_LISTED = 6
REFUSED_OBJECT = re.compile(r"GLOBAL ([\w.]+)")  # in what PyTorch says of a class or function that it refuses


def safe_torch_load(path: Path) -> Any:
    """What `torch.save` has written, on the CPU: tensors and plain values, without running any code.

    Raises:
        UserError: the file is broken, or holds anything else; says which, but not what the file was to be.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what the exception then says
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = REFUSED_OBJECT.search(str(error))
        what = f"an object, {found[1]}" if found else "objects"
        raise UserError(f"it holds {what}; only tensors and plain values are read, as others could run code") from None
    except Exception as error:  # torch.load raises zip, EOF, OS and runtime errors
        raise UserError(first_line(error)) from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a `.safetensors` or PyTorch file, without running any code in it.

    Raises:
        UserError: no such file, an unreadable one, or one that holds no tensors by name.
    """
    if not path.is_file():
        raise UserError(f"backbone.weights: no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = safe_torch_load(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"backbone.weights: {path} is not a safetensors file: {first_line(error)}") from None
    except UserError as error:
        raise UserError(
            f"backbone.weights: {path} cannot be read as PyTorch weights ({error}); "
            "save the plain state_dict of the model with torch.save or safetensors"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not is_state_dict(content):
        raise UserError(f"backbone.weights: {path} holds no state_dict (a mapping of names to plain tensors)")
    return content


def is_state_dict(content: object) -> TypeGuard[dict[str, Tensor]]:
    """Whether it maps names to tensors that have values: sparse ones and mere shapes are none."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        for name, value in content.items()
    )


def to_timm_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the Swin authors' tensors as timm does: their `downsample` ends a stage, timm's begins the next."""
    if not any(name.startswith("layers.0.downsample.") for name in state):
        return state

    def renamed(name: str) -> str:
        return re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name)

    return {renamed(name): tensor for name, tensor in state.items()}


def load_weights(
    model: nn.Module, path: Path, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state
) -> None:
    """Load every parameter of `model` from a file in timm's layout, or one that `convert` brings to it.

    Raises:
        UserError: the file does not fit; lists what is missing, left over, of another shape or type.
    """
    state = {k: v for k, v in convert(read_state_dict(path)).items() if not IGNORED_KEYS.search(k)}
    wanted = dict(model.named_parameters())
    misfits = {
        "missing": [name for name in wanted if name not in state],
        "not in this model": [name for name in state if name not in wanted],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in state and state[name].shape != tensor.shape
        ],
        "of another type": [
            f"{name} {state[name].dtype}" for name in wanted if name in state and not state[name].is_floating_point()
        ],
    }
    if any(misfits.values()):
        listed = "; ".join(
            f"{len(names)} {what}: {truncate_list(names, MAX_LISTED)}" for what, names in misfits.items() if names
        )
        raise UserError(f"backbone.weights: {path} does not fit this backbone; {listed}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(state[name])


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of all parameters: the identity of a frozen backbone."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
