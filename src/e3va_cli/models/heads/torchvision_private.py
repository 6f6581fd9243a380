"""Private classes of torchvision's detectors; `tests/models/heads/test_torchvision_private.py` tests what is used."""

from __future__ import annotations

from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder, Matcher

__all__ = ["BalancedPositiveNegativeSampler", "BoxCoder", "Matcher"]
