"""A backbone by its configuration: architecture, then weights, then identity."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from e3va_cli.backbones.residual import ResidualBackbone
from e3va_cli.backbones.swin import SwinBackbone, build_swin
from e3va_cli.backbones.weights import fingerprint, load_weights
from e3va_cli.config.backbones import architecture_faults
from e3va_cli.errors import UserError, first_line

# What timm and torch raise of a name that they do not know, or of options that make no sense.
NOT_BUILT = (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
    *,
    name: str,
    timm_name: str,
    model_args: dict[str, Any],
    pretrained: bool,
    weights: str | None,
    seed: int,
    drop_path_rate: float = 0.1,
    dtype: str = "float32",
    compile: bool = False,
    pad_before_shift: bool = True,
) -> tuple[ResidualBackbone, BackboneIdentity]:
    """Build a backbone with its weights: timm's from the hub, a local file's, or random ones drawn from `seed`.

    `drop_path_rate` rises from 0 at the first block to itself at the last; it drops in training mode only.
    Its weight matrices are kept in `dtype`, its branches compiled if `compile`; its identity is that of the weights
    before.

    Raises:
        UserError: both kinds of weights asked for, the hub not reached, a file that does not fit, options that are of
            more than an architecture, or of none.
    """
    _require_architecture(timm_name, model_args)
    if pretrained and weights:
        raise UserError("backbone.pretrained=true and backbone.weights= exclude each other: give one of them")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        args = {"drop_path_rate": drop_path_rate, **model_args}
        backbone = _swin(timm_name, args, pretrained=pretrained, pad_before_shift=pad_before_shift)
    if weights:
        load_weights(backbone.model, Path(weights))
    source: Literal["pretrained", "file", "random"] = "pretrained" if pretrained else "file" if weights else "random"
    identity = BackboneIdentity(name, timm_name, source, fingerprint(backbone.model))
    if dtype != "float32":
        backbone.keep_in(DTYPES[dtype])
    backbone.compiled = compile
    return backbone, identity


def outline_backbone(
    *,
    name: str,
    timm_name: str,
    model_args: dict[str, Any],
    drop_path_rate: float = 0.1,
    dtype: str = "float32",
    pad_before_shift: bool = True,
    **others: Any,
) -> tuple[ResidualBackbone, BackboneIdentity]:
    """The same backbone as shapes only, on the meta device: in no time, nothing compiled, no weights looked at."""
    _require_architecture(timm_name, model_args)
    with torch.device("meta"):
        args = {"drop_path_rate": drop_path_rate, **model_args}
        backbone = _swin(timm_name, args, pad_before_shift=pad_before_shift)
    if dtype != "float32":
        backbone.keep_in(DTYPES[dtype])
    return backbone, BackboneIdentity(name, timm_name, "random", fingerprint="")


def _swin(
    timm_name: str, model_args: dict[str, Any], *, pad_before_shift: bool, pretrained: bool = False
) -> SwinBackbone:
    try:
        return build_swin(timm_name, pretrained=pretrained, pad_before_shift=pad_before_shift, **model_args)
    except NOT_BUILT as error:
        if pretrained and isinstance(error, OSError | RuntimeError):
            raise UserError(
                f"backbone.pretrained=true: the weights of {timm_name} could not be fetched "
                f"({type(error).__name__}); download them on a machine with a network, for example with "
                f"`hf download timm/{timm_name} model.safetensors`, and give backbone.weights=FILE"
            ) from error
        raise UserError(
            f"backbone: no Swin of timm can be built of timm_name={timm_name} and model_args={model_args} "
            f"({first_line(error)})"
        ) from error


def _require_architecture(timm_name: str, model_args: dict[str, Any]) -> None:
    if faults := [f"backbone.{fault}" for fault in architecture_faults(timm_name, model_args)]:
        raise UserError(*faults)
