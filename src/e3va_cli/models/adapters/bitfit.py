"""BitFit: the biases of the backbone are trained."""

from __future__ import annotations

from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FeatureExtractor
from e3va_cli.models.backbones.base import ResidualBackbone


@METHODS.register("bitfit", AdapterOptions)
class BitFit(FeatureExtractor):
    """BitFit trains the bias terms, those of position included.

    Paper: E. Ben Zaken, S. Ravfogel, Y. Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
    Masked Language-models", arXiv 2106.10199 (ACL 2022).

        y = W x + b     W frozen, b trained

    A parameter is a bias if its name says so, which takes in Swin's tables of relative position bias; without them
    the published 0.20 M on Swin-B would be 0.14 M.

    Args:
        backbone: any residual backbone; all but its biases are frozen.
    """

    def __init__(self, backbone: ResidualBackbone, options: AdapterOptions | None = None) -> None:
        super().__init__(backbone, options)
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_("bias" in name)
