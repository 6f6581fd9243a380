"""A tuning method, a backbone family, a head and a data format from outside the package: a class and a YAML each."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hydra.core.config_store import ConfigStore
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList

import e3va_cli
from e3va_cli.components.options import option
from e3va_cli.config.run_config import REGISTRIES
from e3va_cli.data import DATASET_FORMATS, DatasetFormat, Split
from e3va_cli.data.formats.shapes import CLASSES, Shapes
from e3va_cli.data.transforms import DetectionTransforms
from e3va_cli.errors import UserError
from e3va_cli.models.adapters import METHODS, AdapterOptions, FrozenBackbone
from e3va_cli.models.backbones import BACKBONES, BackboneOptions, Branch, ResidualBackbone, Stage
from e3va_cli.models.heads import HEADS, Detections, Extract, Head, HeadOptions
from tests.conftest import QUICK

YAML = {
    "adapter": {"defaults": ["gain_schema"], "name": "gain", "start": 1.0},
    "backbone": {"defaults": ["ladder_schema"], "name": "ladder", "family": "ladder", "timm_name": "none", "width": 8},
    "head": {"defaults": ["center_schema"], "name": "center", "width": 16},
}
DATASET = {
    "defaults": ["dots_schema@dataset", {"override /head": "center"}, {"override /schedule": "cosine"}],
    "dataset": {"name": "dots", "images": 6, "metric": "coco", "train_short_sides": [64], "val_short_side": 64}
    | {"max_size": 64, "flip": 0.0},
}


@dataclass
class GainOptions(AdapterOptions):
    """Options of the method."""

    start: float = option(help="of the gain of each channel", gt=0)


class Gain(FrozenBackbone):
    """The frozen features, each channel times a trained number."""

    def __init__(self, backbone: ResidualBackbone, options: GainOptions) -> None:
        super().__init__(backbone, options)
        self.gains = nn.ParameterList(nn.Parameter(torch.full((w,), options.start)) for w in backbone.out_channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            streams = self.backbone(images)
        return [self.output(stage, streams[stage] * self.gains[stage]) for stage in self.out_indices]


@dataclass
class LadderOptions(BackboneOptions):
    """Options of the family."""

    width: int = option(help="of every stage", gt=0)


class Ladder(ResidualBackbone):
    """Four stages of one linear branch each."""

    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed": nn.Linear(3, width), "rungs": nn.ModuleList()})
        self.model["rungs"].extend(nn.Linear(width, width) for _ in range(4))
        self.width = width

    def stem(self, images: Tensor) -> Tensor:
        x: Tensor = self.model["embed"](nn.functional.avg_pool2d(images, 4).permute(0, 2, 3, 1))
        return x

    @property
    def stages(self) -> list[Stage]:
        def halve(x: Tensor) -> Tensor:
            return x[:, ::2, ::2]

        return [
            Stage(
                self.width,
                4 << index,
                halve if index else nn.Identity(),
                (Branch("mlp", rung, rung, nn.Identity()),),
            )
            for index, rung in enumerate(self.model["rungs"])
        ]


@dataclass
class CenterOptions(HeadOptions):
    """Options of the head."""

    width: int = option(help="of its hidden layer", gt=0)


class Center(Head):
    """One box of 16 pixels in every image, about the mean of its objects' centers."""

    target_types = frozenset({"boxes"})

    def __init__(self, options: CenterOptions, *, channels: Sequence[int], num_classes: int) -> None:
        super().__init__(options, channels=channels, num_classes=num_classes)
        self.neck = nn.Sequential(nn.Linear(sum(channels), options.width), nn.GELU())
        self.center = nn.Linear(options.width, 2)

    def centers(self, features: list[Tensor]) -> Tensor:
        return self.center(self.neck(torch.cat([feature.mean((2, 3)) for feature in features], 1)))

    def losses(self, features: list[Tensor], images: ImageList, targets: list[Any]) -> dict[str, Tensor]:
        wanted = torch.stack([target["boxes"].mean(0).view(2, 2).mean(0) for target in targets])
        return {"center": (self.centers(features) - wanted / 64).square().mean()}

    def predict(self, extract: Extract, images: ImageList) -> list[Detections]:
        centers = 64 * self.centers(extract(images.tensors)).sigmoid()
        return [
            Detections(torch.cat([center - 8, center + 8])[None], torch.ones(1), torch.tensor([1]), None, size)
            for center, size in zip(centers, images.image_sizes, strict=True)
        ]


@dataclass
class Dots(DetectionTransforms, DatasetFormat):
    """Generated images under another name."""

    target_types: ClassVar[frozenset[str]] = frozenset({"boxes"})
    usual_classes: ClassVar[int] = len(CLASSES)

    images: int = option(help="of each split", gt=0)

    def open(
        self, split: Split, transforms: Callable[..., Any] | None = None, *, targets: Collection[str] = target_types
    ) -> Any:
        return Shapes(split, images=self.images, size=64, seed=0, transforms=transforms)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All four known, for one test."""
    for registry in REGISTRIES.values():
        for names in ("_components", "_options"):
            monkeypatch.setattr(registry, names, dict(getattr(registry, names)))
    store = ConfigStore.instance()
    METHODS.register("gain", GainOptions)(Gain)
    BACKBONES.register("ladder", LadderOptions)(lambda options, pretrained: Ladder(options.width))
    HEADS.register("center", CenterOptions)(Center)
    DATASET_FORMATS.register("dots")(Dots)
    for group, node in YAML.items():
        store.store(name=node["name"], node=node, group=group)
    store.store(name="dots", node=DATASET, group="dataset", package="_global_")
    yield
    for group, name in (("adapter", "gain"), ("backbone", "ladder"), ("head", "center"), ("dataset", "dots")):
        del store.repo[group][f"{name}.yaml"], store.repo[group][f"{name}_schema.yaml"]


def test_they_train_save_resume_and_evaluate(tmp_path: Path) -> None:
    chosen = ["adapter=gain", "backbone=ladder", "dataset=dots", "adapter.start=0.5", "head.width=8"]
    quick = [word for word in QUICK if not word.startswith("dataset.")]
    results = e3va_cli.train(*chosen, *quick, folder=tmp_path / "run")
    assert results is not None and 0 <= results["box"]["AP"] <= 1
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == results
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["e3va"]
    assert saved["adapter"] == {"name": "gain", "start": 0.5} and saved["backbone"]["name"] == "ladder"
    e3va_cli.train("trainer.max_epochs=2", resume=tmp_path / "run")
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt")["epoch"] == 1
    again = e3va_cli.evaluate(tmp_path / "run", folder=tmp_path / "evaluation")
    assert again == json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_their_options_are_checked() -> None:
    with pytest.raises(UserError) as refused:
        e3va_cli.train("adapter=gain", "adapter.start=-1", "backbone=ladder", "backbone.width=0")
    assert [line.partition(":")[0] for line in refused.value.messages] == ["backbone.width=0", "adapter.start=-1.0"]
