"""E3VA: fine-tune large frozen vision backbones for detection and segmentation with little memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e3va_cli.api import evaluate, predict, train
    from e3va_cli.inference.prediction import Detection, ImagePrediction
    from e3va_cli.inference.predictor import MultiPredictor, Predictor, load_adapter, load_adapters

__all__ = [
    "Detection",
    "ImagePrediction",
    "MultiPredictor",
    "Predictor",
    "evaluate",
    "load_adapter",
    "load_adapters",
    "predict",
    "train",
]
WHERE = {"api": ("evaluate", "predict", "train"), "inference.prediction": ("Detection", "ImagePrediction")}


def __getattr__(name: str) -> Any:
    """Import what `__all__` names at its first use: it needs torch, which not every use of the package does."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = next((module for module, names in WHERE.items() if name in names), "inference.predictor")
    return getattr(import_module(f"e3va_cli.{module}"), name)
