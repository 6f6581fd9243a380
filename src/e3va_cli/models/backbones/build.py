"""A backbone by its configuration: architecture, then weights, then identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from e3va_cli.components.options import require_valid
from e3va_cli.errors import UserError, first_line
from e3va_cli.models.backbones import convnext, swin  # noqa: F401 (register their families)
from e3va_cli.models.backbones.base import BACKBONES, DTYPES, BackboneOptions, ResidualBackbone
from e3va_cli.models.backbones.weights import fingerprint, load_weights

# What timm and torch raise of a name that they do not know, or of options that make no sense.
NOT_BUILT = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class BackboneFingerprint:
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


def build_backbone(options: BackboneOptions) -> tuple[ResidualBackbone, BackboneFingerprint]:
    """Build a backbone with its weights: timm's from the hub, a local file's, or random ones drawn from a seed.

    Its weight matrices are kept in `dtype`, its branches compiled if `compile`; its identity is that of the weights
    before.

    Raises:
        UserError: the hub is not reached, a file does not fit, or options are of more than an architecture, or of none.
    """
    require_valid(options, "backbone")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        backbone = _build(options, pretrained=options.pretrained)
    if options.weights:
        load_weights(backbone.model, Path(options.weights))
    source: Literal["pretrained", "file", "random"] = (
        "pretrained" if options.pretrained else "file" if options.weights else "random"
    )
    identity = BackboneFingerprint(options.name, options.timm_name, source, fingerprint(backbone.model))
    if options.dtype != "float32":
        backbone.cast_weights(DTYPES[options.dtype])
    backbone.compiled = options.compile
    return backbone, identity


def build_meta_backbone(options: BackboneOptions) -> tuple[ResidualBackbone, BackboneFingerprint]:
    """Build the same backbone as shapes only, on the meta device: in no time, not compiled, no weights looked at."""
    require_valid(options, "backbone")
    with torch.device("meta"):
        backbone = _build(options, pretrained=False)
    if options.dtype != "float32":
        backbone.cast_weights(DTYPES[options.dtype])
    return backbone, BackboneFingerprint(options.name, options.timm_name, "random", fingerprint="")


def _build(options: BackboneOptions, *, pretrained: bool) -> ResidualBackbone:
    try:
        return BACKBONES[options.family](options, pretrained)
    except NOT_BUILT as error:
        if pretrained and isinstance(error, OSError | RuntimeError):
            raise UserError(
                f"backbone.pretrained=true: the weights of {options.timm_name} could not be fetched "
                f"({type(error).__name__}); download them on a machine with a network, for example with "
                f"`hf download timm/{options.timm_name} model.safetensors`, and give backbone.weights=FILE"
            ) from error
        raise UserError(
            f"backbone: no {options.family.capitalize()} of timm can be built of timm_name={options.timm_name} and "
            f"model_args={options.model_args} ({first_line(error)})"
        ) from error
