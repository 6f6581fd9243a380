"""Partial-1: train the last block of the backbone."""

from __future__ import annotations

from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FeatureExtractor
from e3va_cli.models.backbones.base import ResidualBackbone


@METHODS.register("partial_1", AdapterOptions)
class Partial1(FeatureExtractor):
    """Partial-1 trains the last block of the last stage; the backward pass ends there.

    Paper: J. Yosinski et al., "How transferable are features in deep neural networks?", arXiv 1411.1792
    (NeurIPS 2014); the name is that of M. Jia et al., "Visual Prompt Tuning", arXiv 2203.12119 (ECCV 2022).

        trained = parameters(block_L of stage 4)

    Args:
        backbone: any residual backbone; the other blocks are frozen.
    """

    def __init__(self, backbone: ResidualBackbone, options: AdapterOptions | None = None) -> None:
        super().__init__(backbone, options)
        backbone.requires_grad_(False)
        backbone.stages[-1].branches[-1].block.requires_grad_(True)
