"""The evaluator protocol, and the registry behind `dataset.metric`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from e3va_cli.data import DenseDataset, Target
from e3va_cli.errors import UserError

Results = dict[str, Any]


class Evaluator(Protocol):
    """Collects predictions image by image and compares them with the annotations.

    Attributes:
        monitor: key of `log_dict` that selects the best checkpoint; higher is better.
    """

    monitor: str

    @property
    def num_images(self) -> int:
        """Images since the last reset."""
        ...

    def reset(self) -> None:
        """Discard all predictions."""
        ...

    def update(self, prediction: Any, target: Target) -> None:
        """Add a head's prediction for one image."""
        ...

    def state(self) -> Any:
        """Return the collected predictions in a form that can be pickled."""
        ...

    def merge(self, states: Sequence[Any]) -> None:
        """Replace the collected predictions by those of all ranks, this one included."""
        ...

    def compute(self) -> Results:
        """Return all results as written to `metrics.json`; None where there is nothing to evaluate."""
        ...

    def log_dict(self, results: Results) -> dict[str, float]:
        """Return the results to log, by name."""
        ...

    def save(self, folder: Path) -> dict[str, str]:
        """Write predictions and plots after `compute`; return a description of each file by its name."""
        ...


Builder = Callable[[Any, Sequence[str]], Evaluator]
BuilderType = TypeVar("BuilderType", bound=Builder)
EVALUATORS: dict[str, tuple[frozenset[str], Builder]] = {}


def register(name: str, *, target_type: str) -> Callable[[BuilderType], BuilderType]:
    """Register a function of (dataset, predicted target types) as `dataset.metric=name`.

    Args:
        name: of the metric.
        target_type: what a data set must have: boxes, masks or semantic.
    """

    def add(builder: BuilderType) -> BuilderType:
        EVALUATORS[name] = frozenset({target_type}), builder
        return builder

    return add


def build_evaluator(metric: str, dataset: DenseDataset, target_types: Sequence[str]) -> Evaluator:
    """Build the evaluator of predictions of `target_types` (boxes, masks, semantic) on `dataset`.

    Raises:
        UserError: the metric is unknown, or does not apply to this data set.
    """
    choices = [name for name, (required, _) in EVALUATORS.items() if required <= dataset.target_types]
    if metric not in choices:
        raise UserError(f"dataset.metric={metric}: one of {', '.join(choices)}")
    return EVALUATORS[metric][1](dataset, target_types)
