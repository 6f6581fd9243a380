"""Print the table of docs/methods.md: trainable backbone parameters of every tuning method, beside the published ones.

    python scripts/count_parameters.py

Every method is built as `conf/` has it, on the meta device: no weights, no memory, some seconds.
"""

from __future__ import annotations

import torch

from e3va_cli.config.composition import load_config
from e3va_cli.models.adapters import METHODS, tune
from e3va_cli.models.backbones.swin import build_swin
from e3va_cli.paper.published import COCO, VOC, PublishedSetting

ORDER = [*COCO.methods, *(method for method in METHODS if method not in COCO.methods)]


def trainable(method: str, backbone: str) -> int:
    """Trainable parameters of `backbone` under `method`, output norms included."""
    config = load_config("train", [f"adapter={method}", f"backbone={backbone}"])
    with torch.device("meta"):
        extractor = tune(build_swin(config.backbone.timm_name), config.adapter)
    return sum(p.numel() for p in extractor.parameters() if p.requires_grad)


def published(setting: PublishedSetting, method: str) -> str:
    """In millions, as the table has it; Mona is not in it."""
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
