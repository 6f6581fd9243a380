"""Trained adapters ready for use on images, one or several on one backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from e3va_cli.data import Batch, collate
from e3va_cli.data.images.reading import read_raw
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import (
    AdapterCheckpoint,
    backbone_of,
    build_trained,
    read_checkpoint_or_adapter,
    require_same_backbone,
)
from e3va_cli.inference.images import ImageLike, as_image
from e3va_cli.inference.prediction import ImagePrediction, prediction_of
from e3va_cli.inference.shared_backbone import can_share_backbone
from e3va_cli.inference.shared_passes import Adapter, Found, find, group_by_input, names_of
from e3va_cli.training.checkpoints import checkpoint_options
from e3va_cli.utils.amp import mixed_precision

LEAST_SCORE = 0.5  # of an object, unless another is asked for


class MultiPredictor:
    """Adapters of one backbone, which runs once for all that see images of the same size.

    Args:
        adapters: at least one.
        device: that they compute on.

    Attributes:
        passes: the adapters of each pass of the backbone that an image takes.
    """

    def __init__(self, adapters: Sequence[Adapter], device: torch.device) -> None:
        self.adapters = list(adapters)
        self.passes = group_by_input(adapters)
        self.device = device
        for adapter in self.adapters:
            adapter.model.to(device)

    @overload
    def predict(
        self, images: list[Any], *, score_threshold: float = ..., batch_size: int = ...
    ) -> list[dict[str, ImagePrediction]]: ...
    @overload
    def predict(
        self, images: ImageLike, *, score_threshold: float = ..., batch_size: int = ...
    ) -> dict[str, ImagePrediction]: ...
    def predict(self, images: Any, *, score_threshold: float = LEAST_SCORE, batch_size: int = 1) -> Any:
        """What each adapter finds, by its name: for an image, or for each of a list.

        Args:
            images: one or a list of what `as_image` takes.
            score_threshold: least score of the objects that are kept; the head's own threshold applies too.
            batch_size: images at once. They are padded to the largest of their batch, which can change scores a little.

        Raises:
            UserError: an image cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self._predict_batch([images], score_threshold)[0]
        starts = range(0, len(images), batch_size)
        return [
            one for start in starts for one in self._predict_batch(images[start : start + batch_size], score_threshold)
        ]

    def _predict_batch(self, given: Sequence[ImageLike], score_threshold: float) -> list[dict[str, ImagePrediction]]:
        raw = [read_raw(Path(one)) if isinstance(one, str | Path) else one for one in given]
        shapes = [as_image(one).shape for one in raw]

        def batch_for(adapter: Adapter) -> Batch:
            resize = adapter.resize
            return collate([resize(as_image(one, adapter.scaling), {}) for one in raw]).to(self.device)

        found: dict[str, Sequence[Found]] = {}
        for adapters in self.passes:
            with mixed_precision(adapters[0].precision, self.device):
                found |= find([adapters], batch_for)
        return [
            {
                adapter.name: prediction_of(
                    found[adapter.name][index],
                    given[index],
                    (shape[1], shape[2]),
                    classes=adapter.classes,
                    category_ids=adapter.category_ids,
                    score_threshold=score_threshold,
                    scaling=adapter.scaling,
                )
                for adapter in self.adapters
            }
            for index, shape in enumerate(shapes)
        ]


class Predictor:
    """One adapter on its backbone."""

    def __init__(self, together: MultiPredictor) -> None:
        self._together = together
        (self.adapter,) = together.adapters

    @property
    def classes(self) -> list[str]:
        """Name of label k at index k - 1."""
        return self.adapter.classes

    @overload
    def predict(
        self, images: list[Any], *, score_threshold: float = ..., batch_size: int = ...
    ) -> list[ImagePrediction]: ...
    @overload
    def predict(self, images: ImageLike, *, score_threshold: float = ..., batch_size: int = ...) -> ImagePrediction: ...
    def predict(self, images: Any, *, score_threshold: float = LEAST_SCORE, batch_size: int = 1) -> Any:
        """What is found in an image, or in each of a list; arguments and errors are those of `Together.predict`."""
        found = self._together.predict(images, score_threshold=score_threshold, batch_size=batch_size)
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
) -> MultiPredictor:
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
    trained = [read_checkpoint_or_adapter(str(path), option) for path in paths]
    require_one_backbone(trained, option)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    moved = {"weights": weights, "pretrained": pretrained}
    return MultiPredictor(list(_adapters(names_of(paths), trained, moved)), place)


def _adapters(names: Sequence[str], trained: Sequence[AdapterCheckpoint], moved: dict[str, Any]) -> Iterator[Adapter]:
    shared = None
    for name, one in zip(names, trained, strict=True):
        about = one.about
        if can_share_backbone(about["adapter"]["name"]):
            shared = shared or backbone_of(one, **moved)
            require_same_backbone(one, shared[1])
            model = build_trained(one, *shared)
        else:
            model = build_trained(one, *backbone_of(one, **moved))
        yield Adapter(name, one.path, model, one.config, about["classes"], about["category_ids"])


def require_one_backbone(trained: Sequence[AdapterCheckpoint], option: str) -> None:
    """Raises UserError unless all were trained on one backbone, computed in one way; names `option`."""
    identities = {one.path: one.about["backbone"] for one in trained}
    apart = "use them one at a time"
    if len({identity["fingerprint"] for identity in identities.values()}) > 1:
        listed = ", ".join(f"{path} ({i['name']}, {i['fingerprint'][:12]})" for path, i in identities.items())
        raise UserError(
            f"{option}: adapters run together on one backbone, and these have backbones of other weights: {listed}; "
            f"{apart}"
        )
    computed = {one.path: checkpoint_options("backbone", one.about["config"]["backbone"]) for one in trained}
    for key in next(iter(computed.values())):
        values = {path: str(options.get(key)).lower() for path, options in computed.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{path} ({value})" for path, value in values.items())
            raise UserError(f"{option}: these were trained with different backbone.{key}: {listed}; {apart}")
