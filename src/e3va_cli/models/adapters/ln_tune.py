"""LN-tune: train the norms of the backbone."""

from __future__ import annotations

from torch import nn

from e3va_cli.errors import UserError
from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FeatureExtractor
from e3va_cli.models.backbones.base import ResidualBackbone


@METHODS.register("ln_tune", AdapterOptions)
class LNTune(FeatureExtractor):
    """LN-tune trains weight and bias of every LayerNorm: in blocks, patch embedding and patch merging.

    Paper: A. Giannou, S. Rajput, D. Papailiopoulos, "The Expressive Power of Tuning Only the Normalization Layers",
    arXiv 2302.07937 (COLT 2023).

        y = (x - mean) / std * g + b     g and b trained

    Args:
        backbone: any residual backbone; all but its norms is frozen.
    """

    def __init__(self, backbone: ResidualBackbone, options: AdapterOptions | None = None) -> None:
        super().__init__(backbone, options)
        backbone.requires_grad_(False)
        for module in backbone.modules():
            if isinstance(module, nn.LayerNorm):
                module.requires_grad_(True)
        if not any(parameter.requires_grad for parameter in backbone.parameters()):
            raise UserError("adapter=ln_tune: this backbone has no LayerNorm; use adapter=bitfit")
