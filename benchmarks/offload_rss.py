"""Measure the memory of a process that takes training steps on a CPU with the backbone's weights in a file.

    python benchmarks/offload_rss.py [KEY=VALUE ...]        # by default DINOv3-H+ of random weights, Mask R-CNN, E3VA

Prints the size of the offloaded weights, and the largest resident memory (RSS) during the steps, which is reset after
the model was built. Linux only.
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from e3va_cli.config.composition import load_config
from e3va_cli.config.run_config import BenchmarkMemoryConfig
from e3va_cli.memory.benchmark import benchmark_spec
from e3va_cli.memory.step import random_batch, train_step
from e3va_cli.models.model import build_random_model
from e3va_cli.optim.optimizer import build_optimizer
from e3va_cli.utils.environment import MIB

OVERRIDES = (
    "backbone=dinov3_h",
    "backbone.offload=disk",
    "adapter=e3va",
    "dataset=coco",
    "head=mask_rcnn_nano",
    "image_size=[256,320]",
    "data.batch_size=1",
    "measure=false",
)
STEPS = 2


def resident_mib(name: str) -> float:
    """Return VmRSS (now) or VmHWM (the largest since the last reset) of this process in MiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) / 1024


def main(overrides: list[str]) -> None:
    """Build the model, reset the largest resident memory, take the steps, and print."""
    config: BenchmarkMemoryConfig = load_config("benchmark_memory", [*OVERRIDES, *overrides], complete=False)
    spec = benchmark_spec(config)
    print(f"Imports: {resident_mib('VmRSS'):,.0f} MiB resident")
    model = build_random_model(config, num_classes=spec.num_classes).train()
    streamer = model.extractor.backbone.streamer
    assert streamer is not None, "set backbone.offload"
    optimizer = build_optimizer(model, config.optimizer)
    batch = random_batch(spec.size, num_classes=spec.num_classes, target_types=model.head.target_types)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    print(f"Model with {model.extractor.backbone.num_params / 1e6:,.0f} M weights: {resident_mib('VmRSS'):,.0f} MiB")
    for _ in range(STEPS):
        train_step(model, optimizer, batch, spec.size)
    print(f"{STEPS} steps: at most {resident_mib('VmHWM'):,.0f} MiB resident")
    print(f"Offloaded weights: {streamer.offloaded_bytes / MIB:,.0f} MiB", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1:])
