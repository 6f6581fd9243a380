"""BitFit: train the biases of the backbone."""

from __future__ import annotations

from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FeatureExtractor
from e3va_cli.models.backbones.base import ResidualBackbone


@METHODS.register("bitfit", AdapterOptions)
class BitFit(FeatureExtractor):
    """BitFit trains all bias terms, relative position biases included.

    Paper: E. Ben Zaken, S. Ravfogel, Y. Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
    Masked Language-models", arXiv 2106.10199 (ACL 2022).

        y = W x + b     W frozen, b trained

    Biases are the parameters with "bias" in their name, Swin's relative position bias tables included; without those
    the published 0.20 M on Swin-B would be 0.14 M.

    Args:
        backbone: any residual backbone; all but its biases is frozen.
    """

    def __init__(self, backbone: ResidualBackbone, options: AdapterOptions | None = None) -> None:
        super().__init__(backbone, options)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("bias" in name)
