import json
import sys
from dataclasses import asdict

import pytest

from e3va_cli.memory import measure
from e3va_cli.memory.step import StepSize


@pytest.fixture
def answer(tmp_path, monkeypatch):
    """What a measurement that ends with `error` leaves."""

    def answer(error):
        def fail(_):
            raise error

        size = StepSize(1, (64, 64), 1, "32", None)
        request, file = tmp_path / "request.json", tmp_path / "answer.json"
        request.write_text(json.dumps(asdict(measure.Request({}, size, 5, "cpu", warmup=0, repeats=1))))
        monkeypatch.setattr(measure, "measure_here", fail)
        monkeypatch.setattr(sys, "argv", ["measure", str(request), str(file)])
        measure.main()
        return json.loads(file.read_text())

    return answer


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()]
)
def test_memory_of_a_cpu_that_does_not_suffice_is_told(answer, error):
    assert answer(error)["error"] == measure.OUT_OF_MEMORY


def test_another_error_is_not_taken_for_it(answer):
    with pytest.raises(RuntimeError, match="shapes"):
        answer(RuntimeError("shapes do not fit"))
