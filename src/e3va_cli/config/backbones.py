"""Options of backbones."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

FIXED = frozenset(
    {"timm_name", "pretrained", "num_classes", "strict_img_size", "always_partition", "pad_before_shift"}
)  # not in model_args
WEIGHTLESS = frozenset(
    {"drop_path_rate", "drop_rate", "proj_drop_rate", "attn_drop_rate", "img_size"}
)  # change no weight: published ones fit
NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")  # of an architecture; timm takes others for places to fetch from


@dataclass
class BackboneConfig:
    """A frozen network and its weights."""

    name: str = MISSING
    timm_name: str = MISSING
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained: bool = False
    weights: str | None = None
    seed: int = 0
    drop_path_rate: float = 0.1  # of training through the backbone; a frozen one has none
    dtype: str = "float32"  # of the weight matrices, and of the products with them
    compile: bool = False  # by torch.compile, what is computed without gradients
    pad_before_shift: bool = True  # of maps that are no multiple of the window


def unpublished_args(model_args: Mapping[str, Any]) -> list[str]:
    """Return the options that make another network than the one that weights are published for."""
    return sorted(set(model_args) - WEIGHTLESS)


def architecture_faults(timm_name: str, model_args: Mapping[str, Any]) -> Iterator[str]:
    """What makes options more than those of an architecture: they come with checkpoints, and may name files to timm."""
    if not NAME.fullmatch(timm_name):
        yield f"timm_name={timm_name}: not the name of an architecture"
    for key, value in model_args.items():
        if key in FIXED:
            yield f"model_args.{key}: not to be chosen"
        numbers = value if isinstance(value, list | tuple) else [value]
        if not key.isidentifier() or not all(isinstance(number, int | float) for number in numbers):
            yield f"model_args.{key} is no number or list of numbers"
