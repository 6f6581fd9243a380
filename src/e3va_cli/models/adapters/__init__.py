"""Tuning methods: one file each, behind the protocol of `base.py`."""

from e3va_cli.models.adapters import (
    adapter,
    adaptformer,
    bitfit,
    colin,
    e3va,
    e3va_plus,
    frozen,
    full,
    ln_tune,
    lora,
    lorand,
    mona,
    partial_1,
)
from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FeatureExtractor, FrozenBackbone

__all__ = [
    "METHODS",
    "AdapterOptions",
    "FeatureExtractor",
    "FrozenBackbone",
    "adapter",
    "adaptformer",
    "bitfit",
    "colin",
    "e3va",
    "e3va_plus",
    "frozen",
    "full",
    "ln_tune",
    "lora",
    "lorand",
    "mona",
    "partial_1",
]
