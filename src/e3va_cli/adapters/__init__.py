"""Tuning methods: each one file, all behind the protocol of `method.py`."""

from e3va_cli.adapters import e3va
from e3va_cli.adapters.method import METHODS, FeatureExtractor, FrozenBackbone, tune

__all__ = ["METHODS", "FeatureExtractor", "FrozenBackbone", "e3va", "tune"]
