"""Print plans of steps whose memory others have published, beside what they measured, and what their code adds.

    python benchmarks/published_memory.py [--rows mona,mmdetection,mmsegmentation] [--output FILE.json] [KEY=VALUE ...]

Published are the allocator's peaks (`torch.cuda.max_memory_allocated`) in the training logs of Mona's authors
(https://github.com/Leiyi-Hu/mona, `Swin-Transformer-Object-Detection/log`) and in the model zoos of mmdetection 2.x and
mmsegmentation (`configs/swin/metafile.yml`). The last plan is of a step as their code runs it:

- heads keep all activations for one backward pass, where ours give back each part's before the next;
- gradients are set to zero, not dropped, so that they live through the forward pass (`zero_grad` before torch 2.0);
- DistributedDataParallel holds its buckets, as large as the gradients;
- Apex, which Mona's detection logs name, runs GELU in float32.

Neither a GPU nor weights nor data are needed.
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

from e3va_cli.commands.benchmark_memory import COMMAND, of_method
from e3va_cli.config.composition import CONFIG_MODULE, validate_overrides
from e3va_cli.config.run_config import BenchmarkMemoryConfig
from e3va_cli.errors import UserError
from e3va_cli.memory import cuda_autocast as autocast
from e3va_cli.memory.benchmark import benchmark_spec
from e3va_cli.memory.estimate import plan
from e3va_cli.models.heads.eager_backward import one_backward_pass
from e3va_cli.utils.environment import MIB

COLUMNS = ("published MiB", "planned", "gap", "planned as their code", "gap")
VOC = ("experiment=voc_retinanet_swin_l", "data.batch_size=1", "trainer.precision=16-mixed")
ADE20K = ("experiment=ade20k_upernet_swin_l", "data.batch_size=2", "trainer.precision=32")
COCO = ("dataset=coco", "head=mask_rcnn", "backbone.drop_path_rate=0.2", "data.batch_size=2")
# A crop may turn a lying image upright, so that a batch holds both and is padded to their longer sides.
CROPPED = (*COCO, "image_size=[1333,1333]")


@dataclass(frozen=True)
class Published:
    """A step whose peak somebody published.

    Attributes:
        source: of `--rows`.
        title: for people.
        peak_mib: of the allocator.
        method: `adapter=` of ours.
        words: the step, as options of `e3va benchmark-memory`.
        apex: whether mixed precision was Apex's.
    """

    source: str
    title: str
    peak_mib: float
    method: str
    words: tuple[str, ...]
    apex: bool = False


def gib(number: float) -> float:
    """MiB of so many GiB, as the model zoos print them."""
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
DATASET_FORMATS = tuple(dict.fromkeys(row.source for row in ROWS))


def parser() -> argparse.ArgumentParser:
    """The words of the command line."""
    parser = common.parser(__doc__)
    parser.add_argument("--rows", default=",".join(DATASET_FORMATS), help="whose figures")
    return parser


def configured(row: Published, words: Sequence[str]) -> BenchmarkMemoryConfig:
    """The configuration of a row's step, for a plan of a GPU."""
    with initialize_config_module(CONFIG_MODULE, version_base="1.3"):
        return of_method([*row.words, *words, "measure=false"], row.method)


def planned_mib(row: Published, words: Sequence[str], *, as_theirs: bool) -> float:
    """The plan of a row's step: of this package, or with what the publisher's code adds."""
    config = configured(row, words)
    setting = benchmark_spec(config)
    with ExitStack() as theirs:
        if as_theirs:
            theirs.enter_context(one_backward_pass())
            if row.apex:
                theirs.enter_context(mock.patch.object(autocast, "FLOAT32", autocast.FLOAT32 | {"gelu"}))
        size = dataclasses.replace(setting.size, accumulates=as_theirs)
        found = plan(config, size, num_classes=setting.num_classes)
    buckets = 4 * found.parameters["trainable_params"] if as_theirs else 0
    return (found.peak.total_bytes + buckets) / MIB


def cells(published: float, *plans: float) -> list[str]:
    """A row of figures, under `COLUMNS`."""
    of_plans = ([f"{one:,.0f}", f"{one / published - 1:+.1%}"] for one in plans)
    return [f"{published:,.0f}", *(cell for pair in of_plans for cell in pair)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    given = parser().parse_intermixed_args(arguments)
    asked = given.rows.split(",")
    if unknown := [source for source in asked if source not in DATASET_FORMATS]:
        raise UserError(f"--rows {given.rows}: nothing of {', '.join(unknown)}; choices: {', '.join(DATASET_FORMATS)}")
    validate_overrides(COMMAND, given.words)
    rows, figures = [], []
    for row in (row for row in ROWS if row.source in asked):
        plans = [planned_mib(row, given.words, as_theirs=as_theirs) for as_theirs in (False, True)]
        rows.append([row.source, row.title, *cells(row.peak_mib, *plans)])
        figures.append({**dataclasses.asdict(row), "planned_mib": plans[0], "planned_as_theirs_mib": plans[1]})
    common.show(["source", "step", *COLUMNS], rows, names=2)
    common.write(given.output, "cpu", {"source": "planned", "rows": figures})
    return 0


if __name__ == "__main__":
    sys.exit(common.exit_code(main))
