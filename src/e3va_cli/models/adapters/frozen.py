"""A frozen backbone: train only output norms and head."""

from __future__ import annotations

from e3va_cli.models.adapters.base import METHODS, AdapterOptions, FrozenBackbone


@METHODS.register("frozen", AdapterOptions)
class Frozen(FrozenBackbone):
    """The frozen pre-trained backbone in eval mode: the cheapest baseline.

    Paper: C. Vasconcelos, V. Birodkar, V. Dumoulin, "Proper Reuse of Image Classification Features Improves Object
    Detection", arXiv 2204.00484 (CVPR 2022).

        F_s = LayerNorm_s(x_s)     x_s: the backbone's own stream at the end of stage s, without gradients

    Args:
        backbone: any residual backbone; it is frozen and put into eval mode.
    """

    shares_backbone = True
