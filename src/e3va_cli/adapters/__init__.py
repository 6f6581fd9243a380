"""Tuning methods: each one file, all behind the protocol of `method.py`."""

from e3va_cli.adapters import (  # each import registers a method
    adapter,
    adaptformer,
    bitfit,
    e3va,
    frozen,
    full,
    ln_tune,
    lora,
    lorand,
    mona,
    partial_1,
)
from e3va_cli.adapters.method import METHODS, AdapterOptions, FeatureExtractor, FrozenBackbone, tune

__all__ = [
    "METHODS",
    "AdapterOptions",
    "FeatureExtractor",
    "FrozenBackbone",
    "adapter",
    "adaptformer",
    "bitfit",
    "e3va",
    "frozen",
    "full",
    "ln_tune",
    "lora",
    "lorand",
    "mona",
    "partial_1",
    "tune",
]
