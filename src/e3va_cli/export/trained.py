"""What was trained, wherever it lies, and the model that it makes of its backbone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from e3va_cli.backbones import BackboneIdentity, ResidualBackbone, build_backbone
from e3va_cli.errors import UserError
from e3va_cli.model import DenseModel, assemble
from e3va_cli.run_folder import locate
from e3va_cli.training.checkpoints import ABOUT, read_checkpoint, verify

OF_TASK = "model."  # what Lightning puts before the names of the model's tensors


@dataclass(frozen=True)
class Trained:
    """Trained weights without their backbone.

    Attributes:
        path: the file or folder that they were read from.
        about: what they belong to: `backbone` (its identity), `adapter`, `head`, `classes`, `category_ids`, and the
            plain `config` of the run.
        state: the weights, by their names in a `DenseModel`.
    """

    path: Path
    about: dict[str, Any]
    state: dict[str, Tensor]


def read_trained(given: str, option: str) -> Trained:
    """What was trained, from a run folder (its last checkpoint) or a checkpoint in it.

    Raises:
        UserError: there is none, or it is damaged; names `option`.
    """
    _, path = locate(given, option)
    content = read_checkpoint(path)
    state = {name.removeprefix(OF_TASK): value for name, value in content["state_dict"].items()}
    return Trained(path, content[ABOUT], state)


def backbone_of(trained: Trained, **options: Any) -> tuple[ResidualBackbone, BackboneIdentity]:
    """The backbone that the weights were trained on.

    Args:
        options: in place of the run's own, such as `weights=FILE` where the file has moved.

    Raises:
        UserError: its weights cannot be had, or are others than the run's.
    """
    backbone, identity = build_backbone(**{**trained.about["config"]["backbone"], **options})
    require_same_backbone(trained, identity)
    return backbone, identity


def require_same_backbone(trained: Trained, identity: BackboneIdentity) -> None:
    """Raises UserError unless this is the backbone that the weights were trained on."""
    verify({ABOUT: trained.about}, trained.path, {**trained.about, "backbone": vars(identity)})


def build_trained(trained: Trained, backbone: ResidualBackbone, identity: BackboneIdentity) -> DenseModel:
    """The trained model on its backbone, in eval mode. Methods that leave a backbone as it is can share one.

    Raises:
        UserError: weights are missing, too many, or of other sizes.
    """
    about = trained.about
    model = assemble(about["config"], backbone, identity, len(about["classes"]))
    expected = {name: value.shape for name, value in model.state_dict().items() if name in trained.state}
    unknown = sorted(trained.state.keys() - expected.keys())
    missing = sorted(n for n, p in model.named_parameters() if p.requires_grad and n not in trained.state)
    other = sorted(name for name, shape in expected.items() if trained.state[name].shape != shape)
    for what, names in (("has unknown weights", unknown), ("lacks weights", missing), ("has other sizes of", other)):
        if names:
            raise UserError(f"{trained.path}: {what}: {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}")
    model.load_state_dict(trained.state, strict=False)
    return model.eval()
