"""Load backbone weights from files, and compute their fingerprint."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from e3va_cli.errors import UserError, first_line
from e3va_cli.utils.text import truncate_list

# Classifiers, what masked pre-training leaves, and buffers that models recompute.
IGNORED_KEYS = re.compile(r"^(head\.|norm\.|mask_token$)|attn_mask$|relative_position_index$|relative_coords_table$")
MAX_LISTED = 6
REFUSED_OBJECT = re.compile(
    r"GLOBAL ([\w.]+)"
)  # in PyTorch's message about a class or function that it refuses to load


def safe_torch_load(path: Path) -> Any:
    """Load tensors and plain values from a file of `torch.save` to the CPU, without running code in it.

    Raises:
        UserError: the file is unreadable, or contains other objects.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exception says the same
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        refused = REFUSED_OBJECT.search(str(error))
        raise UserError(
            f"the file contains {f'an object, {refused[1]}' if refused else 'objects'}; only tensors and plain values "
            "are loaded, as other objects could run code"
        ) from None
    except Exception as error:  # torch.load raises zip, EOF, OS and runtime errors
        raise UserError(first_line(error)) from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Load a state dict from a `.safetensors` or PyTorch file, without running code in it.

    Raises:
        UserError: the file does not exist, is unreadable, or has no state dict.
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
            "save the model's state_dict with torch.save or safetensors"
        ) from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not is_state_dict(content):
        raise UserError(f"backbone.weights: {path} contains no state_dict (a mapping of names to dense tensors)")
    return content


def is_state_dict(content: object) -> TypeGuard[dict[str, Tensor]]:
    """Return whether `content` maps names to dense tensors with data."""
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta
        for name, value in content.items()
    )


def packaged_weights(name: str) -> Path:
    """Return the file of weights that come with the package.

    Raises:
        UserError: there are none of this name.
    """
    path = Path(str(resources.files("e3va_cli.weights"))) / name / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"backbone.packaged_weights={name}: the package has no such weights; install it again")
    return path


def load_weights(
    model: nn.Module, path: Path, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda state: state
) -> None:
    """Load every parameter of `model` from a file in timm's layout, or one that `convert` brings to it.

    Raises:
        UserError: names, shapes or types do not match; lists them.
    """
    state = {k: v for k, v in convert(read_state_dict(path)).items() if not IGNORED_KEYS.search(k)}
    parameters = dict(model.named_parameters())
    mismatches = {
        "missing": [name for name in parameters if name not in state],
        "unexpected": [name for name in state if name not in parameters],
        "with another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in parameters.items()
            if name in state and state[name].shape != tensor.shape
        ],
        "with another type": [
            f"{name} {state[name].dtype}"
            for name in parameters
            if name in state and not state[name].is_floating_point()
        ],
    }
    if any(mismatches.values()):
        listed = "; ".join(
            f"{len(names)} {what}: {truncate_list(names, MAX_LISTED)}" for what, names in mismatches.items() if names
        )
        raise UserError(f"backbone.weights: {path} does not match this backbone: {listed}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
