"""Trained weights from a checkpoint or an exported adapter, and the model that they are loaded into."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from e3va_cli.config.run_config import RunConfig, from_dict, warn_of_legacy_options, with_older_options
from e3va_cli.errors import UserError, first_line
from e3va_cli.export.adapter_config import METADATA_SCHEMA, metadata_errors
from e3va_cli.export.adapter_folder import read_adapter
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.backbones import BackboneFingerprint, ResidualBackbone, build_backbone
from e3va_cli.models.model import DenseModel, build_from_backbone, build_meta_model
from e3va_cli.runs.folder import ADAPTER_CONFIG, find_adapter_folder, find_checkpoint
from e3va_cli.training.checkpoints import METADATA_KEY, MODEL_PREFIX, check_metadata, check_state_dict, read_checkpoint

EXTRACTOR_PREFIX = "extractor."  # of the weights of adapters and output norms, as opposed to neck and head


@dataclass(frozen=True)
class AdapterCheckpoint:
    """The trainable weights of a run, without its frozen backbone.

    Attributes:
        path: of the checkpoint or the adapter folder.
        metadata: as `build_metadata` returns it: `backbone` (its fingerprint), `adapter`, `head`, `classes`,
            `category_ids` and `config`.
        state_dict: the weights, by their names in a `DenseModel`.
        steps: number of optimizer steps.
    """

    path: Path
    metadata: dict[str, Any]
    state_dict: dict[str, Tensor]
    steps: int = 0

    @cached_property
    def config(self) -> RunConfig:
        """Return the configuration of the run."""
        return from_dict(self.metadata["config"])

    @property
    def shares_backbone(self) -> bool:
        """Return whether the tuning method leaves the backbone's activations unchanged, so that models can share it."""
        return METHODS[self.config.adapter.name].shares_backbone


def read_checkpoint_or_adapter(given: str, option: str) -> AdapterCheckpoint:
    """Read a run folder (its last checkpoint), a checkpoint in it, or an exported adapter.

    Args:
        given: its path.
        option: name of the option in error messages.

    Raises:
        UserError: the path does not exist, or the files are damaged or inconsistent.
    """
    folder = find_adapter_folder(given)
    if folder is not None:
        config, state_dict = read_adapter(folder)
        checkpoint = AdapterCheckpoint(folder, _current_metadata(folder, config), state_dict, config["steps"])
        model = build_trained_meta_model(checkpoint)
        check_state_dict(state_dict, model, folder)
        backbone = model.extractor.backbone
        if config["normalisation"] != {"mean": list(backbone.mean), "std": list(backbone.std)}:
            raise UserError(
                f"{folder / ADAPTER_CONFIG}: normalisation differs from that of {config['backbone']['timm_name']} in "
                f"the installed timm; install timm {config['versions'].get('timm')}, which it was trained with"
            )
        return checkpoint
    _, path = find_checkpoint(given, option)
    content = read_checkpoint(path)
    state_dict = {name.removeprefix(MODEL_PREFIX): value for name, value in content["state_dict"].items()}
    if error := next(metadata_errors(content[METADATA_KEY]), None):
        raise UserError(f"{path}: invalid metadata: {error}; use a checkpoint as written by `e3va train`")
    metadata = _current_metadata(path, content[METADATA_KEY])
    checkpoint = AdapterCheckpoint(path, metadata, state_dict, content["global_step"])
    check_state_dict(state_dict, build_trained_meta_model(checkpoint), path)
    return checkpoint


def _current_metadata(path: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the saved metadata, with the former defaults of options that were added since."""
    warn_of_legacy_options(path, saved["config"])
    config = with_older_options(saved["config"])
    metadata = {key: saved[key] for key in METADATA_SCHEMA}
    return {**metadata, "config": config, "adapter": config["adapter"], "head": config["head"]}


def build_trained_backbone(
    checkpoint: AdapterCheckpoint,
    *,
    weights: str | None = None,
    pretrained: bool | None = None,
    offload: str | None = None,
) -> tuple[ResidualBackbone, BackboneFingerprint]:
    """Build the backbone that the weights were trained on.

    Args:
        checkpoint: of the run.
        weights: file of the backbone's weights, if it has moved.
        pretrained: override of the run's `backbone.pretrained`.
        offload: override of the run's `backbone.offload`.

    Raises:
        UserError: the backbone's weights cannot be loaded, or differ from the run's.
    """
    options = replace(checkpoint.config.backbone, compile=False)  # compiling takes longer than a few forward passes
    if offload is not None:
        options = replace(options, offload=offload)
    if weights is not None:
        options = replace(options, weights=weights, pretrained=bool(pretrained))
    elif pretrained is not None:
        options = replace(options, pretrained=pretrained, weights=None if pretrained else options.weights)
    backbone, identity = build_backbone(options)
    check_backbone(checkpoint, identity)
    return backbone, identity


def check_backbone(checkpoint: AdapterCheckpoint, identity: BackboneFingerprint) -> None:
    """Check that the weights were trained on this backbone.

    Raises:
        UserError: the architecture, the weights or the options of the backbone differ.
    """
    metadata = {**checkpoint.metadata, "backbone": vars(identity)}
    check_metadata({METADATA_KEY: checkpoint.metadata}, checkpoint.path, metadata)


def build_trained_model(
    checkpoint: AdapterCheckpoint, backbone: ResidualBackbone, identity: BackboneFingerprint
) -> DenseModel:
    """Build the trained model on a backbone, in eval mode.

    Models can share one backbone if `shares_backbone` is true for each.

    Raises:
        UserError: weights are missing or unexpected, or have another shape or type.
    """
    model = build_from_backbone(checkpoint.config, backbone, identity, len(checkpoint.metadata["classes"]))
    load_trained_weights(model, checkpoint)
    return model.eval()


def load_trained_weights(model: DenseModel, checkpoint: AdapterCheckpoint) -> None:
    """Copy the weights into a model, cast to its dtypes.

    Raises:
        UserError: weights are missing or unexpected, or have another shape or type.
    """
    check_state_dict(checkpoint.state_dict, model, checkpoint.path)
    model.load_state_dict(checkpoint.state_dict, strict=False)


def build_trained_meta_model(checkpoint: AdapterCheckpoint) -> DenseModel:
    """Build the model on the meta device, without weights.

    Raises:
        UserError: no model can be built from the configuration, which comes from an untrusted file.
    """
    try:
        return build_meta_model(checkpoint.config, num_classes=len(checkpoint.metadata["classes"]))
    except Exception as error:  # timm, torch and torchvision raise many types for invalid values
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(
            f"{checkpoint.path}: no model can be built from its configuration ({reason}); export or train again"
        ) from None
