"""Checks that the parts of a configuration go together, before anything is read."""

from __future__ import annotations

from e3va_cli.config.run_config import RunConfig
from e3va_cli.data import DATASET_FORMATS
from e3va_cli.errors import UserError
from e3va_cli.models.backbones import build_meta_backbone
from e3va_cli.models.heads import HEADS
from e3va_cli.models.model import check_frozen, check_neck


def check_compatibility(config: RunConfig) -> None:
    """Check, before anything is read, that method, backbone, head and data set go together.

    Raises:
        UserError: the backbone is in 16 bits or compiled under a method that sends gradients through it, or the data
            set cannot have what the head is trained on, or the backbone has no use for the neck; names what goes
            together.
    """
    check_frozen(config)
    if config.neck == "simple_pyramid":
        check_neck(config, build_meta_backbone(config.backbone)[0])
    check_targets(config, config.dataset.target_types)


def check_targets(config: RunConfig, offers: frozenset[str]) -> None:
    """Check that what a data set `offers` is what the configured head is trained on; as `check_compatibility`."""
    name, needs = config.head.name, HEADS[config.head.name].target_types
    if needs <= offers:
        return
    dataset = config.dataset.name
    heads = [head for head, kind in HEADS.items() if kind.target_types <= offers]
    sets = [source for source, kind in DATASET_FORMATS.items() if needs <= kind.target_types]
    missing = ", ".join("label maps" if what == "semantic" else what for what in sorted(needs - offers))
    advice = f"for this data: head={' or '.join(heads)}"
    if dataset not in sets:  # it is not these files alone
        advice += f"; for this head: dataset={' or '.join(sets)}"
    raise UserError(f"head={name} is trained on {missing}, which this data (dataset={dataset}) has none of; {advice}")
