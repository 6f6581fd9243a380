"""Progress bars in a terminal; in a pipe or a log file, a line every 30 s."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.progress import Progress, TaskID

LINE_INTERVAL_S = 30.0


def is_interactive() -> bool:
    """Return whether standard output is a terminal that can redraw a progress bar."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Throttle:
    """Limits how often a line is printed."""

    def __init__(self, interval_s: float = LINE_INTERVAL_S) -> None:
        self.interval_s = interval_s
        self.last = time.monotonic()

    def ready(self) -> bool:
        """Return whether the interval has passed since the start or the last call that returned True."""
        if time.monotonic() - self.last < self.interval_s:
            return False
        self.last = time.monotonic()
        return True


class TerminalProgress(Progress):
    """Rich's progress bars; without a terminal, prints a line such as `Predicting: 1,200 of 5,000` every 30 s."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options, disable=not is_interactive())
        self.throttle = Throttle()

    def update(self, task_id: TaskID, **values: Any) -> None:
        """Update a bar, or print a line."""
        super().update(task_id, **values)
        if self.disable and self.throttle.ready():
            task = next(task for task in self.tasks if task.id == task_id)
            total = "" if task.total is None else f" of {task.total:,.0f}"
            print(f"{task.description}: {task.completed:,.0f}{total}", flush=True)
