"""What was trained, wherever it lies, and the model that it makes of its backbone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from e3va_cli.config.run_config import RunConfig, from_dict, warn_of_legacy_options, with_older_options
from e3va_cli.errors import UserError, first_line
from e3va_cli.export.adapter_config import ABOUT_FORM, about_mistakes
from e3va_cli.export.adapter_folder import read_adapter
from e3va_cli.models.backbones import BackboneFingerprint, ResidualBackbone, build_backbone
from e3va_cli.models.model import DenseModel, build_from_backbone, build_meta_model
from e3va_cli.runs.folder import ADAPTER_CONFIG, find_adapter_folder, find_checkpoint
from e3va_cli.training.checkpoints import METADATA_KEY, MODEL_PREFIX, check_metadata, check_state_dict, read_checkpoint

EXTRACTOR = "extractor."  # what names begin with of what was trained on the backbone: adapters and output norms


@dataclass(frozen=True)
class AdapterCheckpoint:
    """Trained weights without their backbone.

    Attributes:
        path: the file or folder that they were read from.
        about: what they belong to, plain: `backbone` (its identity), `adapter`, `head`, `classes`, `category_ids`, and
            the `config` of the run.
        state: the weights, by their names in a `DenseModel`.
        steps: optimizer steps that made them.
    """

    path: Path
    about: dict[str, Any]
    state: dict[str, Tensor]
    steps: int = 0

    @cached_property
    def config(self) -> RunConfig:
        """Of the run."""
        return from_dict(self.about["config"])


def read_checkpoint_or_adapter(given: str, option: str) -> AdapterCheckpoint:
    """What was trained, from a run folder (its last checkpoint), a checkpoint in it, or an exported adapter.

    Raises:
        UserError: there is none, or it is damaged; names `option`.
    """
    folder = find_adapter_folder(given)
    if folder is not None:
        config, state = read_adapter(folder)
        trained = AdapterCheckpoint(folder, _about(folder, config), state, config["steps"])
        model = outlined(trained)
        check_state_dict(trained.state, model, folder)
        backbone = model.extractor.backbone
        if config["normalisation"] != {"mean": list(backbone.mean), "std": list(backbone.std)}:
            raise UserError(
                f"{folder / ADAPTER_CONFIG}: normalisation is not that of {config['backbone']['timm_name']} here; "
                f"use timm {config['versions'].get('timm')}, which it was trained with"
            )
        return trained
    _, path = find_checkpoint(given, option)
    content = read_checkpoint(path)
    state = {name.removeprefix(MODEL_PREFIX): value for name, value in content["state_dict"].items()}
    if found := next(about_mistakes(content[METADATA_KEY]), None):
        raise UserError(f"{path}: {found}; it is not as `e3va train` wrote it")
    trained = AdapterCheckpoint(path, _about(path, content[METADATA_KEY]), state, content["global_step"])
    check_state_dict(trained.state, outlined(trained), path)
    return trained


def _about(place: Path, saved: dict[str, Any]) -> dict[str, Any]:
    """What weights belong to, with the options that are younger than they are."""
    warn_of_legacy_options(place, saved["config"])
    config = with_older_options(saved["config"])
    about = {key: saved[key] for key in ABOUT_FORM}
    return {**about, "config": config, "adapter": config["adapter"], "head": config["head"]}


def backbone_of(
    trained: AdapterCheckpoint, *, weights: str | None = None, pretrained: bool | None = None
) -> tuple[ResidualBackbone, BackboneFingerprint]:
    """The backbone that the weights were trained on.

    Args:
        weights: their file, where it has moved.
        pretrained: whether to fetch timm's in place of the run's own.

    Raises:
        UserError: its weights cannot be had, or are others than the run's.
    """
    own = replace(trained.config.backbone, compile=False)  # which pays over many steps
    if weights is not None:
        own = replace(own, weights=weights, pretrained=bool(pretrained))
    elif pretrained is not None:
        own = replace(own, pretrained=pretrained, weights=None if pretrained else own.weights)
    backbone, identity = build_backbone(own)
    require_same_backbone(trained, identity)
    return backbone, identity


def require_same_backbone(trained: AdapterCheckpoint, identity: BackboneFingerprint) -> None:
    """Raises UserError unless this is the backbone that the weights were trained on."""
    check_metadata({METADATA_KEY: trained.about}, trained.path, {**trained.about, "backbone": vars(identity)})


def build_trained(trained: AdapterCheckpoint, backbone: ResidualBackbone, identity: BackboneFingerprint) -> DenseModel:
    """The trained model on its backbone, in eval mode. Methods that leave a backbone as it is can share one.

    Raises:
        UserError: weights are missing, too many, or of other sizes.
    """
    model = build_from_backbone(trained.config, backbone, identity, len(trained.about["classes"]))
    load_trained(model, trained)
    return model.eval()


def load_trained(model: DenseModel, trained: AdapterCheckpoint) -> None:
    """Put the weights into a model, in its own precision.

    Raises:
        UserError: weights are missing, too many, or of other sizes.
    """
    check_state_dict(trained.state, model, trained.path)
    model.load_state_dict(trained.state, strict=False)


def outlined(trained: AdapterCheckpoint) -> DenseModel:
    """The trained model as shapes only.

    Raises:
        UserError: its configuration, which may come from anywhere, is of no model that can be built.
    """
    try:
        return build_meta_model(trained.config, num_classes=len(trained.about["classes"]))
    except Exception as error:  # what timm, torch and torchvision raise of values that make no sense
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{trained.path}: its configuration is of no model that can be built ({reason})") from None
