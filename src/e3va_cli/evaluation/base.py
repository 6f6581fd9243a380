"""The one interface of evaluations, and the registry that the `dataset.metric=` option chooses from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from e3va_cli.data import DenseDataset, Target
from e3va_cli.errors import UserError

Results = dict[str, Any]


class Evaluator(Protocol):
    """Collects what a head finds, image by image, and measures it against the annotations.

    Attributes:
        images: how many were given since the last reset.
        monitor: the one of `log_dict` that decides which state of a run is best; higher is better.
    """

    monitor: str

    @property
    def images(self) -> int: ...

    def reset(self) -> None:
        """Forget everything."""
        ...

    def update(self, found: Any, target: Target) -> None:
        """Add what a head found in one image."""
        ...

    def state(self) -> Any:
        """What was collected, for other processes."""
        ...

    def merge(self, states: Sequence[Any]) -> None:
        """Take the shares of all processes, this one included, for what was collected."""
        ...

    def compute(self) -> Results:
        """All results, as `metrics.json` has them; None where there was nothing to measure."""
        ...

    def log_dict(self, results: Results) -> dict[str, float]:
        """Those results that are worth a curve, by name."""
        ...

    def save(self, folder: Path) -> dict[str, str]:
        """Write what is more than numbers, once they are computed: what each file holds, by its name."""
        ...


Builder = Callable[[Any, Sequence[str]], Evaluator]
BuilderType = TypeVar("BuilderType", bound=Builder)
EVALUATORS: dict[str, tuple[frozenset[str], Builder]] = {}


def register(name: str, *, needs: str) -> Callable[[BuilderType], BuilderType]:
    """Make an evaluation choosable as `dataset.metric=name` for data sets that offer `needs`.

    What is registered builds the evaluator from a data set and the kinds of findings, of boxes, masks and semantic.
    """

    def add(builder: BuilderType) -> BuilderType:
        EVALUATORS[name] = frozenset({needs}), builder
        return builder

    return add


def build_evaluator(metric: str, dataset: DenseDataset, kinds: Sequence[str]) -> Evaluator:
    """The evaluation called `metric` of findings of `kinds` on `dataset`.

    Raises:
        UserError: there is none of that name for this kind of data.
    """
    choices = [name for name, (needs, _) in EVALUATORS.items() if needs <= dataset.target_types]
    if metric not in choices:
        raise UserError(f"dataset.metric={metric}: one of {', '.join(choices)}")
    return EVALUATORS[metric][1](dataset, kinds)
