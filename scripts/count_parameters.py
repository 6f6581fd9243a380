"""Print the table of docs/methods.md: trainable backbone parameters of every tuning method, beside the published ones.

    python scripts/count_parameters.py

Every method is built as `conf/` has it, on the meta device: no weights, no memory, some seconds.
"""

from __future__ import annotations

import torch
from hydra import compose, initialize_config_module

from e3va_cli.adapters import tune
from e3va_cli.backbones.swin import build_swin
from e3va_cli.composition import CONFIG_MODULE, plain
from e3va_cli.config import register_schemas

# In millions, on COCO and on VOC and ADE20K; from the tables in V-PETL Bench, which do not have Mona.
PUBLISHED = {
    "full": ("86.75", "198.58"),
    "frozen": ("0", "0"),
    "bitfit": ("0.20", "0.30"),
    "ln_tune": ("0.06", "0.09"),
    "partial_1": ("12.60", "28.34"),
    "adapter": ("3.11", "4.66"),
    "lora": ("3.03", "4.57"),
    "adaptformer": ("3.11", "4.66"),
    "lorand": ("1.20", "1.31"),
    "mona": ("-", "-"),
    "e3va": ("1.20", "1.79"),
}


def trainable(method: str, backbone: str) -> int:
    """Trainable parameters of `backbone` under `method`, output norms included."""
    config = plain(compose("train", overrides=[f"adapter={method}", f"backbone={backbone}"]))
    with torch.device("meta"):
        extractor = tune(build_swin(config["backbone"]["timm_name"]), **config["adapter"])
    return sum(p.numel() for p in extractor.parameters() if p.requires_grad)


def main() -> None:
    """Print the table."""
    register_schemas()
    print("| method | Swin-B | published, M | Swin-L | published, M |")
    print("|---|--:|--:|--:|--:|")
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        for method, (base, large) in PUBLISHED.items():
            ours = [f"{trainable(method, backbone):,}" for backbone in ("swin_b", "swin_l")]
            print(f"| `{method}` | {ours[0]} | {base} | {ours[1]} | {large} |")


if __name__ == "__main__":
    main()
