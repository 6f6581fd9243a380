"""Quality of predictions: each evaluation one file, all behind the protocol of `evaluator.py`."""

from e3va_cli.metrics import mean_iou, voc_average_precision
from e3va_cli.metrics.average_precision import AveragePrecision
from e3va_cli.metrics.evaluator import EVALUATORS, Evaluator, Results, build_evaluator

__all__ = [
    "EVALUATORS",
    "AveragePrecision",
    "Evaluator",
    "Results",
    "build_evaluator",
    "mean_iou",
    "voc_average_precision",
]
