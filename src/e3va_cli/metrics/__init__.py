"""Quality of predictions."""

from e3va_cli.metrics.average_precision import AveragePrecision

__all__ = ["AveragePrecision"]
