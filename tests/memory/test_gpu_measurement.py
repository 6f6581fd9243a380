"""On a GPU: running out of memory is a result, and one process measures as new ones would. See also tests/gpu."""

import pytest
import torch

from e3va_cli.memory.measure import OUT_OF_MEMORY, MeasuringProcess, Request
from e3va_cli.memory.step import StepSize

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
SIZE = StepSize(2, (480, 640), 20, "32", 1.0)


def test_one_process_measures_as_a_new_one_after_out_of_memory(config):
    options = {m: config("backbone=swin_t", f"adapter={m}", "head=mask_rcnn") for m in ("full", "e3va")}

    def request(method, limit_mib=None):
        return Request(options[method], SIZE, 80, "cuda", warmup=1, repeats=1, memory_limit_mib=limit_mib)

    with MeasuringProcess() as process:
        alone = process.measure(request("e3va"))
        assert process._process is not None, "memory was left allocated"
        full = process.measure(request("full"))
        too_large = process.measure(request("full", limit_mib=1500))
        assert too_large.error == OUT_OF_MEMORY and too_large.peak_mib is None
        again = process.measure(request("e3va"))
    assert again.peak_mib == pytest.approx(alone.peak_mib, rel=0.01)
    assert full.peak_mib > again.peak_mib
