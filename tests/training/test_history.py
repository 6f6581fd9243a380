import csv
import errno

import pytest

from e3va_cli.training.history import MetricsHistory
from e3va_cli.utils.files import UnwritableError


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_one_row_per_step_and_a_column_per_metric(tmp_path):
    history = MetricsHistory(tmp_path / "metrics.csv")
    history.log_metrics({"loss": 3.0, "epoch": 0}, step=0)
    history.log_metrics({"lr": 0.1}, step=0)
    history.save()
    assert not history.path.exists(), "the current step's row may still grow"
    history.log_metrics({"loss": 2.0}, step=1)
    history.save()
    history.log_metrics({"loss": 1.0}, step=2)
    history.save()
    assert [r["loss"] for r in rows(history.path)] == ["3.0", "2.0"]
    history.log_metrics({"AP": 0.5}, step=2)
    history.finalize("success")
    assert [(r["step"], r["loss"], r["lr"], r["AP"]) for r in rows(history.path)] == [
        ("0", "3.0", "0.1", ""),
        ("1", "2.0", "", ""),
        ("2", "1.0", "", "0.5"),
    ]


def test_a_resumed_run_goes_on_in_the_file(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsHistory(path)
    for step in range(6):
        first.log_metrics({"loss": float(step)}, step=step)
    first.finalize("success")
    with path.open("a") as file:
        file.write("7")  # killed while writing a row
    resumed = MetricsHistory(path)
    resumed.drop_from(4)
    for step in (4, 5, 6):
        resumed.log_metrics({"loss": 10.0 + step, "new": 1}, step=step)
    resumed.finalize("success")
    assert [r["loss"] for r in rows(path)] == ["0.0", "1.0", "2.0", "3.0", "14.0", "15.0", "16.0"]


def test_an_evaluation_after_training_belongs_to_the_last_step(tmp_path):
    history = MetricsHistory(tmp_path / "metrics.csv")
    for step in range(2):
        history.log_metrics({"loss": 1.0, "epoch": 0}, step=step)
    history.finalize("success")
    history.last_step = 1
    history.log_metrics({"AP": 0.5, "epoch": 1}, step=2)
    history.finalize("success")
    assert [(r["epoch"], r["step"], r["AP"]) for r in rows(history.path)] == [("1", "0", ""), ("1", "1", "0.5")]


def test_a_row_on_disk_is_never_lost_and_may_grow(tmp_path):
    """A checkpoint promises that the rows before it are on disk, whatever is written when."""
    history = MetricsHistory(tmp_path / "metrics.csv")
    for step in range(3):
        history.log_metrics({"loss": float(step)}, step=step)
    history.flush()
    assert len(rows(history.path)) == 3
    history.log_metrics({"AP": 0.5}, step=2)
    history.save()
    assert [(r["loss"], r["AP"]) for r in rows(history.path)] == [("0.0", ""), ("1.0", ""), ("2.0", "0.5")]
    resumed = MetricsHistory(history.path)
    resumed.drop_from(2)
    resumed.save()
    assert [r["loss"] for r in rows(history.path)] == ["0.0", "1.0"]


def test_half_a_number_is_not_taken_for_one(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,loss\n0,0,1.0\n0,1,2.0\n0,1")  # of step 12, where the disk was full
    assert [row["step"] for row in MetricsHistory(path).rows] == ["0", "1"]


def test_steps_are_appended_not_rewritten(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    history = MetricsHistory(path)
    for step in range(3):
        history.log_metrics({"loss": 1.0}, step=step)
        history.save()
    inode = path.stat().st_ino
    for step in range(3, 50):
        history.log_metrics({"loss": 1.0}, step=step)
        history.save()
    assert path.stat().st_ino == inode and len(rows(path)) == 49


def test_epochs_of_an_older_file_are_counted_from_one_too(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,step,loss\n0,0,3.0\n,1,2.0\n1,2,1.0\n")
    history = MetricsHistory(path)
    history.log_metrics({"loss": 0.5, "epoch": 2}, step=3)
    history.finalize("success")
    assert [row["epoch"] for row in rows(path)] == ["1", "", "2", "3"]
    assert [row["epoch"] for row in MetricsHistory(path).rows] == ["1", "", "2", "3"], "once"


def test_a_history_that_something_deleted_is_written_again(tmp_path):
    history = MetricsHistory(tmp_path / "metrics.csv")
    for step in range(3):
        history.log_metrics({"loss": 1.0, "epoch": 0}, step=step)
        history.flush()
        if step == 1:
            history.path.unlink()
    assert [row["step"] for row in rows(history.path)] == ["0", "1", "2"]


def test_a_disk_that_is_full_leaves_no_half_row(tmp_path, monkeypatch):
    history = MetricsHistory(tmp_path / "metrics.csv")
    history.log_metrics({"loss": 1.0, "epoch": 0}, step=0)
    history.flush()
    before = history.path.read_text()

    def write(self, found):
        self.file.write("0,1,1.2")
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")

    class Writer:
        def __init__(self, file, columns):
            self.file = file

        writerows = write

    monkeypatch.setattr(csv, "DictWriter", Writer)
    history.log_metrics({"loss": 1.0, "epoch": 0}, step=1)
    with pytest.raises(UnwritableError, match=r"metrics\.csv: cannot be written: No space left .* free space"):
        history.flush()
    assert history.path.read_text() == before
