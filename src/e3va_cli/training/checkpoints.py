"""Checkpoints: what was trained, the optimizer and the progress, and the identity of the backbone they belong to.

The frozen backbone is never written. What trains is what is saved: one filter decides both.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.optim import Optimizer

from e3va_cli.components.options import binding_options
from e3va_cli.config.run_config import RunConfig, kind_of, to_dict, with_older_options
from e3va_cli.errors import UserError
from e3va_cli.models.backbones import BackboneFingerprint
from e3va_cli.models.backbones.weights import is_state_dict, safe_torch_load
from e3va_cli.utils.files import atomic_write, make_subfolder
from e3va_cli.utils.text import truncate_list

CLASSES_SHOWN = 4
OF_TASK = "model."  # what Lightning puts before the names of the model's tensors
ABOUT = "e3va"  # the checkpoint's key for what it belongs to
DATA = "data"  # and for the fingerprints of what it was trained and evaluated on


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable parameter, and the buffers of modules that hold one."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    owners = {name.rpartition(".")[0] for name in trainable}
    buffers = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in owners}
    return {name: value for name, value in model.state_dict().items() if name in trainable | buffers}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name beside the checkpoint, then renames; reads without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write the whole file or none of it.

        Raises:
            UnwritableError: the disk is full, or the file cannot be written for another reason.
        """
        make_subfolder(Path(path).parent)
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # behind which it hides what the system said
                raise _disk_error(error) or error from None

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain values only."""
        return read_checkpoint(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `e3va train`, on the CPU.

    Raises:
        UserError: unreadable, or not one of ours.
    """
    try:
        checkpoint = safe_torch_load(path)
    except UserError as error:
        raise UserError(f"{path}: not a readable checkpoint ({error})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(ABOUT), dict):
        raise UserError(f"{path}: not a checkpoint of e3va train")
    if not is_state_dict(checkpoint.get("state_dict")) or not isinstance(checkpoint.get("global_step"), int):
        raise UserError(f"{path}: not a checkpoint of e3va train: no plain weights, or no number of steps")
    return checkpoint


def verify(checkpoint: dict[str, Any], path: Path, about: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to this backbone, method, head and classes.

    Raises:
        UserError: one line for each thing that differs.
    """
    saved = checkpoint[ABOUT]
    mistakes = []
    theirs, ours = saved["backbone"], about["backbone"]
    if theirs["timm_name"] != ours["timm_name"]:
        mistakes.append(
            f"{path}: trained on the backbone {theirs['name']}, not on {ours['name']}; use backbone={theirs['name']}"
        )
    elif theirs["fingerprint"] != ours["fingerprint"]:
        mistakes.append(
            f"{path}: trained on other weights of {ours['name']} "
            f"(fingerprint {theirs['fingerprint'][:12]}, here {ours['fingerprint'][:12]}); "
            "give the same backbone.weights or backbone.pretrained as the run had"
        )
    theirs, ours = (binding("backbone", with_older_options(one["config"])["backbone"]) for one in (saved, about))
    mistakes += [
        f"{path}: trained with backbone.{key}={str(value).lower()}; give it"
        for key, value in theirs.items()
        if key in ours and ours[key] != value
    ]
    for part in ("adapter", "head"):
        theirs, ours = binding(part, saved[part]), binding(part, about[part])
        if theirs != ours:
            keys = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
            mistakes.append(f"{path}: trained with another {part}; these differ: {', '.join(keys)}")
    for part in ("classes", "category_ids"):
        if saved[part] != about[part]:
            mistakes.append(
                f"{path}: trained on other {part.replace('_', ' ')} than this data set has "
                f"({truncate_list(saved[part], CLASSES_SHOWN)} there, {truncate_list(about[part], CLASSES_SHOWN)} here)"
            )
            break
    if mistakes:
        raise UserError(*mistakes)


def binding(part: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those options of an `adapter` or a `head` that trained weights depend on; the others may change."""
    kind = kind_of(part, options)
    return options if kind is None else binding_options(kind, options)


def require_same_weights(state: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Check that weights are exactly those that are trained in `model`, which may be an outline.

    Raises:
        UserError: some are missing, unknown, or of another size or type.
    """
    expected = trained_state(model)
    other = {name for name in expected.keys() & state.keys() if _kind(expected[name]) != _kind(state[name])}
    for what, names in (
        ("has unknown weights", state.keys() - expected.keys()),
        ("lacks weights", expected.keys() - state.keys()),
        ("has other sizes or types of", other),
    ):
        if names:
            listed = truncate_list(sorted(names), 1)
            raise UserError(f"{path}: {what}: {listed}; the file and its configuration do not agree")


def require_fitting_optimizer(checkpoint: dict[str, Any], optimizer: Optimizer, path: Path) -> None:
    """Check that the state of the optimizer in a checkpoint is one of `optimizer`'s parameters.

    Raises:
        UserError: it is of more, fewer or other parameters.
    """
    advice = "the file is damaged or of another run"
    try:
        (saved,) = checkpoint["optimizer_states"]
        counts = [len(group["params"]) for group in saved["param_groups"]]
        moments = {index: values["exp_avg"].shape for index, values in saved["state"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path}: it holds no state of AdamW; {advice}") from None
    groups = [group["params"] for group in optimizer.param_groups]
    if counts != list(map(len, groups)):
        raise UserError(f"{path}: its optimizer has {counts} parameters, not {list(map(len, groups))}; {advice}")
    parameters = [parameter for group in groups for parameter in group]
    wrong = [index for index, shape in moments.items() if parameters[index].shape != shape]
    lacking = len(parameters) - len(moments) if moments else 0  # none before the first step
    if wrong or lacking:
        what = f"lacks {lacking} of its moments" if lacking else f"has moments of another size, as number {wrong[0]}"
        raise UserError(f"{path}: its optimizer {what}; {advice}")


def _disk_error(error: BaseException) -> OSError | None:
    """What the system said before an error was made of it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def _kind(value: Tensor) -> tuple[torch.Size, bool]:
    return value.shape, value.is_floating_point()


def about_model(
    identity: BackboneFingerprint, config: RunConfig, classes: list[str], category_ids: list[int]
) -> dict[str, Any]:
    """What a checkpoint needs to be used, plain: its backbone, method, head and classes."""
    kept = to_dict(config)
    return {
        "backbone": asdict(identity),
        "adapter": kept["adapter"],
        "head": kept["head"],
        "classes": list(classes),
        "category_ids": list(category_ids),
        "config": kept,
    }
