"""Options of tuning methods."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass
class AdapterConfig:
    """A tuning method; each has options of its own."""

    name: str = MISSING


@dataclass
class E3VAConfig(AdapterConfig):
    """Options of E3VA."""

    rank: int = MISSING
    hidden_ratio: float = MISSING
    init: str = "zero"
    activations: str = MISSING
    compress_bits: int = MISSING


@dataclass
class BottleneckConfig(AdapterConfig):
    """Options of Adapter and Mona."""

    hidden: int = MISSING
    dropout: float = MISSING
    init_std: float | None = None


@dataclass
class AdaptFormerConfig(BottleneckConfig):
    """Options of AdaptFormer."""

    scale: float = MISSING


@dataclass
class LoRAConfig(AdapterConfig):
    """Options of LoRA."""

    rank: int = MISSING
    alpha: float = MISSING


@dataclass
class LoRandConfig(AdapterConfig):
    """Options of LoRand."""

    hidden_ratio: float = MISSING
    branches: int = MISSING
    rank: int = MISSING
