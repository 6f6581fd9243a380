"""Build a backbone from its options: architecture, weights, fingerprint."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from e3va_cli.components.options import require_valid
from e3va_cli.errors import UserError, first_line
from e3va_cli.models.backbones import convnext, hiera, swin, swinv2, vit  # noqa: F401 (register their families)
from e3va_cli.models.backbones.base import BACKBONES, DTYPES, BackboneOptions, ResidualBackbone
from e3va_cli.models.backbones.offload import cache_path, host_weights, map_weights
from e3va_cli.models.backbones.quantization import BITS
from e3va_cli.models.backbones.weights import fingerprint, load_weights, packaged_weights

# Raised by timm and torch for unknown names and invalid options.
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class BackboneFingerprint:
    """Identity of the backbone that an adapter was trained on, the only one that it works on.

    Attributes:
        name: `backbone=` in the configuration.
        timm_name: the architecture.
        weights: source of the weights.
        fingerprint: SHA-256 of the weights as loaded, before any training.
    """

    name: str
    timm_name: str
    weights: Literal["pretrained", "file", "random"]
    fingerprint: str


def build_backbone(options: BackboneOptions) -> tuple[ResidualBackbone, BackboneFingerprint]:
    """Build a backbone with its weights: timm's from the hub, a local file's, or random ones drawn from a seed.

    The fingerprint is that of the weights before they are cast, quantized or offloaded.

    Raises:
        UserError: the download fails, the file does not match the architecture, or an option is invalid.
    """
    require_valid(options, "backbone")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        backbone = _build(options, pretrained=options.downloads)
    if options.pretrained and options.packaged_weights:
        load_weights(backbone.model, packaged_weights(options.packaged_weights))
    if options.weights:
        load_weights(backbone.model, Path(options.weights), backbone.convert_weights)
    source: Literal["pretrained", "file", "random"] = (
        "pretrained" if options.pretrained else "file" if options.weights else "random"
    )
    identity = BackboneFingerprint(options.name, options.timm_name, source, fingerprint(backbone.model))
    store_weights(backbone, options, identity.fingerprint)
    backbone.compiled = options.compile
    return backbone, identity


def build_meta_backbone(options: BackboneOptions) -> tuple[ResidualBackbone, BackboneFingerprint]:
    """Build the backbone on the meta device, without reading weights or compiling."""
    require_valid(options, "backbone")
    with torch.device("meta"):
        backbone = _build(options, pretrained=False)
    store_weights(backbone, options, fingerprint="")
    return backbone, BackboneFingerprint(options.name, options.timm_name, "random", fingerprint="")


def store_weights(backbone: ResidualBackbone, options: BackboneOptions, fingerprint: str) -> None:
    """Cast, quantize and offload the weight matrices of a backbone as its options say.

    Raises:
        UserError: the file of offloaded weights cannot be written.
    """
    if options.dtype in BITS:
        backbone.quantize_weights(BITS[options.dtype])
    elif options.dtype != "float32":
        backbone.cast_weights(DTYPES[options.dtype])
    if options.offload == "cpu":
        backbone.offload_weights(host_weights)
    elif options.offload == "disk":
        backbone.offload_weights(partial(map_weights, path=cache_path(f"{fingerprint}-{options.dtype}")))


def _build(options: BackboneOptions, *, pretrained: bool) -> ResidualBackbone:
    try:
        return BACKBONES[options.family](options, pretrained)
    except BUILD_ERRORS as error:
        if pretrained and isinstance(error, OSError | RuntimeError):
            raise UserError(
                f"backbone.pretrained=true: could not download {options.timm_name} ({type(error).__name__}); "
                f"run `hf download timm/{options.timm_name} model.safetensors` on a machine with network access "
                "and set backbone.weights=FILE"
            ) from error
        raise UserError(
            f"backbone: cannot build timm_name={options.timm_name} with model_args={options.model_args} as a "
            f"backbone of family {options.family}: {first_line(error)}"
        ) from error
