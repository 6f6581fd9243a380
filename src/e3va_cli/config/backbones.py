"""Options of backbones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


@dataclass
class BackboneConfig:
    """A frozen network and its weights."""

    name: str = MISSING
    timm_name: str = MISSING
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None
    seed: int = 0
