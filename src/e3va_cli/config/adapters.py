"""Options of tuning methods."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from e3va_cli.config.free import free


@dataclass
class AdapterConfig:
    """A tuning method; each has options of its own."""

    name: str = MISSING


@dataclass
class E3VAConfig(AdapterConfig):
    """Options of E3VA."""

    rank: int = MISSING
    hidden_ratio: float = MISSING
    init: str = free("zero")
    activations: str = free()
    compress_bits: int = free()


@dataclass
class BottleneckConfig(AdapterConfig):
    """Options of Adapter and Mona."""

    hidden: int = MISSING
    dropout: float = MISSING
    init_std: float | None = free(None)


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
