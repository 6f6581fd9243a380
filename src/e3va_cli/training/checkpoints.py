"""Checkpoints: trainable weights, the state of the optimizer and of Lightning's loops, and metadata of the model.

The frozen backbone is never saved: the weights that are trained are those that are saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer

from e3va_cli.components.options import binding_options
from e3va_cli.config.run_config import RunConfig, kind_of, metadata_in_current_names, to_dict, with_older_options
from e3va_cli.errors import UserError
from e3va_cli.models.backbones import BackboneFingerprint
from e3va_cli.models.backbones.weights import is_state_dict, safe_torch_load
from e3va_cli.utils.files import atomic_write, make_subfolder
from e3va_cli.utils.text import truncate_list

CLASSES_SHOWN = 4
MODEL_PREFIX = "model."  # of weights' names in a checkpoint: the model is an attribute of the LightningModule
METADATA_KEY = "e3va"  # of a checkpoint
FINGERPRINTS_KEY = "data"  # of the training and validation images


def trainable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return every trainable parameter, and the buffers of modules that have one."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    owners = {name.rpartition(".")[0] for name in trainable}
    buffers = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in owners}
    return {name: value for name, value in model.state_dict().items() if name in trainable | buffers}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file and renames it; loads without running code from the file."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole file or nothing.

        Raises:
            UnwritableError: the disk is full, or the file cannot be written for another reason.
        """
        make_subfolder(Path(path).parent)
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # torch.save hides the OSError
                raise _os_error(error) or error from None

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain values only."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint of `e3va train`, on the CPU.

    Raises:
        UserError: the file cannot be read, or is no such checkpoint.
    """
    try:
        checkpoint = safe_torch_load(path)
    except UserError as error:
        raise UserError(f"{path}: not a readable checkpoint ({error})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(METADATA_KEY), dict):
        raise UserError(f"{path}: not a checkpoint of e3va train")
    if not is_state_dict(checkpoint.get("state_dict")) or not isinstance(checkpoint.get("global_step"), int):
        raise UserError(f"{path}: not a checkpoint of e3va train: no state_dict of tensors, or no global_step")
    return {**checkpoint, METADATA_KEY: metadata_in_current_names(checkpoint[METADATA_KEY])}


def build_metadata(
    identity: BackboneFingerprint, config: RunConfig, classes: list[str], category_ids: list[int]
) -> dict[str, Any]:
    """Return what the use of trainable weights depends on, as plain values: backbone, method, head and classes."""
    plain = to_dict(config)
    return {
        "backbone": asdict(identity),
        "adapter": plain["adapter"],
        "head": plain["head"],
        "classes": list(classes),
        "category_ids": list(category_ids),
        "config": plain,
    }


def check_metadata(checkpoint: dict[str, Any], path: Path, metadata: dict[str, Any]) -> None:
    """Check that a checkpoint is of the backbone, method, head and classes of `metadata`.

    Raises:
        UserError: one line for each difference.
    """
    saved = checkpoint[METADATA_KEY]
    errors = list(backbone_errors(path, saved, metadata))
    neck, our_neck = (with_older_options(one["config"])["neck"] for one in (saved, metadata))
    if neck != our_neck:
        errors.append(f"{path}: trained with neck={neck}; set it")
    for part in ("adapter", "head"):
        theirs, ours = checkpoint_options(part, saved[part]), checkpoint_options(part, metadata[part])
        if theirs != ours:
            keys = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
            errors.append(f"{path}: trained with another {part}; different options: {', '.join(keys)}")
    for part in ("classes", "category_ids"):
        if saved[part] != metadata[part]:
            listed = [truncate_list(one[part], CLASSES_SHOWN) for one in (saved, metadata)]
            errors.append(
                f"{path}: trained on other {part.replace('_', ' ')} than this data set has "
                f"(checkpoint: {listed[0]}; data set: {listed[1]})"
            )
            break
    if errors:
        raise UserError(*errors)


def backbone_errors(path: Path, saved: dict[str, Any], metadata: dict[str, Any]) -> Iterator[str]:
    """Yield the differences of the backbone in the metadata `saved` at `path` from that of `metadata`."""
    theirs, ours = saved["backbone"], metadata["backbone"]
    if theirs["timm_name"] != ours["timm_name"]:
        yield f"{path}: trained on the backbone {theirs['name']}, not on {ours['name']}; use backbone={theirs['name']}"
    elif theirs["fingerprint"] != ours["fingerprint"]:
        yield (
            f"{path}: trained on other weights of {ours['name']} "
            f"(fingerprint {theirs['fingerprint'][:12]}, here {ours['fingerprint'][:12]}); "
            "use the run's backbone.weights or backbone.pretrained"
        )
    theirs, ours = (
        checkpoint_options("backbone", with_older_options(one["config"])["backbone"]) for one in (saved, metadata)
    )
    for key, value in theirs.items():
        if key in ours and ours[key] != value:
            yield f"{path}: trained with backbone.{key}={str(value).lower()}; set it"


def checkpoint_options(part: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return those of the options of a backbone, an adapter or a head that trained weights depend on."""
    options_type = kind_of(part, options)
    return options if options_type is None else binding_options(options_type, options)


def check_state_dict(state: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Check that a state dict has exactly the trainable weights of `model`, which may be on the meta device.

    Raises:
        UserError: weights are missing or unexpected, or have another shape or type.
    """
    expected = trainable_state_dict(model)
    differ = {name for name in expected.keys() & state.keys() if _shape(expected[name]) != _shape(state[name])}
    for what, names in (
        ("unexpected weights", state.keys() - expected.keys()),
        ("missing weights", expected.keys() - state.keys()),
        ("weights with a wrong shape or dtype", differ),
    ):
        if names:
            listed = truncate_list(sorted(names), 1)
            raise UserError(f"{path}: {what}: {listed}; the weights and their configuration do not match")


def check_optimizer_state(checkpoint: dict[str, Any], optimizer: Optimizer, path: Path) -> None:
    """Check that the optimizer state of a checkpoint fits the parameters of `optimizer`.

    Raises:
        UserError: it is of more, fewer or other parameters.
    """
    advice = "the file is damaged or of another run"
    try:
        (saved,) = checkpoint["optimizer_states"]
        counts = [len(group["params"]) for group in saved["param_groups"]]
        shapes = {index: values["exp_avg"].shape for index, values in saved["state"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: no state of AdamW in the checkpoint; {advice}") from None
    groups = [group["params"] for group in optimizer.param_groups]
    if counts != list(map(len, groups)):
        expected = list(map(len, groups))
        raise UserError(f"{path}: the optimizer state is of {counts} parameters, not of {expected}; {advice}")
    parameters = [parameter for group in groups for parameter in group]
    wrong = [index for index, shape in shapes.items() if parameters[index].shape != shape]
    missing = len(parameters) - len(shapes) if shapes else 0  # none has a state before the first step
    if missing:
        raise UserError(f"{path}: the optimizer state is missing for {missing} parameters; {advice}")
    if wrong:
        raise UserError(f"{path}: the optimizer state of parameter {wrong[0]} has a wrong shape; {advice}")


def _os_error(error: BaseException) -> OSError | None:
    """Return the OSError behind an error, or None."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def _shape(value: Tensor) -> tuple[torch.Size, bool]:
    return value.shape, value.is_floating_point()
