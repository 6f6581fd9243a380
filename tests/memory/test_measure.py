import pytest

from e3va_cli.memory import measure
from e3va_cli.memory.measure import MeasuringProcess, Request
from e3va_cli.memory.step import StepSize

SIZE = StepSize(1, (64, 64), 1, "32", None)


@pytest.fixture
def request_of(config):
    """A request for a step of the smallest network."""

    def make(method, **others):
        options = config(f"adapter={method}", "backbone=swin_nano", "head=mask_rcnn_nano")
        return Request(options, SIZE, 5, "cpu", warmup=0, repeats=1, **others)

    return make


@pytest.mark.parametrize(
    "error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), MemoryError()]
)
def test_out_of_memory_is_a_measurement_with_error(monkeypatch, request_of, error):
    def fail(_):
        raise error

    monkeypatch.setattr(measure, "measure_in_process", fail)
    assert measure.measure_request(request_of("e3va")).error == measure.OUT_OF_MEMORY


def test_another_error_is_raised(monkeypatch, request_of):
    def fail(_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(measure, "measure_in_process", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        measure.measure_request(request_of("e3va"))


def test_one_process_measures_all_and_is_replaced_after_it_ended(request_of):
    here = {method: measure.measure_in_process(request_of(method)).peak_mib for method in ("frozen", "e3va")}
    with MeasuringProcess() as process:
        first = process.measure(request_of("frozen"))
        worker = process._process
        second = process.measure(request_of("e3va"))
        assert process._process is worker
        broken = process.measure(Request({}, SIZE, 5, "cpu", warmup=0, repeats=1))
        assert (
            broken.peak_mib is None
            and broken.error == "exit code 1: TypeError: replace() should be called on dataclass instances"
        )
        third = process.measure(request_of("e3va"))
        assert process._process is not worker
    assert [first.peak_mib, second.peak_mib, third.peak_mib] == [here["frozen"], here["e3va"], here["e3va"]]
    assert len(first.step_times_s) == 1 and not first.error
