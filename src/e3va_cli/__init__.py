"""E3VA: fine-tune large frozen vision backbones for detection and segmentation with little memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e3va_cli.export.prediction import Detection, ImagePrediction
    from e3va_cli.export.predictor import Predictor, Together, load_adapter, load_adapters

__all__ = ["Detection", "ImagePrediction", "Predictor", "Together", "load_adapter", "load_adapters"]


def __getattr__(name: str) -> Any:
    """Import what `__all__` names at its first use: it needs torch, which `e3va --help` must not wait for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from e3va_cli.export import prediction, predictor

    return getattr(predictor, name, None) or getattr(prediction, name)
