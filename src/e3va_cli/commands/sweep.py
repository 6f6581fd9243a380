"""Jobs of `-m`: the others run when one fails, and the failed ones are listed at the end."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable

from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException

from e3va_cli.config.composition import parse
from e3va_cli.errors import UserError, print_errors
from e3va_cli.utils.text import pluralize

STOPPED = 128  # exit codes above it are of signals, which end the whole sweep


class FailedJobsError(CompactHydraException):
    """A job failed. Hydra prints the first such error once all jobs have run; it then lists all failed jobs."""

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self.sweep = sweep

    def __str__(self) -> str:
        """The summary of the sweep."""
        failed = self.sweep.failed
        return f"e3va: error: {len(failed)} of {pluralize(self.sweep.begun, 'job')} failed: {', '.join(failed)}"


class Sweep:
    """Keeps count of the jobs of a sweep.

    Args:
        overrides: of the command, sweeps included.

    Attributes:
        begun: jobs so far.
        failed: of them, number and values of each that failed.
    """

    def __init__(self, overrides: list[str]) -> None:
        self.overrides = overrides
        self.begun = 0
        self.failed: list[str] = []

    def run(self, job: Callable[[], None]) -> None:
        """Run a job.

        Raises:
            FailedJobsError: anything but a signal ended the job; why has been printed.
        """
        self.begun += 1
        name = self._name()
        if _is_done(job, name):
            return
        gc.collect()  # the next job needs the memory
        self.failed.append(name)
        raise FailedJobsError(self)

    def _name(self) -> str:
        """Number and values of the job at hand, as in `1 (adapter.rank=4)`."""
        varied = {override.key_or_group for override in parse(self.overrides) if override.is_sweep_override()}
        overrides = parse(list(HydraConfig.get().overrides.task))
        own = [override.input_line or "" for override in overrides if override.key_or_group in varied]
        return f"{HydraConfig.get().job.num} ({', '.join(own)})"


def _is_done(job: Callable[[], None], name: str) -> bool:
    """Run a job and print its error; an exception raised further would keep the job's model in memory."""
    try:
        job()
        return True
    except UserError as error:
        print_errors(UserError(*(f"job {name}: {message}" for message in error.messages)))
    except SystemExit as error:
        if not error.code:
            return True
        if isinstance(error.code, int) and error.code > STOPPED:
            raise
        print(f"e3va: error: job {name}: ended with exit code {error.code}", file=sys.stderr)
    except Exception:
        print(f"e3va: error: job {name}:", file=sys.stderr)
        traceback.print_exc()
    return False
