"""Trained adapters ready for use on images, one or several on one backbone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from e3va_cli.data import build_transforms, collate
from e3va_cli.data.transforms import ShortestSide
from e3va_cli.errors import UserError
from e3va_cli.export.images import ImageLike, as_image
from e3va_cli.export.prediction import ImagePrediction, prediction_of
from e3va_cli.export.together import leaves_backbone, predict_together
from e3va_cli.export.trained import Trained, backbone_of, build_trained, read_trained, require_same_backbone
from e3va_cli.heads import Detections, Segmentation
from e3va_cli.model import DenseModel
from e3va_cli.run_folder import CHECKPOINTS, adapter_folder

LEAST_SCORE = 0.5  # of an object, unless another is asked for
Found = Detections | Segmentation


@dataclass(frozen=True)
class Adapter:
    """A trained model and what it takes to use it.

    Attributes:
        name: its run's or folder's; no two that are loaded together have the same.
        path: what it was read from.
        model: in eval mode.
        classes, category_ids: of label k at index k - 1.
        resize: how its images are resized, as in the evaluation of its run.
        alone: why it cannot share a pass of the backbone with others; empty if it can.
    """

    name: str
    path: Path
    model: DenseModel
    classes: list[str]
    category_ids: list[int]
    resize: ShortestSide
    alone: str

    @property
    def task(self) -> str:
        """Detection or segmentation."""
        return "segmentation" if "semantic" in self.model.head.needs else "detection"


class Together:
    """Adapters of one backbone, which runs once for all that see images of the same size.

    Args:
        adapters: at least one.
        device: that they compute on.

    Attributes:
        passes: the adapters of each pass of the backbone that an image takes.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device) -> None:
        self.adapters = list(adapters)
        self.device = device
        for adapter in self.adapters:
            adapter.model.to(device)
        shared: dict[tuple[int, int], list[Adapter]] = {}
        for adapter in self.adapters:
            if not adapter.alone:
                shared.setdefault((adapter.resize.size, adapter.resize.max_size), []).append(adapter)
        self.passes = [*shared.values(), *([adapter] for adapter in self.adapters if adapter.alone)]

    @overload
    def predict(
        self, images: list[Any], *, score: float = ..., batch_size: int = ...
    ) -> list[dict[str, ImagePrediction]]: ...
    @overload
    def predict(
        self, images: ImageLike, *, score: float = ..., batch_size: int = ...
    ) -> dict[str, ImagePrediction]: ...
    def predict(self, images: Any, *, score: float = LEAST_SCORE, batch_size: int = 1) -> Any:
        """What each adapter finds, by its name: for an image, or for each of a list.

        Args:
            images: one or a list of what `as_image` takes.
            score: least one of the objects that are kept; nothing below the head's own threshold is ever found.
            batch_size: images at once. They are padded to the largest of their batch, which can change scores a little.

        Raises:
            UserError: an image cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self._predict_batch([images], score)[0]
        starts = range(0, len(images), batch_size)
        return [one for start in starts for one in self._predict_batch(images[start : start + batch_size], score)]

    def _predict_batch(self, given: Sequence[ImageLike], score: float) -> list[dict[str, ImagePrediction]]:
        images = [as_image(one) for one in given]
        found = self._find(images)
        return [
            {
                adapter.name: prediction_of(
                    found[adapter.name][index],
                    given[index],
                    (image.shape[1], image.shape[2]),
                    classes=adapter.classes,
                    category_ids=adapter.category_ids,
                    score=score,
                )
                for adapter in self.adapters
            }
            for index, image in enumerate(images)
        ]

    def _find(self, images: Sequence[Tensor]) -> dict[str, Sequence[Found]]:
        """What is found in each image resized, by the adapters' names."""
        found: dict[str, Sequence[Found]] = {}
        for adapters in self.passes:
            batch = collate([adapters[0].resize(image, {}) for image in images]).to(self.device)
            if len(adapters) == 1:
                found[adapters[0].name] = adapters[0].model.predict(batch.images, batch.image_sizes)
                continue
            results = predict_together([a.model for a in adapters], batch.images, batch.image_sizes)
            found.update(zip((a.name for a in adapters), results, strict=True))
        return found


