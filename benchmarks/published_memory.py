"""Compare estimates with published memory of other code bases, without and with what their code adds.

    python benchmarks/published_memory.py [--rows mona,mmdetection,mmsegmentation] [--output FILE.json] [KEY=VALUE ...]

Published values are the allocator's peaks (`torch.cuda.max_memory_allocated`) in the training logs of Mona's authors
(https://github.com/Leiyi-Hu/mona, `Swin-Transformer-Object-Detection/log`) and in the model zoos of mmdetection 2.x and
mmsegmentation (`configs/swin/metafile.yml`). The second estimate is of a step as their code runs it:

- heads keep all activations for one backward pass; ours run the backward pass of each loss right away;
- gradients are set to zero, not to None, so they exist in the forward pass (`zero_grad` before torch 2.0);
- DistributedDataParallel has buckets, as large as the gradients;
- Apex (Mona's detection logs) runs GELU in float32.

No GPU, weights or data are needed.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from unittest import mock

import common
from hydra import initialize_config_module

from e3va_cli.commands.benchmark_memory import COMMAND, load_method_config
from e3va_cli.config.composition import CONFIG_MODULE, validate_overrides
from e3va_cli.config.run_config import BenchmarkMemoryConfig
from e3va_cli.errors import UserError
from e3va_cli.memory import cuda_autocast as autocast
from e3va_cli.memory.benchmark import benchmark_spec
from e3va_cli.memory.estimate import estimate_memory
from e3va_cli.models.heads.eager_backward import one_backward_pass
from e3va_cli.utils.environment import MIB

COLUMNS = ("published MiB", "estimated", "gap", "estimated as their code", "gap")
VOC = ("experiment=voc_retinanet_swin_l", "data.batch_size=1", "trainer.precision=16-mixed")
ADE20K = ("experiment=ade20k_upernet_swin_l", "data.batch_size=2", "trainer.precision=32")
COCO = ("dataset=coco", "head=mask_rcnn", "backbone.drop_path_rate=0.2", "data.batch_size=2")
# Crops may be portrait or landscape, so a batch is padded to the longer sides of both.
CROPPED = (*COCO, "image_size=[1333,1333]")


@dataclass(frozen=True)
class Published:
    """A step with a published peak.

    Attributes:
        source: code base, of `--rows`.
        title: printed name.
        peak_mib: of the allocator.
        method: our `adapter=`.
        overrides: of `e3va benchmark-memory`.
        apex: whether it used Apex for mixed precision.
    """

    source: str
    title: str
    peak_mib: float
    method: str
    overrides: tuple[str, ...]
    apex: bool = False


def gib(number: float) -> float:
    """Return the MiB of a number of GiB."""
    return number * 1024


ROWS = (
    Published("mona", "VOC, RetinaNet, Swin-L, 16-mixed, batch 1: Adapter", 4627, "adapter", VOC, apex=True),
    Published("mona", "the same: AdaptFormer", 4253, "adaptformer", VOC, apex=True),
    Published("mona", "the same: LoRA", 4583, "lora", VOC, apex=True),
    Published("mona", "the same: Mona", 5922, "mona", VOC, apex=True),
    Published("mona", "ADE20K, UPerNet, Swin-L, float32, batch 2: full", 18446, "full", ADE20K),
    Published("mona", "the same: Mona", 17493, "mona", ADE20K),
    Published(
        "mmdetection", "COCO, Mask R-CNN, Swin-T, float32, batch 2", gib(7.6), "full", (*COCO, "backbone=swin_t")
    ),
    Published("mmdetection", "the same, with crops", gib(10.2), "full", (*CROPPED, "backbone=swin_t")),
    Published(
        "mmdetection",
        "the same, 16-mixed",
        gib(7.8),
        "full",
        (*CROPPED, "backbone=swin_t", "trainer.precision=16-mixed"),
    ),
    Published(
        "mmdetection",
        "the same, Swin-S, 16-mixed",
        gib(11.9),
        "full",
        (*CROPPED, "backbone=swin_s", "trainer.precision=16-mixed"),
    ),
    Published(
        "mmsegmentation", "ADE20K, UPerNet, Swin-T, float32, batch 2", gib(5.02), "full", (*ADE20K, "backbone=swin_t")
    ),
    Published("mmsegmentation", "the same, Swin-S", gib(6.17), "full", (*ADE20K, "backbone=swin_s")),
    Published("mmsegmentation", "the same, Swin-B", gib(7.61), "full", (*ADE20K, "backbone=swin_b")),
)
SOURCES = tuple(dict.fromkeys(row.source for row in ROWS))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", default=",".join(SOURCES), help="code bases")
    return parser


def configured(row: Published, overrides: Sequence[str]) -> BenchmarkMemoryConfig:
    """Return the configuration of a row's step."""
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return load_method_config([*row.overrides, *overrides, "measure=false"], row.method)


def estimated_mib(row: Published, overrides: Sequence[str], *, as_theirs: bool) -> float:
    """Return the estimated peak of a row's step, in our code or `as_theirs`."""
    config = configured(row, overrides)
    spec = benchmark_spec(config)
    with ExitStack() as theirs:
        if as_theirs:
            theirs.enter_context(one_backward_pass())
            if row.apex:
                theirs.enter_context(mock.patch.object(autocast, "FLOAT32", autocast.FLOAT32 | {"gelu"}))
        size = dataclasses.replace(spec.size, accumulates=as_theirs)
        estimate = estimate_memory(config, size, num_classes=spec.num_classes)
    buckets = 4 * estimate.parameters["trainable_params"] if as_theirs else 0
    return (estimate.peak.total_bytes + buckets) / MIB


def cells(published: float, *estimates: float) -> list[str]:
    """Return the cells of a row, for `COLUMNS`."""
    pairs = ([f"{one:,.0f}", f"{one / published - 1:+.1%}"] for one in estimates)
    return [f"{published:,.0f}", *(cell for pair in pairs for cell in pair)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = parser().parse_intermixed_args(arguments)
    selected = args.rows.split(",")
    if unknown := [source for source in selected if source not in SOURCES]:
        raise UserError(f"--rows {args.rows}: no source {', '.join(unknown)}; choices: {', '.join(SOURCES)}")
    validate_overrides(COMMAND, args.overrides)
    rows, values = [], []
    for row in (row for row in ROWS if row.source in selected):
        estimates = [estimated_mib(row, args.overrides, as_theirs=as_theirs) for as_theirs in (False, True)]
        rows.append([row.source, row.title, *cells(row.peak_mib, *estimates)])
        values.append({**dataclasses.asdict(row), "planned_mib": estimates[0], "planned_as_theirs_mib": estimates[1]})
    common.show(["source", "step", *COLUMNS], rows, names=2)
    common.write(args.output, "cpu", {"source": "planned", "rows": values})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
