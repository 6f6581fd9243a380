"""Print the table of docs/methods.md: trainable backbone parameters of every tuning method, and the published ones.

    python scripts/count_parameters.py

Every method is built with the options of `conf/`, on the meta device, in seconds.
"""

from __future__ import annotations

import torch

from e3va_cli.config.composition import load_config
from e3va_cli.models.adapters import METHODS
from e3va_cli.models.backbones.swin import build_swin
from e3va_cli.paper.published import COCO, VOC, PublishedSetting

ORDER = [*COCO.methods, *(method for method in METHODS if method not in COCO.methods)]


def trainable(method: str, backbone: str) -> int:
    """Return the trainable parameters of `backbone` with `method`, output norms included."""
    config = load_config("train", [f"adapter={method}", f"backbone={backbone}"])
    with torch.device("meta"):
        extractor = METHODS[method](build_swin(config.backbone.timm_name), config.adapter)
    return sum(p.numel() for p in extractor.parameters() if p.requires_grad)


def published(setting: PublishedSetting, method: str) -> str:
    """Return the published parameters in millions, as text."""
    return f"{setting.methods[method][0]:.2f}" if method in setting.methods else "-"


def main() -> None:
    """Print the table."""
    print("| method | Swin-B | published, M | Swin-L | published, M |")
    print("|---|--:|--:|--:|--:|")
    for method in ORDER:
        cells = [
            cell
            for backbone, setting in (("swin_b", COCO), ("swin_l", VOC))
            for cell in (f"{trainable(method, backbone):,}", published(setting, method))
        ]
        print(f"| `{method}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
