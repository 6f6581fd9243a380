"""Prediction with trained adapters from Python, one or several on one backbone."""

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
    build_trained,
    build_trained_backbone,
    check_same_backbone,
    read_checkpoint_or_adapter,
)
from e3va_cli.inference.images import ImageLike, as_image
from e3va_cli.inference.prediction import ImagePrediction, to_image_prediction
from e3va_cli.inference.shared_backbone import can_share_backbone
from e3va_cli.inference.shared_passes import (
    HeadPrediction,
    LoadedAdapter,
    adapter_names,
    group_by_pass,
    predict_groups,
)
from e3va_cli.training.checkpoints import checkpoint_options
from e3va_cli.utils.amp import mixed_precision

DEFAULT_SCORE_THRESHOLD = 0.5


class MultiPredictor:
    """Predicts with adapters of one backbone, which runs once for those with images of the same size.

    Args:
        adapters: at least one.
        device: of the computation.

    Attributes:
        groups: the adapters of each forward pass of the backbone.
    """

    def __init__(self, adapters: Sequence[LoadedAdapter], device: torch.device) -> None:
        self.adapters = list(adapters)
        self.groups = group_by_pass(adapters)
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
    def predict(self, images: Any, *, score_threshold: float = DEFAULT_SCORE_THRESHOLD, batch_size: int = 1) -> Any:
        """Return the predictions of each adapter by name, for one image or for each of a list.

        Args:
            images: an argument of `as_image`, or a list of them.
            score_threshold: minimum score of detections; the head's own threshold applies too.
            batch_size: images per batch. They are padded to the largest one, which can change scores slightly.

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

        def batch_for(adapter: LoadedAdapter) -> Batch:
            resize = adapter.resize
            return collate([resize(as_image(one, adapter.scaling), {}) for one in raw]).to(self.device)

        predictions: dict[str, Sequence[HeadPrediction]] = {}
        for adapters in self.groups:
            with mixed_precision(adapters[0].precision, self.device):
                predictions |= predict_groups([adapters], batch_for)
        return [
            {
                adapter.name: to_image_prediction(
                    predictions[adapter.name][index],
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
    """Predicts with one adapter."""

    def __init__(self, predictor: MultiPredictor) -> None:
        self._predictor = predictor
        (self.adapter,) = predictor.adapters

    @property
    def classes(self) -> list[str]:
        """The class names; label k is at index k - 1."""
        return self.adapter.classes

    @overload
    def predict(
        self, images: list[Any], *, score_threshold: float = ..., batch_size: int = ...
    ) -> list[ImagePrediction]: ...
    @overload
    def predict(self, images: ImageLike, *, score_threshold: float = ..., batch_size: int = ...) -> ImagePrediction: ...
    def predict(self, images: Any, *, score_threshold: float = DEFAULT_SCORE_THRESHOLD, batch_size: int = 1) -> Any:
        """Return the prediction for an image, or for each of a list; see `MultiPredictor.predict`."""
        predictions = self._predictor.predict(images, score_threshold=score_threshold, batch_size=batch_size)
        if isinstance(predictions, list):
            return [by_name[self.adapter.name] for by_name in predictions]
        return predictions[self.adapter.name]


def load_adapter(path: str | Path, *, device: str | None = None, **backbone: Any) -> Predictor:
    """Load a trained adapter for prediction; see `load_adapters`."""
    return Predictor(load_adapters([path], device=device, **backbone))


def load_adapters(
    paths: Sequence[str | Path],
    *,
    device: str | None = None,
    weights: str | None = None,
    pretrained: bool | None = None,
    option: str = "path",
) -> MultiPredictor:
    """Load trained adapters of one backbone for prediction.

    Args:
        paths: run folders, checkpoints in them, or exported adapters.
        device: a torch device; None for a GPU if there is one.
        weights: file with the backbone's weights, if not at the path of training.
        pretrained: download the backbone's weights, instead of the run's file.
        option: name of the paths in error messages.

    Raises:
        UserError: a path cannot be read, weights do not match the backbone, or the backbones differ.
    """
    trained = [read_checkpoint_or_adapter(str(path), option) for path in paths]
    check_shared_backbone(trained, option)
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    source = {"weights": weights, "pretrained": pretrained}
    return MultiPredictor(list(_load(adapter_names(paths), trained, source)), torch_device)


def _load(
    names: Sequence[str], trained: Sequence[AdapterCheckpoint], source: dict[str, Any]
) -> Iterator[LoadedAdapter]:
    shared = None
    for name, one in zip(names, trained, strict=True):
        about = one.about
        if can_share_backbone(about["adapter"]["name"]):
            shared = shared or build_trained_backbone(one, **source)
            check_same_backbone(one, shared[1])
            model = build_trained(one, *shared)
        else:
            model = build_trained(one, *build_trained_backbone(one, **source))
        yield LoadedAdapter(name, one.path, model, one.config, about["classes"], about["category_ids"])


def check_shared_backbone(trained: Sequence[AdapterCheckpoint], option: str) -> None:
    """Check that all were trained on the same backbone with the same options.

    Raises:
        UserError: they were not; names `option`.
    """
    identities = {one.path: one.about["backbone"] for one in trained}
    hint = "use them one at a time"
    if len({identity["fingerprint"] for identity in identities.values()}) > 1:
        listed = ", ".join(f"{path} ({i['name']}, {i['fingerprint'][:12]})" for path, i in identities.items())
        raise UserError(
            f"{option}: adapters that are used together must share one backbone, but these have different weights: "
            f"{listed}; {hint}"
        )
    computed = {one.path: checkpoint_options("backbone", one.about["config"]["backbone"]) for one in trained}
    for key in next(iter(computed.values())):
        values = {path: str(options.get(key)).lower() for path, options in computed.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{path} ({value})" for path, value in values.items())
            raise UserError(f"{option}: trained with different backbone.{key}: {listed}; {hint}")
