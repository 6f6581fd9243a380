"""Progress bars where there is a terminal for them; in a pipe or a log file, a line now and then."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from rich.progress import Progress, TaskID

LINE_EVERY_S = 30.0


def is_interactive() -> bool:
    """Whether standard output is a terminal that a bar can be redrawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Throttle:
    """Says when the next line is due."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        self.every_s = every_s
        self.last = time.monotonic()

    def due(self) -> bool:
        """Whether so many seconds have passed since the start or the last time that this was true."""
        if time.monotonic() - self.last < self.every_s:
            return False
        self.last = time.monotonic()
        return True


class TerminalProgress(Progress):
    """Rich's bars; where there is no terminal for them, a line such as `Predicting: 1,200 of 5,000` every 30 s."""

    def __init__(self, *columns: Any, **options: Any) -> None:
        super().__init__(*columns, **options, disable=not is_interactive())
        self.pace = Throttle()

    def update(self, task_id: TaskID, **values: Any) -> None:
        """As Rich does, and write the line where it is due."""
        super().update(task_id, **values)
        if self.disable and self.pace.due():
            task = self._tasks[task_id]
            total = "" if task.total is None else f" of {task.total:,.0f}"
            print(f"{task.description}: {task.completed:,.0f}{total}", flush=True)