class Predictor:
    """One adapter on its backbone."""

    def __init__(self, together: Together) -> None:
        self._together = together
        (self.adapter,) = together.adapters

    @property
    def classes(self) -> list[str]:
        """Name of label k at index k - 1."""
        return self.adapter.classes

    @overload
    def predict(self, images: list[Any], *, score: float = ..., batch_size: int = ...) -> list[ImagePrediction]: ...
    @overload
    def predict(self, images: ImageLike, *, score: float = ..., batch_size: int = ...) -> ImagePrediction: ...
    def predict(self, images: Any, *, score: float = LEAST_SCORE, batch_size: int = 1) -> Any:
        """What is found in an image, or in each of a list; arguments and errors are those of `Together.predict`."""
        found = self._together.predict(images, score=score, batch_size=batch_size)
        if isinstance(found, list):
            return [one[self.adapter.name] for one in found]
        return found[self.adapter.name]


def load_adapter(path: str | Path, *, device: str | None = None, **backbone: Any) -> Predictor:
    """A trained adapter, ready for `predict`; arguments and errors are those of `load_adapters`."""
    return Predictor(load_adapters([path], device=device, **backbone))


def load_adapters(
    paths: Sequence[str | Path],
    *,
    device: str | None = None,
    weights: str | None = None,
    pretrained: bool | None = None,
    option: str = "path",
) -> Together:
    """Trained adapters of one backbone, ready to be used together.

    Args:
        paths: run folders, checkpoints in them, or exported adapters.
        device: torch's name of it; None for a GPU if there is one.
        weights: file of the backbone's weights, if it lies elsewhere than in training.
        pretrained: fetch the backbone's weights, if the run had them from a file.
        option: what errors call the paths.

    Raises:
        UserError: something cannot be read or does not fit its backbone, or the backbones differ.
    """
    trained = [read_trained(str(path), option) for path in paths]
    _require_one_backbone(trained, option)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    given = {"weights": weights, "pretrained": pretrained}
    options = {key: value for key, value in given.items() if value is not None}
    names = distinct(_name(Path(path)) for path in paths)
    return Together(list(_adapters(names, trained, options)), place)


def _adapters(names: Sequence[str], trained: Sequence[Trained], options: dict[str, Any]) -> Iterator[Adapter]:
    shared = None
    for name, one in zip(names, trained, strict=True):
        method = one.about["adapter"]["name"]
        if not leaves_backbone(method):
            alone = f"on a backbone of its own, which adapter={method} changes"
            backbone, identity = backbone_of(one, **options)
        else:
            alone = "in passes of its own, as its windows slide" if one.about["head"].get("window") else ""
            shared = shared or backbone_of(one, **options)
            backbone, identity = shared
            require_same_backbone(one, identity)
        about = one.about
        val: Any = build_transforms(about["config"]["dataset"]).val()
        (resize,) = (step for step in val.transforms if isinstance(step, ShortestSide))
        model = build_trained(one, backbone, identity)
        yield Adapter(name, one.path, model, about["classes"], about["category_ids"], resize, alone)


def _require_one_backbone(trained: Sequence[Trained], option: str) -> None:
    identities = {one.path: one.about["backbone"] for one in trained}
    if len({identity["fingerprint"] for identity in identities.values()}) > 1:
        listed = ", ".join(f"{path} ({i['name']}, {i['fingerprint'][:12]})" for path, i in identities.items())
        raise UserError(
            f"{option}: adapters run together on one backbone, and these have backbones of other weights: {listed}; "
            "use them one at a time"
        )


def _name(path: Path) -> str:
    """A run's or folder's name; of a checkpoint given by itself, with its own."""
    path = (adapter_folder(str(path)) or path).absolute()  # a link keeps the name that it was given by
    path = path.resolve() if path.name == ".." else path
    if path.is_file() and path.parent.name == CHECKPOINTS:
        return f"{path.parent.parent.name}-{path.stem}"
    return path.stem if path.is_file() else path.name


def distinct(names: Iterable[str]) -> list[str]:
    """The names, numbered where they would be the same: in files too, where upper and lower case may count as one."""
    taken: set[str] = set()
    times: Counter[str] = Counter()
    found = []
    for name in names:
        candidate = name
        while candidate.casefold() in taken:
            times[name.casefold()] += 1
            candidate = f"{name}-{times[name.casefold()] + 1}"
        taken.add(candidate.casefold())
        found.append(candidate)
    return found
