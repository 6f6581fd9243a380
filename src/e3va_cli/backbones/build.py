"""A backbone by its configuration: architecture, then weights, then identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from e3va_cli.backbones.residual import ResidualBackbone
from e3va_cli.backbones.swin import build_swin
from e3va_cli.backbones.weights import fingerprint, load_weights
from e3va_cli.errors import UserError


@dataclass(frozen=True)
class BackboneIdentity:
    """Which backbone an adapter belongs to: it works on no other.

    Attributes:
        name: `backbone=` of the configuration.
        timm_name: the architecture.
        weights: where the weights came from.
        fingerprint: SHA-256 of the weights as loaded, before any training.
    """

    name: str
    timm_name: str
    weights: Literal["pretrained", "file", "random"]
    fingerprint: str


def build_backbone(
    *, name: str, timm_name: str, model_args: dict[str, Any], pretrained: bool, weights: str | None, seed: int
) -> tuple[ResidualBackbone, BackboneIdentity]:
    """Build a backbone with its weights: timm's from the hub, a local file's, or random ones drawn from `seed`.

    Raises:
        UserError: both kinds of weights asked for, the hub not reached, or a file that does not fit.
    """
    if pretrained and weights:
        raise UserError("backbone.pretrained=true and backbone.weights= exclude each other: give one of them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            backbone = build_swin(timm_name, pretrained=pretrained, **model_args)
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise UserError(
                f"backbone.pretrained=true: the weights of {timm_name} could not be fetched "
                f"({type(error).__name__}); download them on a machine with a network, for example with "
                f"`hf download timm/{timm_name} model.safetensors`, and give backbone.weights=FILE"
            ) from error
    if weights:
        load_weights(backbone.model, Path(weights))
    source: Literal["pretrained", "file", "random"] = "pretrained" if pretrained else "file" if weights else "random"
    return backbone, BackboneIdentity(name, timm_name, source, fingerprint(backbone.model))


def outline_backbone(
    *, name: str, timm_name: str, model_args: dict[str, Any], **weights: Any
) -> tuple[ResidualBackbone, BackboneIdentity]:
    """The same backbone as shapes only, on the meta device: in no time, and with no weights looked at."""
    with torch.device("meta"):
        backbone = build_swin(timm_name, **model_args)
    return backbone, BackboneIdentity(name, timm_name, "random", fingerprint="")
