"""Quality of predictions."""

from e3va_cli.metrics import average_precision
from e3va_cli.metrics.average_precision import AveragePrecision
from e3va_cli.metrics.evaluator import Evaluator, Results, build_evaluator

__all__ = ["AveragePrecision", "Evaluator", "Results", "average_precision", "build_evaluator"]
