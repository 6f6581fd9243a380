"""Evaluation metrics: one file each, behind the protocol in `base.py`."""

from e3va_cli.evaluation import mean_iou, voc_average_precision
from e3va_cli.evaluation.average_precision import AveragePrecision
from e3va_cli.evaluation.base import EVALUATORS, Evaluator, Results, build_evaluator

__all__ = [
    "EVALUATORS",
    "AveragePrecision",
    "Evaluator",
    "Results",
    "build_evaluator",
    "mean_iou",
    "voc_average_precision",
]
