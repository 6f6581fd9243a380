"""Load trained adapters and predict: one adapter, or several on one backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from e3va_cli.data import collate
from e3va_cli.data.images.reading import read_raw
from e3va_cli.errors import UserError
from e3va_cli.export.adapter_checkpoint import (
    AdapterCheckpoint,
    build_trained_backbone,
    build_trained_model,
    check_backbone,
    read_checkpoint_or_adapter,
)
from e3va_cli.inference.images import ImageLike, to_image
from e3va_cli.inference.loaded_adapter import LoadedAdapter, adapter_names
from e3va_cli.inference.prediction import ImagePrediction, build_image_prediction
from e3va_cli.inference.shared_backbone import Predictions, group_by_input, predict_group
from e3va_cli.training.checkpoints import checkpoint_options
from e3va_cli.utils.amp import mixed_precision

SCORE_THRESHOLD = 0.5  # default minimum score of detections


class MultiPredictor:
    """Adapters of one backbone, which share its forward pass if they use images of the same size.

    Args:
        adapters: at least one.
        device: to which the models are moved.

    Attributes:
        passes: the adapters of each forward pass of the backbone.
    """

    def __init__(self, adapters: Sequence[LoadedAdapter], device: torch.device) -> None:
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
    def predict(self, images: Any, *, score_threshold: float = SCORE_THRESHOLD, batch_size: int = 1) -> Any:
        """Return the predictions by adapter name, for an image or for each of a list.

        Args:
            images: an input of `to_image`, or a list of them.
            score_threshold: minimum score of detections; the head's own threshold also applies.
            batch_size: images per batch, padded to the largest of the batch, which can change scores slightly.

        Raises:
            UserError: an image cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self._predict_batch([images], score_threshold)[0]
        starts = range(0, len(images), batch_size)
        return [
            one for start in starts for one in self._predict_batch(images[start : start + batch_size], score_threshold)
        ]

    def _predict_batch(self, images: Sequence[ImageLike], score_threshold: float) -> list[dict[str, ImagePrediction]]:
        raw = [read_raw(Path(image)) if isinstance(image, str | Path) else image for image in images]
        shapes = [to_image(image).shape for image in raw]
        predictions: dict[str, Predictions] = {}
        for adapters in self.passes:
            resize, scaling = adapters[0].resize, adapters[0].scaling
            batch = collate([resize(to_image(image, scaling), {}) for image in raw]).to(self.device)
            with mixed_precision(adapters[0].precision, self.device):
                predictions |= predict_group(adapters, batch.images, batch.image_sizes)
        return [
            {
                adapter.name: build_image_prediction(
                    predictions[adapter.name][index],
                    image,
                    (height, width),
                    classes=adapter.classes,
                    category_ids=adapter.category_ids,
                    score_threshold=score_threshold,
                    scaling=adapter.scaling,
                )
                for adapter in self.adapters
            }
            for index, (image, (_, height, width)) in enumerate(zip(images, shapes, strict=True))
        ]


class Predictor:
    """One adapter on its backbone."""

    def __init__(self, predictor: MultiPredictor) -> None:
        self._predictor = predictor
        (self.adapter,) = predictor.adapters

    @property
    def classes(self) -> list[str]:
        """Return the class names, that of label k at index k - 1."""
        return self.adapter.classes

    @overload
    def predict(
        self, images: list[Any], *, score_threshold: float = ..., batch_size: int = ...
    ) -> list[ImagePrediction]: ...
    @overload
    def predict(self, images: ImageLike, *, score_threshold: float = ..., batch_size: int = ...) -> ImagePrediction: ...
    def predict(self, images: Any, *, score_threshold: float = SCORE_THRESHOLD, batch_size: int = 1) -> Any:
        """Return the prediction for an image, or for each of a list; arguments as of `MultiPredictor.predict`."""
        predictions = self._predictor.predict(images, score_threshold=score_threshold, batch_size=batch_size)
        if isinstance(predictions, list):
            return [by_name[self.adapter.name] for by_name in predictions]
        return predictions[self.adapter.name]


def load_adapter(path: str | Path, *, device: str | None = None, **backbone: Any) -> Predictor:
    """Load one adapter; arguments and errors as of `load_adapters`."""
    return Predictor(load_adapters([path], device=device, **backbone))


def load_adapters(
    paths: Sequence[str | Path],
    *,
    device: str | None = None,
    weights: str | None = None,
    pretrained: bool | None = None,
    option: str = "path",
) -> MultiPredictor:
    """Load adapters of one backbone.

    Args:
        paths: run folders, checkpoints in them, or exported adapters.
        device: such as `cpu` or `cuda:1`; by default a GPU if there is one.
        weights: file of the backbone's weights, if it has moved since training.
        pretrained: override of the run's `backbone.pretrained`.
        option: name of `paths` in error messages.

    Raises:
        UserError: a file cannot be read, weights do not fit the backbone, or the backbones differ.
    """
    checkpoints = [read_checkpoint_or_adapter(str(path), option) for path in paths]
    check_same_backbone(checkpoints, option)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backbone = {"weights": weights, "pretrained": pretrained}
    return MultiPredictor(list(_build_adapters(adapter_names(paths), checkpoints, backbone)), target)


def _build_adapters(
    names: Sequence[str], checkpoints: Sequence[AdapterCheckpoint], options: dict[str, Any]
) -> Iterator[LoadedAdapter]:
    shared = None
    for name, checkpoint in zip(names, checkpoints, strict=True):
        metadata = checkpoint.metadata
        if checkpoint.shares_backbone:
            shared = shared or build_trained_backbone(checkpoint, **options)
            check_backbone(checkpoint, shared[1])
            model = build_trained_model(checkpoint, *shared)
        else:
            model = build_trained_model(checkpoint, *build_trained_backbone(checkpoint, **options))
        config = checkpoint.config
        yield LoadedAdapter(name, checkpoint.path, model, config, metadata["classes"], metadata["category_ids"])


def check_same_backbone(checkpoints: Sequence[AdapterCheckpoint], option: str) -> None:
    """Check that all adapters were trained on the same backbone with the same options.

    Args:
        checkpoints: of the adapters.
        option: name of their option in the error message.

    Raises:
        UserError: weights or options of the backbones differ.
    """
    advice = "run them one at a time"
    identities = {one.path: one.metadata["backbone"] for one in checkpoints}
    if len({identity["fingerprint"] for identity in identities.values()}) > 1:
        listed = ", ".join(f"{path} ({i['name']}, {i['fingerprint'][:12]})" for path, i in identities.items())
        raise UserError(f"{option}: the adapters were trained on different backbone weights: {listed}; {advice}")
    by_path = {one.path: checkpoint_options("backbone", one.metadata["config"]["backbone"]) for one in checkpoints}
    for key in next(iter(by_path.values())):
        values = {path: str(options.get(key)).lower() for path, options in by_path.items()}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{path} ({value})" for path, value in values.items())
            raise UserError(f"{option}: the adapters were trained with different backbone.{key}: {listed}; {advice}")
