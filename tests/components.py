"""Build components from keyword options; options that are not given stay missing."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from e3va_cli.components.options import group_of, require_valid
from e3va_cli.config.run_config import kind_of
from e3va_cli.data import LoaderOptions
from e3va_cli.models import adapters, backbones, heads
from e3va_cli.optim import lr_schedules as schedules
from e3va_cli.optim import optimizer


def made_of(kind: type, options: dict[str, Any]) -> Any:
    """Return the dataclass of a dict of options, nested ones included."""
    groups = {one.name: group for one in fields(kind) if (group := group_of(one))}
    return kind(
        **{key: made_of(groups[key], v) if key in groups and isinstance(v, dict) else v for key, v in options.items()}
    )


def options_of(group: str, **options: Any) -> Any:
    """Return the options of a component, by its configuration group."""
    kind = kind_of(group, options)
    assert kind is not None, options
    return made_of(kind, options)


def tune(backbone: Any, name: str, **options: Any) -> Any:
    """Return `backbone` with the tuning method `name`."""
    config = options_of("adapter", name=name, **options)
    require_valid(config, "adapter")
    return adapters.METHODS[name](backbone, config)


def build_head(name: str, *, channels: Any, num_classes: int, **options: Any) -> Any:
    """Build the head `name`."""
    return heads.build_head(options_of("head", name=name, **options), channels=channels, num_classes=num_classes)


def build_backbone(**options: Any) -> Any:
    """Build a backbone and its fingerprint."""
    return backbones.build_backbone(options_of("backbone", **options))


def build_meta_backbone(**options: Any) -> Any:
    """The same as shapes only."""
    return backbones.build_meta_backbone(options_of("backbone", **options))


def build_optimizer(model: Any, **options: Any) -> Any:
    """AdamW of what is trainable."""
    return optimizer.build_optimizer(model, options_of("optimizer", **options))


def build_schedule(name: str, course: Any, **options: Any) -> Any:
    """The schedule called `name`."""
    return schedules.build_schedule(options_of("schedule", name=name, **options), course)


def loader_options(batch_size: int, val_batch_size: int, num_workers: int) -> LoaderOptions:
    """Options of loading batches."""
    return LoaderOptions(batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers)
