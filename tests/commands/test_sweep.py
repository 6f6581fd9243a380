"""What becomes of the jobs of a sweep that fail."""

import weakref

import pytest

from e3va_cli.commands.sweep import FailedJobsError, Sweep
from e3va_cli.errors import UserError


@pytest.fixture
def sweep(monkeypatch):
    sweep = Sweep([])
    monkeypatch.setattr(sweep, "_name", lambda: f"{sweep.begun - 1} (x=1)")
    return sweep


def raising(error):
    def job():
        raise error

    return job


def test_every_failure_but_a_signal_is_kept_for_the_end(sweep, capsys):
    sweep.run(lambda: None)
    sweep.run(raising(SystemExit(0)))
    for error in (UserError("no.pth: no such file", "b"), SystemExit(1), KeyError("spoilt")):
        with pytest.raises(FailedJobsError) as failed:
            sweep.run(raising(error))
    assert str(failed.value) == "e3va: error: 3 of 5 jobs failed: 2 (x=1), 3 (x=1), 4 (x=1)"
    said = capsys.readouterr().err.splitlines()
    assert said[:4] == [
        "e3va: error: job 2 (x=1): no.pth: no such file",
        "e3va: error: job 2 (x=1): b",
        "e3va: error: job 3 (x=1): ended with exit code 1",
        "e3va: error: job 4 (x=1):",
    ]
    assert said[-1] == "KeyError: 'spoilt'"


@pytest.mark.parametrize("stop", [SystemExit(143), KeyboardInterrupt()])
def test_a_signal_ends_the_sweep(sweep, stop):
    with pytest.raises(type(stop)) as stopped:
        sweep.run(raising(stop))
    assert stopped.value is stop and not sweep.failed


def test_a_failed_job_keeps_no_memory(sweep):
    class Model:
        pass

    models = []

    def job():
        model = Model()
        models.append(weakref.ref(model))
        model.itself = model
        raise RuntimeError("out of memory")

    with pytest.raises(FailedJobsError) as failed:
        sweep.run(job)
    assert models[0]() is None and failed.value.__context__ is None
